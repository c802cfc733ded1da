"""sglang.Engine on SmolLM2: the answers of the server, without a server."""

from __future__ import annotations

import asyncio
import gzip
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

import sglang

GREEDY = {"temperature": 0, "max_new_tokens": 12}
LONG = {"temperature": 0, "ignore_eos": True, "max_new_tokens": 1500}
PROMPT = "The lighthouse keeper climbed the stairs and"
LIMIT_S = 60.0
FLAGS = {"context_length": 2048, "max_total_tokens": 8192, "dtype": "float32"}

pytestmark = pytest.mark.usefixtures("server_env")


@pytest.fixture(scope="module")
def engine(smollm2: Path, server_env: None) -> Iterator[Any]:
    with sglang.Engine(model_path=str(smollm2), enable_pdmux=True, **FLAGS) as engine:
        processes = [psutil.Process(pid) for pid in engine.get_all_child_pids()]
        assert len(processes) == 2
        yield engine
    psutil.wait_procs(processes, timeout=5)
    assert not any(process.is_running() for process in processes)


def same(result: Any) -> Any:
    """Without what differs from call to call."""
    if isinstance(result, list):
        return [same(one) for one in result]
    info = {
        name: value
        for name, value in result["meta_info"].items()
        if name not in ("id", "e2e_latency", "cached_tokens")
    }
    return {**result, "meta_info": info}


class TestAnswers:
    @pytest.mark.parametrize(
        "body",
        [
            {"text": PROMPT},
            {"text": [PROMPT, "One, two, three,"]},
            {"input_ids": [504, 2048, 314]},
            {"text": PROMPT, "sampling_params": {**GREEDY, "n": 2}},
            {"text": [PROMPT, "A"], "sampling_params": [GREEDY, {**GREEDY, "max_new_tokens": 3}]},
            {"text": PROMPT, "sampling_params": {**GREEDY, "stop": ["e"]}},
        ],
        ids=str,
    )
    def test_are_those_of_the_server(self, engine: Any, client: Any, body: dict[str, Any]) -> None:
        body = {"sampling_params": GREEDY, **body}
        response = client.http.post("/generate", json=body)
        renamed = {**body, "prompt": body.get("text")}
        renamed.pop("text", None)
        assert same(engine.generate(**renamed)) == same(response.json())

    def test_streams_have_the_chunks_of_the_server(self, engine: Any, client: Any) -> None:
        body = {"text": ["A", "B"], "sampling_params": GREEDY}
        last: dict[int, Any] = {}
        with client.http.stream("POST", "/generate", json={**body, "stream": True}) as response:
            for line in response.iter_lines():
                if line.startswith("data: {"):
                    chunk = json.loads(line.removeprefix("data: "))
                    last[chunk["index"]] = same(chunk)
        chunks = list(engine.generate(["A", "B"], GREEDY, stream=True))
        assert {chunk["index"]: same(chunk) for chunk in chunks} == last
        assert len(chunks) > 2

    def test_a_rid_is_kept(self, engine: Any) -> None:
        assert engine.generate(PROMPT, GREEDY, rid="mine")["meta_info"]["id"] == "mine"


