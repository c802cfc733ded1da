"""TokenizerManager over real sockets: answers, aborts, failures."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

import pytest

from sglang.srt.errors import Overloaded, RequestError
from sglang.srt.managers.answers import Answer
from sglang.srt.managers.call import EngineFailed
from sglang.srt.managers.prompts import Prompt, TokenizedPrompt
from sglang.srt.managers.request_log import RequestLog
from sglang.srt.managers.tokenizer_manager import TokenizerManager
from sglang.srt.messages import FinishReason
from sglang.srt.sampling_params import SamplingParams


def prompt(text: str = "Hi", **sampling: Any) -> Prompt:
    return Prompt(SamplingParams(**sampling), text=text)


async def texts(manager: TokenizerManager, prompts: list[Prompt], **options: Any) -> dict[int, str]:
    found = {}
    async for update in manager.generate(prompts, **options):
        found[update.answer.index] = update.answer.text
    return found


async def until(condition: Callable[[], bool]) -> None:
    """Polls; the caller's timeout is the limit."""
    while not condition():
        await asyncio.sleep(0.002)


async def exhaust(stream: AsyncIterator[Any]) -> None:
    async for _ in stream:
        pass


def run(
    manager_for: Any, body: Callable[[TokenizerManager], Awaitable[None]], **limits: Any
) -> None:
    async def main() -> None:
        async with manager_for(**limits) as manager:
            await body(manager)
            assert manager.in_flight == 0

    asyncio.run(main())


def test_streams_increments_that_add_up(engine: Any, manager_for: Any) -> None:
    engine.says("Streams are made of pieces 👍 indeed")

    async def body(manager: TokenizerManager) -> None:
        pieces, ids = [], []
        async for update in manager.generate([prompt()]):
            pieces.append(update.new_text)
            ids += update.new_ids
        answer = update.answer
        assert "".join(pieces) == answer.text == "Streams are made of pieces 👍 indeed"
        assert ids == answer.output_ids
        assert answer.finish == FinishReason(type="stop", matched=engine.tokenizer.eos_token_id)
        assert answer.completion_tokens == len(ids)
        assert answer.prompt_tokens == len(engine.tokenizer("Hi")["input_ids"])
        assert answer.e2e_latency_s is not None
        assert answer.e2e_latency_s > 0

    run(manager_for, body)


def test_without_streaming_each_answer_comes_once_and_whole(engine: Any, manager_for: Any) -> None:
    engine.says("a whole sentence of words")

    async def body(manager: TokenizerManager) -> None:
        seen = [u async for u in manager.generate([prompt(), prompt()], stream=False)]
        assert sorted(u.answer.index for u in seen) == [0, 1]
        assert {u.new_text for u in seen} == {"a whole sentence of words"}

    run(manager_for, body)


def test_several_answers_are_numbered_prompt_by_prompt(engine: Any, manager_for: Any) -> None:
    engine.scheduler.script = lambda request: [*request.input_ids]

    async def body(manager: TokenizerManager) -> None:
        prompts = [prompt("first", n=2, sampling_seed=7), prompt("second", n=3)]
        found = await texts(manager, prompts, rid="job")
        assert found == {0: "first", 1: "first", 2: "second", 3: "second", 4: "second"}
        seeds = [r.sampling.sampling_seed for r in engine.scheduler.received]
        assert seeds == [7, 8, None, None, None]
        names = [r.rid.partition(":")[2] for r in engine.scheduler.received]
        assert names == [f"job_{i}" for i in range(5)]

    run(manager_for, body)


def test_largest_seed_wraps(engine: Any, manager_for: Any) -> None:
    async def body(manager: TokenizerManager) -> None:
        await texts(manager, [prompt(n=2, sampling_seed=2**63 - 1, max_new_tokens=1)])
        seeds = [r.sampling.sampling_seed for r in engine.scheduler.received]
        assert seeds == [2**63 - 1, -(2**63)]

    run(manager_for, body)


def test_an_rid_in_flight_is_refused_and_free_afterwards(engine: Any, manager_for: Any) -> None:
    engine.says_forever("on and on ")

    async def body(manager: TokenizerManager) -> None:
        async with aclosing(manager.generate([prompt(max_new_tokens=None)], rid="mine")) as stream:
            await anext(stream)
            with pytest.raises(RequestError, match="in use") as caught:
                await texts(manager, [prompt()], rid="mine")
            assert caught.value.field == "rid"
        engine.says("done")
        assert await texts(manager, [prompt()], rid="mine") == {0: "done"}

    run(manager_for, body)


def test_leaving_early_aborts_only_ones_own(engine: Any, manager_for: Any) -> None:
    engine.says_forever("on and on ")

    async def body(manager: TokenizerManager) -> None:
        other = manager.generate([prompt(max_new_tokens=None)], rid="10")
        await anext(other)
        async with aclosing(manager.generate([prompt(max_new_tokens=None)], rid="1")) as stream:
            await anext(stream)
        await until(lambda: len(engine.scheduler.aborted) == 1)
        assert engine.scheduler.aborted[0].endswith(":1")
        for _ in range(3):  # goes on
            assert (await anext(other)).answer.finish is None
        await other.aclose()

    run(manager_for, body)


