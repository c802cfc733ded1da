"""The HTTP surface, over TCP, with a scripted engine behind it."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable
from typing import Any

import httpx
import openai
import pytest

from sglang.srt.entrypoints.server_state import Phase
from sglang.srt.managers.scripted_scheduler import scripted_logprob
from sglang.srt.messages import FinishReason

TEXT = "Hello there, General Kenobi!"
LIMIT_S = 20.0


def events(response: httpx.Response) -> list[Any]:
    """The payloads of a stream, which must end in [DONE]."""
    assert response.headers["content-type"].startswith("text/event-stream")
    parts = response.text.split("\n\n")
    assert parts[-2:] == ["data: [DONE]", ""]
    return [json.loads(part.removeprefix("data: ")) for part in parts[:-2]]


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.002)


class TestGenerate:
    def test_single(self, server: Any) -> None:
        body = {"text": "Hi", "sampling_params": {"temperature": 0}, "rid": "me"}
        result = server.client.post("/generate", json=body).json()
        info = result["meta_info"]
        assert result["text"] == TEXT
        assert info.pop("e2e_latency") > 0
        eos = server.engine.tokenizer.eos_token_id
        assert result["output_ids"][-1] == eos
        assert info == {
            "id": "me",
            "finish_reason": {"type": "stop", "matched": eos},
            "prompt_tokens": 1,
            "completion_tokens": len(result["output_ids"]),
            "cached_tokens": 0,
            "reasoning_tokens": 0,
            "num_retractions": 0,
            "weight_version": "default",
            "dp_rank": None,
        }

    def test_log_probabilities_have_the_shapes_of_the_contract(self, server: Any) -> None:
        tokenizer = server.engine.tokenizer
        prompt = [5, 6, 7, 8]
        body = {
            "input_ids": prompt,
            "sampling_params": {"max_new_tokens": 2},
            "return_logprob": True,
            "logprob_start_len": 1,
            "top_logprobs_num": 2,
            "token_ids_logprob": [40, 30],
            "return_text_in_logprobs": True,
        }
        result = server.client.post("/generate", json=body).json()
        info, output = result["meta_info"], result["output_ids"]

        def triple(token: int) -> list[Any]:
            return [scripted_logprob(token), token, tokenizer.decode([token])]

        top, listed = [triple(0), triple(1)], [triple(40), triple(30)]
        assert info["input_token_logprobs"] == [
            [None, 6, tokenizer.decode([6])],
            triple(7),
            triple(8),
        ]
        assert info["output_token_logprobs"] == [triple(token) for token in output]
        assert info["output_token_logprobs_length"] == 2
        assert info["input_top_logprobs"] == [None, top, top]
        assert info["output_top_logprobs"] == [top, top]
        assert info["input_token_ids_logprobs"] == [None, listed, listed]
        assert info["output_token_ids_logprobs"] == [listed, listed]

    def test_log_probabilities_of_each_prompt_are_its_own(self, server: Any) -> None:
        body = {
            "input_ids": [[5, 6], [5, 6], [9]],
            "sampling_params": {"max_new_tokens": 1},
            "return_logprob": [True, False, True],
            "logprob_start_len": [0, 0, -1],
            "top_logprobs_num": [0, 3, 1],
            "token_ids_logprob": [[], [1], [2]],
        }
        infos = [r["meta_info"] for r in server.client.post("/generate", json=body).json()]
        assert infos[0]["input_token_logprobs"] == [[None, 5, None], [scripted_logprob(6), 6, None]]
        assert not any("top_logprobs" in name or "token_ids" in name for name in infos[0])
        assert not any("logprobs" in name for name in infos[1])
        assert infos[2]["input_token_logprobs"] == infos[2]["input_top_logprobs"] == []
        assert infos[2]["output_top_logprobs"] == [[[scripted_logprob(0), 0, None]]]
        assert infos[2]["output_token_ids_logprobs"] == [[[scripted_logprob(2), 2, None]]]

    @pytest.mark.parametrize("incremental", [False, True])
    def test_streamed_log_probabilities_follow_the_ids(self, serve: Any, incremental: bool) -> None:
        with serve(incremental_streaming_output=incremental) as server:
            body = {
                "input_ids": [5, 6, 7],
                "sampling_params": {"max_new_tokens": 30},
                "return_logprob": True,
                "logprob_start_len": 0,
                "stream": True,
            }
            server.engine.says_forever("one two three four five")
            parts = events(server.client.post("/generate", json=body))
        assert len(parts) > 1
        prompts = []
        for part in parts:
            info = part["meta_info"]
            ids = [token for _, token, _ in info["output_token_logprobs"]]
            assert ids == part["output_ids"]
            prompts.append([token for _, token, _ in info["input_token_logprobs"]])
        rest = [] if incremental else [5, 6, 7]
        assert prompts == [[5, 6, 7], *[rest] * (len(parts) - 1)]
        assert parts[-1]["meta_info"]["output_token_logprobs_length"] == 30

    def test_log_probabilities_end_where_a_stop_string_does(self, server: Any) -> None:
        body = {
            "text": "Hi",
            "sampling_params": {"stop": ["there"]},
            "return_logprob": True,
        }
        result = server.client.post("/generate", json=body).json()
        assert result["meta_info"]["finish_reason"] == {"type": "stop", "matched": "there"}
        logprobs = result["meta_info"]["output_token_logprobs"]
        assert [token for _, token, _ in logprobs] == result["output_ids"]

    def test_a_stop_pattern_ends_the_text_where_it_matches(self, server: Any) -> None:
        sampling = {"stop_regex": [r"K\w+bi", r"G[a-z]{3}r"]}
        body = {"text": "Hi", "sampling_params": sampling}
        result = server.client.post("/generate", json=body).json()
        assert result["text"] == "Hello there, "
        assert result["meta_info"]["finish_reason"] == {"type": "stop", "matched": r"G[a-z]{3}r"}
        body["sampling_params"] = {**sampling, "no_stop_trim": True}
        result = server.client.post("/generate", json=body).json()
        assert result["text"] == "Hello there, Gener"

    @pytest.mark.parametrize("background", [False, True])
    def test_a_client_that_leaves_ends_its_request_unless_in_the_background(
        self, server: Any, background: bool
    ) -> None:
        server.engine.says_forever("word after word")
        body = {
            "text": "Hi",
            "sampling_params": {"max_new_tokens": 500},
            "background": background,
            "no_logs": True,
            "stream": True,
            "rid": "left",
        }
        with server.client.stream("POST", "/generate", json=body) as response:
            assert response.status_code == 200, response.read()
            next(response.iter_lines())
        if background:
            server.client.post("/generate", json={"text": "Hi", "sampling_params": {"n": 2}})
            assert server.state.manager.in_flight == 1
            assert not server.engine.scheduler.aborted
            server.client.post("/abort_request", json={"rid": "left"})
        until(lambda: server.engine.scheduler.aborted)
        until(lambda: server.state.manager.in_flight == 0)

    @pytest.mark.parametrize("flipped", [False, True])
    def test_a_priority_becomes_a_rank(self, serve: Any, flipped: bool) -> None:
        flags = {"schedule_low_priority_values_first": flipped}
        ranks = []
        with serve(enable_priority_scheduling=True, **flags) as served:
            for priority in (7, -2, None):
                body = {"text": "Hi", "sampling_params": {"max_new_tokens": 1}}
                body["priority"] = priority
                served.client.post("/generate", json=body).raise_for_status()
                ranks.append(served.engine.last_request.rank)
        assert ranks[:2] == ([7, -2] if flipped else [-7, 2])
        assert ranks[2] > max(ranks[:2])

    def test_put_and_ids_and_length(self, server: Any) -> None:
        body = {"input_ids": [5, 6, 7], "sampling_params": {"max_new_tokens": 2}}
        result = server.client.put("/generate", json=body).json()
        assert result["meta_info"]["finish_reason"] == {"type": "length", "length": 2}
        assert server.engine.last_request.input_ids.tolist() == [5, 6, 7]

    def test_prefill_only(self, server: Any) -> None:
        body = {"text": "Hi", "sampling_params": {"max_new_tokens": 0}}
        result = server.client.post("/generate", json=body).json()
        assert result["text"] == ""
        assert result["output_ids"] == []

    def test_batch_and_n(self, server: Any) -> None:
        server.engine.scheduler.script = lambda request: request.input_ids.tolist()
        body = {
            "text": ["one", "two"],
            "sampling_params": {"n": 2, "temperature": 1},
            "rid": "batch",
            "return_prompt_token_ids": True,
        }
        results = server.client.post("/generate", json=body).json()
        assert [r["text"] for r in results] == ["one", "one", "two", "two"]
        assert [r["meta_info"]["id"] for r in results] == [f"batch_{i}" for i in range(4)]
        assert results[0]["prompt_token_ids"] == results[0]["output_ids"]

    def test_batch_of_one_is_a_list(self, server: Any) -> None:
        assert len(server.client.post("/generate", json={"text": ["one"]}).json()) == 1

    def test_sampling_params_for_each(self, server: Any) -> None:
        body = {
            "input_ids": [[1], [2]],
            "sampling_params": [{"max_new_tokens": 1}, {"max_new_tokens": 2}],
            "extra_key": ["a", "b"],
        }
        results = server.client.post("/generate", json=body).json()
        assert [r["meta_info"]["completion_tokens"] for r in results] == [1, 2]
        first, second = server.engine.scheduler.received
        assert first.namespace != second.namespace

    def test_stream_is_cumulative(self, server: Any) -> None:
        body = {"text": "Hi", "stream": True}
        got = events(server.client.post("/generate", json=body))
        for before, after in itertools.pairwise(got):
            assert after["text"].startswith(before["text"])
            assert after["output_ids"][: len(before["output_ids"])] == before["output_ids"]
            assert before["meta_info"]["finish_reason"] is None
        assert got[-1]["text"] == TEXT
        assert got[-1]["meta_info"]["finish_reason"]["type"] == "stop"
        assert "index" not in got[0]

    def test_incremental_stream(self, serve: Any) -> None:
        with serve(incremental_streaming_output=True) as served:
            served.engine.says(TEXT)
            got = events(served.client.post("/generate", json={"text": "Hi", "stream": True}))
        assert "".join(e["text"] for e in got) == TEXT
        ids = [token for e in got for token in e["output_ids"]]
        assert len(ids) == got[-1]["meta_info"]["completion_tokens"]

    def test_batch_stream_has_indices(self, server: Any) -> None:
        body = {"text": ["a", "b"], "stream": True}
        got = events(server.client.post("/generate", json=body))
        last = {e["index"]: e for e in got}
        assert {i: e["text"] for i, e in last.items()} == {0: TEXT, 1: TEXT}

    @pytest.mark.parametrize("stream", [False, True])
    def test_full_queue_is_503(self, server: Any, stream: bool) -> None:
        server.engine.refuses(FinishReason(type="abort", message="queue full", status_code=503))
        response = server.client.post("/generate", json={"text": "Hi", "stream": stream})
        assert response.status_code == 503
        assert response.json() == {
            "object": "error",
            "message": "queue full",
            "type": "503",
            "param": None,
            "code": 503,
        }

    def test_neutral_fields_of_clients_are_accepted(self, server: Any) -> None:
        """What the benchmark and the frontend language always send."""
        body = {
            "text": "Hi",
            "sampling_params": {
                "stop": [],
                "stop_token_ids": [],
                "stop_regex": [],
                "regex": None,
                "json_schema": None,
                "frequency_penalty": 0.0,
                "presence_penalty": 0.0,
                "top_k": -1,
                "max_new_tokens": 4,
            },
            "stream": False,
            "lora_path": None,
            "image_data": None,
            "return_logprob": False,
            "return_text_in_logprobs": True,
            "logprob_start_len": -1,
            "top_logprobs_num": 0,
            "return_routed_experts": False,
            "no_logs": True,
        }
        assert server.client.post("/generate", json=body).status_code == 200

    def test_preferred_sampling_params(self, serve: Any) -> None:
        with serve(preferred_sampling_params={"max_new_tokens": 3, "top_k": 5}) as served:
            body = {"text": "Hi", "sampling_params": {"top_k": 7}}
            served.client.post("/generate", json=body)
            sampling = served.engine.last_request.sampling
        assert (sampling.max_new_tokens, sampling.top_k) == (3, 7)

    def test_without_tokenizer(self, serve: Any) -> None:
        with serve(skip_tokenizer_init=True, skip_tokenizer=True) as served:
            body = {"input_ids": [1, 2], "sampling_params": {"max_new_tokens": 2}}
            result = served.client.post("/generate", json=body).json()
            assert result["output_ids"] == [100, 101]
            assert "text" not in result
            refused = served.client.post("/generate", json={"text": "Hi"})
            assert refused.status_code == 400
            assert "--skip-tokenizer-init" in refused.json()["error"]["message"]


class TestDisconnect:
    @pytest.mark.parametrize("stream", [False, True])
    @pytest.mark.parametrize(
        ("path", "body"),
        [
            ("/generate", {"text": "Hi", "sampling_params": {"max_new_tokens": None}}),
            ("/v1/completions", {"prompt": "Hi", "max_tokens": 500}),
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}]}),
        ],
    )
    def test_request_is_aborted(
        self, server: Any, path: str, body: dict[str, Any], stream: bool
    ) -> None:
        server.engine.says_forever("on and on ", token_interval_s=0.02)
        body = {**body, "stream": stream}
        with httpx.Client(base_url=server.url, verify=False) as client:
            if stream:
                with client.stream("POST", path, json=body) as response:
                    lines = response.iter_lines()  # kept: dropping it would close the response
                    next(lines)
            else:
                with pytest.raises(httpx.ReadTimeout):
                    client.post(path, json=body, timeout=0.15)
        until(lambda: len(server.engine.scheduler.aborted) == 1)


class TestCompletions:
    def post(self, server: Any, **body: Any) -> Any:
        response = server.client.post("/v1/completions", json={"prompt": "Hi", **body})
        assert response.status_code == 200, response.text
        return events(response) if body.get("stream") else response.json()

    def test_plain(self, server: Any) -> None:
        got = self.post(server, rid="me", user="someone")
        assert got["id"] == "me"
        assert got["object"] == "text_completion"
        assert got["model"] == "smollm2"
        [choice] = got["choices"]
        assert choice["text"] == TEXT
        assert choice["finish_reason"] == "stop"
        assert choice["matched_stop"] == server.engine.tokenizer.eos_token_id
        usage = got["usage"]
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
        assert usage["prompt_tokens_details"] is None

    def test_default_is_16_tokens(self, server: Any) -> None:
        server.engine.says_forever("word ", token_interval_s=0)
        got = self.post(server)
        assert got["usage"]["completion_tokens"] == 16
        assert got["choices"][0]["finish_reason"] == "length"

    @pytest.mark.parametrize(
        ("prompt", "count"), [("a", 1), (["a", "b"], 2), ([65, 66], 1), ([[65], [66], [67]], 3)]
    )
    def test_prompt_forms_echo_and_n(self, server: Any, prompt: Any, count: int) -> None:
        got = self.post(server, prompt=prompt, echo=True, n=2, temperature=0.5)
        decode = server.engine.tokenizer.decode
        shown = [decode(r.input_ids) + TEXT for r in server.engine.scheduler.received]
        assert [c["text"] for c in got["choices"]] == shown
        assert [c["index"] for c in got["choices"]] == list(range(2 * count))
        asked = sum(len(r.input_ids) for r in server.engine.scheduler.received)
        assert got["usage"]["prompt_tokens"] == asked / 2

    def test_stream(self, server: Any) -> None:
        got = self.post(
            server, stream=True, echo=True, stream_options={"include_usage": True}, prompt="Say: "
        )
        *chunks, usage = got
        assert "".join(c["choices"][0]["text"] for c in chunks) == "Say: " + TEXT
        assert [c["choices"][0]["finish_reason"] for c in chunks] == [None] * (len(chunks) - 1) + [
            "stop"
        ]
        assert usage["choices"] == []
        assert usage["usage"]["completion_tokens"] > 1
        assert len({c["id"] for c in got}) == 1

    def test_continuous_usage(self, server: Any) -> None:
        server.engine.scheduler.token_interval_s = 0.05  # else all tokens may come in one update
        got = self.post(server, stream=True, stream_options={"continuous_usage_stats": True})
        counts = [c["usage"]["completion_tokens"] for c in got]
        assert counts == sorted(counts)
        assert counts[-1] > counts[0]

    def test_stop_string(self, server: Any) -> None:
        got = self.post(server, stop=", Gen")
        assert got["choices"][0]["text"] == "Hello there"
        assert got["choices"][0]["matched_stop"] == ", Gen"

    def test_usage_flags(self, serve: Any) -> None:
        with serve(enable_cache_report=True, stream_response_default_include_usage=True) as served:
            got = self.post(served, stream=True)
            assert got[-1]["usage"]["prompt_tokens_details"] == {"cached_tokens": 0}
            quiet = self.post(served, stream=True, stream_options={"include_usage": False})
            assert quiet[-1]["choices"]

    def test_engine_error_inside_a_stream(self, server: Any) -> None:
        full = FinishReason(type="abort", message="out of memory", status_code=503)
        server.engine.scheduler.script = lambda request: [100, 101, full]
        server.engine.scheduler.token_interval_s = 0.05
        got = self.post(server, stream=True)
        assert got[-1]["error"]["code"] == 503
        assert got[-1]["error"]["message"] == "out of memory"


class TestChat:
    MESSAGES = ({"role": "user", "content": "Hi"},)

    def post(self, server: Any, **body: Any) -> Any:
        full = {"messages": list(self.MESSAGES), **body}
        response = server.client.post("/v1/chat/completions", json=full)
        assert response.status_code == 200, response.text
        return events(response) if body.get("stream") else response.json()

    def prompt_of(self, server: Any) -> str:
        text: str = server.engine.tokenizer.decode(server.engine.last_request.input_ids)
        return text

    def test_plain(self, server: Any) -> None:
        got = self.post(server)
        [choice] = got["choices"]
        assert got["object"] == "chat.completion"
        assert choice["message"]["role"] == "assistant"
        assert choice["message"]["content"] == TEXT
        assert choice["finish_reason"] == "stop"
        prompt = self.prompt_of(server)
        assert prompt.startswith("<|im_start|>system\n")
        assert prompt.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")

    def test_answer_may_fill_the_context(self, server: Any) -> None:
        self.post(server)
        request = server.engine.last_request
        assert request.sampling.max_new_tokens == 512 - len(request.input_ids)

    @pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
    def test_limit(self, server: Any, name: str) -> None:
        assert self.post(server, **{name: 2})["usage"]["completion_tokens"] == 2

    def test_model_defaults_give_way_to_the_request(self, server: Any) -> None:
        self.post(server)
        assert server.engine.last_request.sampling.temperature == 0.25
        self.post(server, temperature=0.75)
        assert server.engine.last_request.sampling.temperature == 0.75

    def test_openai_sampling_defaults(self, serve: Any) -> None:
        with serve(sampling_defaults="openai") as served:
            self.post(served, max_tokens=1)
            assert served.engine.last_request.sampling.temperature == 1.0

    def test_text_parts_and_continuation(self, server: Any) -> None:
        parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
        messages = [
            {"role": "user", "content": parts},
            {"role": "assistant", "content": "The answer"},
        ]
        self.post(server, messages=messages, continue_final_message=True)
        prompt = self.prompt_of(server)
        assert "user\none two<|im_end|>" in prompt
        assert prompt.endswith("assistant\nThe answer")

    def test_stream_of_two(self, server: Any) -> None:
        got = self.post(server, stream=True, n=2, stream_options={"include_usage": True})
        *chunks, usage = got
        for index in (0, 1):
            mine = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == index]
            assert mine[0]["delta"] == {"role": "assistant", "content": ""}
            assert "".join(c["delta"].get("content") or "" for c in mine) == TEXT
            assert mine[-1]["finish_reason"] == "stop"
            assert all(c["finish_reason"] is None for c in mine[:-1])
        assert usage["usage"]["prompt_tokens"] == len(server.engine.last_request.input_ids)
        assert {c["object"] for c in got} == {"chat.completion.chunk"}

    def test_neutral_fields(self, server: Any) -> None:
        self.post(
            server,
            tools=[],
            tool_choice="auto",
            parallel_tool_calls=True,
            response_format={"type": "text"},
            logprobs=False,
            frequency_penalty=0,
            metadata={"a": "b"},
            store=True,
            user="me",
        )


def test_official_client(server: Any) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=LIMIT_S)
    assert [m.id for m in client.models.list()] == ["smollm2"]
    assert client.models.retrieve("smollm2").id == "smollm2"
    messages: Any = [{"role": "user", "content": "Hi"}]
    chat = client.chat.completions.create(model="smollm2", messages=messages)
    assert chat.choices[0].message.content == TEXT
    with client.chat.completions.create(model="smollm2", messages=messages, stream=True) as stream:
        assert "".join(c.choices[0].delta.content or "" for c in stream) == TEXT
    completion = client.completions.create(model="smollm2", prompt="Hi", max_tokens=30)
    assert completion.choices[0].text == TEXT
    other = client.chat.completions.create(model="gpt-9", messages=messages)
    assert (other.model, other.choices[0].message.content) == ("gpt-9", TEXT)
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("gpt-9")
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.chat.completions.create(model="smollm2", messages=messages, temperature=-1)
    assert client.chat.completions.create(model="default", messages=messages).model == "default"


class TestOperations:
    def test_health(self, server: Any) -> None:
        for path in ("/health", "/health_generate", "/ready", "/ping"):
            assert server.client.get(path).status_code == 200
        assert server.engine.last_request.sampling.max_new_tokens == 1

    @pytest.mark.parametrize("phase", [Phase.STARTING, Phase.STOPPING])
    def test_unhealthy_unless_serving(self, serve: Any, phase: Phase) -> None:
        with serve() as served:
            served.state.phase = phase
            for path in ("/health", "/health_generate", "/ready", "/ping"):
                assert served.client.get(path).status_code == 503

    def test_failed_engine(self, serve: Any) -> None:
        with serve() as served:
            served.call(served.state.manager.fail_all, "the scheduler died")
            assert served.client.get("/health").status_code == 503
            response = served.client.post("/generate", json={"text": "Hi"})
            assert response.status_code == 500
            assert response.json()["message"] == "the scheduler died"

    def test_engine_failure_inside_a_stream(self, serve: Any) -> None:
        with serve() as served:
            served.engine.says_forever("on ")
            body = {"text": "Hi", "stream": True, "sampling_params": {"max_new_tokens": None}}
            with served.client.stream("POST", "/generate", json=body) as response:
                lines = response.iter_lines()
                next(lines)
                served.call(served.state.manager.fail_all, "the scheduler died")
                rest = [line for line in lines if line]
            assert json.loads(rest[-2].removeprefix("data: ")) == {
                "error": {
                    "message": "the scheduler died",
                    "type": "internal_server_error",
                    "code": 500,
                    "retryable": False,
                }
            }
            assert rest[-1] == "data: [DONE]"

    def test_draining_refuses_with_503(self, serve: Any) -> None:
        with serve() as served:
            served.call(served.state.manager.stop_accepting)
            for path, body in (("/generate", {"text": "a"}), ("/v1/completions", {"prompt": "a"})):
                response = served.client.post(path, json=body)
                assert response.status_code == 503
                assert response.json()["object"] == "error"

    @pytest.mark.parametrize("path", ["/model_info", "/get_model_info"])
    def test_model_info(self, server: Any, path: str) -> None:
        info = server.client.get(path).json()
        assert info["model_path"] == "smollm2"
        assert info["is_generation"] is True
        assert info["architectures"] == ["LlamaForCausalLM"]

    @pytest.mark.parametrize("path", ["/server_info", "/get_server_info"])
    def test_server_info_keeps_secrets(self, serve: Any, path: str) -> None:
        with serve(api_key="hush") as served:
            info = served.client.get(path, headers={"authorization": "Bearer hush"})
        assert "hush" not in info.text
        [internal] = info.json()["internal_states"]
        assert internal["running_requests"] == 0
        assert info.json()["max_total_num_tokens"] == 1000
        assert info.json()["port"] == 30000

    def test_flush_cache(self, server: Any) -> None:
        assert server.client.get("/flush_cache").status_code == 200
        assert server.client.post("/flush_cache?timeout=1").text.startswith("Cache flushed")
        server.engine.says_forever("on ")
        body = {"text": "Hi", "stream": True, "sampling_params": {"max_new_tokens": None}}
        with server.client.stream("POST", "/generate", json=body) as response:
            lines = response.iter_lines()  # kept: dropping it would close the response
            next(lines)
            with httpx.Client(base_url=server.url, verify=False, timeout=LIMIT_S) as other:
                busy = other.post("/flush_cache")
        assert busy.status_code == 400
        assert "not flushed" in busy.text
        until(lambda: server.state.manager.in_flight == 0)

    def test_abort_request(self, server: Any) -> None:
        server.engine.says_forever("on ")
        body = {
            "text": "Hi",
            "rid": "long-1",
            "stream": True,
            "sampling_params": {"max_new_tokens": None},
        }
        with server.client.stream("POST", "/generate", json=body) as response:
            lines = response.iter_lines()
            next(lines)
            with httpx.Client(base_url=server.url, verify=False, timeout=LIMIT_S) as other:
                assert other.post("/abort_request", json={"rid": "long"}).status_code == 200
            rest = [line for line in lines if line]
        last = json.loads(rest[-2].removeprefix("data: "))
        assert last["meta_info"]["finish_reason"]["type"] == "abort"

    def test_tokenize_and_back(self, server: Any) -> None:
        for root in ("", "/v1"):
            got = server.client.post(f"{root}/tokenize", json={"prompt": "Zürich 👍"}).json()
            assert got["count"] == len(got["tokens"])
            assert got["max_model_len"] == 512
            back = server.client.post(f"{root}/detokenize", json={"tokens": got["tokens"]})
            assert back.json() == {"text": "Zürich 👍"}
        many = server.client.post("/tokenize", json={"prompt": ["a", "b c"]}).json()
        assert many["count"] == [len(row) for row in many["tokens"]]
        texts = server.client.post("/detokenize", json={"tokens": many["tokens"]}).json()
        assert texts == {"text": ["a", "b c"]}
        body = {"messages": [{"role": "user", "content": "Hi"}]}
        chat = server.client.post("/tokenize", json=body).json()
        assert server.engine.tokenizer.decode(chat["tokens"]).endswith("assistant\n")

    def test_root_and_cors(self, server: Any) -> None:
        response = server.client.get("/", headers={"origin": "http://elsewhere"})
        assert "running" in response.text
        assert response.headers["access-control-allow-origin"] == "*"


class TestMetrics:
    def test_served_where_asked_for_and_open_to_scrapers(self, serve: Any) -> None:
        with serve(enable_metrics=True, api_key="secret") as served:
            served.engine.says(TEXT)
            body = {"text": "Hi"}
            headers = {"authorization": "Bearer secret"}
            result = served.client.post("/generate", json=body, headers=headers).json()
            assert served.client.get("/health").status_code == 200
            scraped = served.client.get("/metrics")
        assert scraped.headers["content-type"].startswith("text/plain; version=")
        count = result["meta_info"]["completion_tokens"]
        lines = scraped.text.splitlines()
        assert 'sglang:num_requests_total{model_name="smollm2"} 1.0' in lines
        assert f'sglang:generation_tokens_total{{model_name="smollm2"}} {float(count)}' in lines
        assert 'sglang:max_total_num_tokens{model_name="smollm2"} 1000.0' in lines

    def test_requests_are_counted_by_route_and_answer(self, serve: Any) -> None:
        with serve(enable_metrics=True) as served:
            served.engine.says_forever("on ")
            served.client.get("/v1/models/some/name")
            served.client.get("/no/such/path")
            served.client.post("/generate", json={})
            body = {"text": "Hi", "stream": True, "sampling_params": {"max_new_tokens": None}}
            with served.client.stream("POST", "/generate", json=body) as response:
                stream = response.iter_lines()  # kept: its end would end the request
                next(stream)
                scraped = served.client.get("/metrics").text
            until(lambda: served.state.manager.in_flight == 0)
        lines = scraped.replace(',model_name="smollm2"', "").splitlines()
        model = "/v1/models/{model_id:path}"
        for line in (
            f'responses_total{{endpoint="{model}",method="GET",status_code="404"}} 1.0',
            'responses_total{endpoint="Unknown",method="GET",status_code="404"} 1.0',
            'responses_total{endpoint="/generate",method="POST",status_code="400"} 1.0',
            'responses_total{endpoint="/generate",method="POST",status_code="200"} 1.0',
            'requests_total{endpoint="/generate",method="POST"} 2.0',
            'requests_active{method="POST"} 1.0',
        ):
            assert f"sglang:http_{line}" in lines, scraped
        assert 'sglang:context_len{model_name="smollm2"} 512.0' in lines
        assert 'sglang:num_pages{model_name="smollm2"} 1000.0' in lines
        assert 'sglang:process_cpu_seconds_total{component="tokenizer"' in scraped

    def test_a_client_that_leaves_is_counted(self, serve: Any) -> None:
        with serve(enable_metrics=True) as served:
            served.engine.says_forever("on ")
            body = {"text": "Hi", "stream": True, "sampling_params": {"max_new_tokens": None}}
            with served.client.stream("POST", "/generate", json=body) as response:
                next(response.iter_lines())
            until(lambda: served.state.manager.metrics.aborted == 1)

    def test_a_dead_engine_leaves_what_this_process_has_counted(self, serve: Any) -> None:
        with serve(enable_metrics=True) as served:
            served.call(served.state.manager.fail_all, "the scheduler died")
            scraped = served.client.get("/metrics")
        assert scraped.status_code == 200
        assert "sglang:num_requests_total" in scraped.text

    def test_absent_by_default(self, server: Any) -> None:
        assert server.client.get("/metrics").status_code == 404
        assert server.state.manager.metrics is None


class TestAuth:
    @pytest.mark.parametrize("path", ["/health", "/health_generate", "/ready"])
    def test_open_paths(self, serve: Any, path: str) -> None:
        with serve(api_key="secret") as served:
            assert served.client.get(path).status_code == 200

    @pytest.mark.parametrize(
        ("header", "status"),
        [(None, 401), ("Bearer wrong", 401), ("secret", 401), ("Bearer secret", 200)],
    )
    def test_everything_else(self, serve: Any, header: str | None, status: int) -> None:
        headers = {} if header is None else {"authorization": header}
        with serve(api_key="secret") as served:
            response = served.client.get("/v1/models", headers=headers)
            assert response.status_code == status
            flush = served.client.post("/flush_cache", headers=headers)
            assert flush.status_code == status
        if status == 401:
            assert response.json() == {"error": "Unauthorized"}