class TestCallers:
    def test_a_running_loop_may_call_either_way(self, engine: Any) -> None:
        expected = engine.generate(PROMPT, GREEDY)["text"]

        async def main() -> None:
            together = await asyncio.gather(
                *(engine.async_generate(PROMPT, GREEDY) for _ in range(3))
            )
            assert [one["text"] for one in together] == [expected] * 3
            chunks = [c async for c in await engine.async_generate(PROMPT, GREEDY, stream=True)]
            assert chunks[-1]["text"] == expected
            assert engine.generate(PROMPT, GREEDY)["text"] == expected  # as in a notebook

        asyncio.run(main())

    def test_threads_may_call_at_once(self, engine: Any) -> None:
        texts: list[str] = []

        def call() -> None:
            texts.append(engine.generate(PROMPT, GREEDY)["text"])

        threads = [threading.Thread(target=call) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(LIMIT_S)
        assert texts == [engine.generate(PROMPT, GREEDY)["text"]] * 4

    def test_leaving_a_stream_or_a_task_frees_its_place(
        self, engine: Any, eventually: Callable[..., None]
    ) -> None:
        next(stream := engine.generate(PROMPT, LONG, stream=True))
        stream.close()

        async def give_up() -> None:
            task = asyncio.create_task(engine.async_generate(PROMPT, LONG))
            await asyncio.to_thread(eventually, lambda: running(engine) == 1, LIMIT_S)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

        asyncio.run(give_up())

        def idle() -> bool:
            return running(engine) == 0

        eventually(idle, LIMIT_S)

    def test_abort(self, engine: Any) -> None:
        stream = engine.generate(PROMPT, LONG, stream=True, rid="victim")
        next(stream)
        engine.abort_request("vict")
        assert list(stream)[-1]["meta_info"]["finish_reason"]["type"] == "abort"


def running(engine: Any) -> int:
    [state] = engine.get_server_info()["internal_states"]
    return int(state["running_requests"])


class TestErrors:
    @pytest.mark.parametrize(
        ("arguments", "named"),
        [
            ({}, "text: give exactly one of"),
            ({"prompt": "a", "input_ids": [1]}, "text: give exactly one of"),
            ({"prompt": "a", "sampling_params": {"top_p": 2}}, "sampling_params.top_p"),
            ({"prompt": "a", "sampling_params": {"max_new_tokens": 9999}}, "max_new_tokens"),
            ({"prompt": "a", "image_data": "x.png"}, "image_data"),
            ({"prompt": "a", "colour": "red"}, "colour"),
            ({"input_ids": [10**6]}, "input_ids"),
        ],
        ids=str,
    )
    @pytest.mark.parametrize("stream", [False, True])
    def test_a_bad_parameter_raises_value_error(
        self, engine: Any, arguments: dict[str, Any], named: str, stream: bool
    ) -> None:
        def ask() -> None:
            result = engine.generate(**arguments, stream=stream)
            if stream:
                list(result)

        with pytest.raises(ValueError, match=named):
            ask()

    def test_what_does_not_exist_says_so(self, engine: Any) -> None:
        with pytest.raises(NotImplementedError, match="embedding models"):
            engine.encode("a")
        with pytest.raises(NotImplementedError, match="LoRA"):
            engine.load_lora_adapter("a", "b")

    def test_bad_server_arguments_raise_value_error_before_anything_starts(self) -> None:
        with pytest.raises(ValueError, match=r"model_pth: .*did you mean model_path"):
            sglang.Engine(model_pth="x")
        with pytest.raises(ValueError, match="--page-size"):
            sglang.Engine(model_path="x", page_size=0)
        args = sglang.ServerArgs(model_path="x")
        with pytest.raises(ValueError, match="contradicts"):
            sglang.Engine(server_args=args, page_size=2)

    def test_a_model_that_is_not_there_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(Exception, match="nothing-here"):
            sglang.Engine(model_path=str(tmp_path / "nothing-here"))


class TestOperations:
    def test_a_pause_keeps_requests_and_lets_them_go_on(self, engine: Any) -> None:
        expected = engine.generate(PROMPT, {**GREEDY, "max_new_tokens": 60})["text"]
        stream = engine.generate(PROMPT, {**GREEDY, "max_new_tokens": 60}, stream=True)
        next(stream)
        assert engine.pause_generation("retract")["success"]
        assert engine.flush_cache()["success"]
        waits = threading.Thread(target=engine.generate, args=("A", GREEDY))
        waits.start()
        waits.join(0.3)
        assert waits.is_alive()
        assert engine.continue_generation()["success"]
        assert list(stream)[-1]["text"] == expected
        waits.join(LIMIT_S)
        assert not waits.is_alive()

    def test_memory_is_given_back_and_returns(self, engine: Any) -> None:
        expected = engine.generate(PROMPT, GREEDY)["text"]
        [scheduler] = [
            process
            for process in map(psutil.Process, engine.get_all_child_pids())
            if "scheduler" in " ".join(process.cmdline())
        ]
        before = scheduler.memory_info().rss
        assert engine.release_memory_occupation()["success"]
        with pytest.raises(Exception, match="resume_memory_occupation"):
            engine.generate(PROMPT, GREEDY)
        weights = 135e6 * 4
        assert before - scheduler.memory_info().rss > 0.8 * weights
        assert not engine.continue_generation()["success"]
        assert engine.resume_memory_occupation()["success"]
        assert engine.generate(PROMPT, GREEDY)["text"] == expected

    def test_weights_of_another_checkpoint_answer_as_a_server_of_it(
        self, engine: Any, smollm2: Path, tmp_path: Path
    ) -> None:
        original = engine.generate(PROMPT, GREEDY)["text"]
        norm = engine.get_weights_by_name("model.norm.weight", 4)
        refused = engine.update_weights_from_disk(str(tmp_path / "absent"))
        assert not refused.success
        assert "absent" in refused.message
        random = engine.update_weights_from_disk(
            str(smollm2), load_format="dummy", weight_version="random"
        )
        assert random.success, random
        answer = engine.generate(PROMPT, GREEDY)
        assert answer["text"] != original
        assert answer["meta_info"]["weight_version"] == "random"
        assert answer["meta_info"]["cached_tokens"] == 0  # the old weights' cache is gone
        back = engine.update_weights_from_disk(str(smollm2), load_format="gguf")
        assert back.success, back
        assert engine.generate(PROMPT, GREEDY)["text"] == original
        assert engine.get_weights_by_name("model.norm.weight", 4) == norm

    def test_a_profile_shows_both_phases(self, engine: Any, tmp_path: Path) -> None:
        assert engine.start_profile(output_dir=str(tmp_path), activities=["CPU"])["success"]
        engine.generate("Once upon a time", GREEDY)
        trace = engine.stop_profile()
        assert trace["success"], trace
        with gzip.open(trace["path"]) as file:
            events = json.load(file)["traceEvents"]
        threads = {e["tid"] for e in events if e.get("name") == "aten::linear"}
        assert len(threads) >= 2  # a lane of each phase

    def test_information(self, engine: Any, smollm2: Path) -> None:
        info = engine.get_server_info()
        assert info["model_path"] == str(smollm2)
        assert info["max_total_num_tokens"] == 8192
        assert engine.freeze_gc()["success"]