def test_cancelling_the_reader_of_a_stream_aborts(engine: Any, manager_for: Any) -> None:
    engine.says_forever("on and on ")

    async def body(manager: TokenizerManager) -> None:
        task = asyncio.create_task(texts(manager, [prompt(max_new_tokens=None)] * 2))
        await until(lambda: len(engine.scheduler.received) == 2)
        task.cancel()
        await until(lambda: len(engine.scheduler.aborted) == 2)

    run(manager_for, body)


@pytest.mark.parametrize(
    ("rid", "abort_all", "ended"),
    [
        ("job", False, ["job-1", "job-2"]),
        ("job-1", False, ["job-1"]),
        ("", False, []),
        ("", True, 3),
    ],
)
def test_abort_by_prefix(
    engine: Any, manager_for: Any, rid: str, abort_all: bool, ended: list[str] | int
) -> None:
    engine.says_forever("on and on ")

    async def body(manager: TokenizerManager) -> None:
        finished: list[str] = []

        async def follow(name: str) -> None:
            async for update in manager.generate([prompt(max_new_tokens=None)], rid=name):
                if update.answer.finish is not None:
                    assert update.answer.finish.type == "abort"
                    finished.append(name)

        tasks = [asyncio.create_task(follow(name)) for name in ("job-1", "job-2", "other")]
        await until(lambda: len(engine.scheduler.received) == 3)
        manager.abort(rid, abort_all)
        expected = ["job-1", "job-2", "other"] if isinstance(ended, int) else ended
        await until(lambda: len(finished) >= len(expected))
        assert sorted(finished) == expected
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    run(manager_for, body)


def test_stop_string_ends_the_answer_and_the_request(engine: Any, manager_for: Any) -> None:
    engine.says_forever("tick tock ")

    async def body(manager: TokenizerManager) -> None:
        last = None
        async for update in manager.generate([prompt(max_new_tokens=None, stop=["ck t", "zz"])]):
            last = update.answer
        assert last is not None
        assert last.text == "ti"
        assert last.finish == FinishReason(type="stop", matched="ck t")
        await until(lambda: len(engine.scheduler.stopped) == 1)

    run(manager_for, body)


def test_failure_reaches_everyone_and_stays(engine: Any, manager_for: Any) -> None:
    engine.says_forever("on and on ")

    async def body(manager: TokenizerManager) -> None:
        stream = manager.generate([prompt(max_new_tokens=None)])
        await anext(stream)
        manager.fail_all("the engine is gone")
        with pytest.raises(EngineFailed, match="gone"):
            await exhaust(stream)
        with pytest.raises(EngineFailed, match="gone"):
            await texts(manager, [prompt()])
        with pytest.raises(EngineFailed, match="gone"):
            await manager.engine_state()

    run(manager_for, body)


def test_draining_finishes_what_is_in_flight(engine: Any, manager_for: Any) -> None:
    engine.says("the last words")

    async def body(manager: TokenizerManager) -> None:
        task = asyncio.create_task(texts(manager, [prompt()]))
        await until(lambda: manager.in_flight == 1)
        manager.stop_accepting()
        with pytest.raises(Overloaded):
            await texts(manager, [prompt()])
        await manager.drained()
        assert await task == {0: "the last words"}

    run(manager_for, body)


def test_control_calls(engine: Any, manager_for: Any) -> None:
    async def body(manager: TokenizerManager) -> None:
        state, flushed = await asyncio.gather(manager.engine_state(), manager.flush_cache(0))
        assert state.data["running_requests"] == 0
        assert flushed.ok
        assert await manager.probe(5)

    run(manager_for, body)


def test_a_silent_engine_is_given_up(engine: Any, manager_for: Any) -> None:
    engine.scheduler._handle = lambda message: None

    async def body(manager: TokenizerManager) -> None:
        assert not await manager.probe(0.05)
        with pytest.raises(TimeoutError):
            await manager.engine_state(0.05)

    run(manager_for, body)


def test_a_request_may_be_left_out_of_the_log(
    manager_for: Any, caplog: pytest.LogCaptureFixture
) -> None:
    async def body(manager: TokenizerManager) -> None:
        for rid, logged in (("kept", True), ("secret", False)):
            await texts(manager, [prompt(max_new_tokens=1)], rid=rid, logged=logged)

    with caplog.at_level("INFO"):
        run(manager_for, body, log=RequestLog(0))
    assert "kept" in caplog.text
    assert "secret" not in caplog.text


def test_request_log(tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    tokenized = TokenizedPrompt([1, 2], SamplingParams(), "")
    answer = Answer(0, "job", "job", "00000001:job", tokenized, started_s=0.0)
    with caplog.at_level("INFO"):
        for level in range(4):
            log = RequestLog(level)
            log.received(["job"], [prompt("secret " + "x" * 3000)])
            log.finished(answer)
    received = [r.getMessage() for r in caplog.records if r.getMessage().startswith("Receive")]
    assert all("job" in line for line in received)
    assert ["sampling=" in line for line in received] == [False, True, True, True]
    assert ["secret" in line for line in received] == [False, False, True, True]
    assert ["x" * 3000 in line for line in received] == [False, False, False, True]
