"""Bad requests: each gets a 4xx in the documented form that names the field, and harms no other."""

from __future__ import annotations

from typing import Any

import pytest

HI = [{"role": "user", "content": "Hi"}]
TOO_LONG = list(range(512))


def sampling(**params: Any) -> dict[str, Any]:
    return {"text": "Hi", "sampling_params": params}


NATIVE: list[tuple[str, Any]] = [
    ("text", {}),
    ("text", {"text": "a", "input_ids": [1]}),
    ("text", {"text": 5}),
    ("text", {"text": ["a", 5]}),
    ("text", {"text": ""}),
    ("text", {"text": []}),
    ("text", {"text": "word " * 600}),
    ("input_ids", {"input_ids": []}),
    ("input_ids", {"input_ids": [[]]}),
    ("input_ids", {"input_ids": [[1], []]}),
    ("input_ids", {"input_ids": "1 2"}),
    ("input_ids", {"input_ids": [1, "2"]}),
    ("input_ids", {"input_ids": [1.5]}),
    ("input_ids", {"input_ids": [True]}),
    ("input_ids", {"input_ids": [[1], 2]}),
    ("input_ids", {"input_ids": [-1]}),
    ("input_ids", {"input_ids": [49152]}),
    ("input_ids", {"input_ids": [2**70]}),
    ("input_ids", {"input_ids": TOO_LONG}),
    ("max_new_tokens", sampling(max_new_tokens=512)),
    ("max_new_tokens", sampling(max_new_tokens=-1)),
    ("max_new_tokens", sampling(max_new_tokens="8")),
    ("min_new_tokens", sampling(min_new_tokens=9, max_new_tokens=8)),
    ("temperature", sampling(temperature=-0.5)),
    ("temperature", sampling(temperature="hot")),
    ("top_p", sampling(top_p=0)),
    ("top_p", sampling(top_p=1.5)),
    ("top_k", sampling(top_k=0)),
    ("top_k", sampling(top_k=1.5)),
    ("min_p", sampling(min_p=2)),
    ("stop", sampling(stop=5)),
    ("stop", sampling(stop=["x"] * 33)),
    ("stop_token_ids", sampling(stop_token_ids=[99999])),
    ("stop_regex", sampling(stop_regex="(")),
    ("logit_bias", sampling(logit_bias={"99999": 1})),
    ("repetition_penalty", sampling(repetition_penalty=3)),
    ("n", sampling(n=0)),
    ("n", sampling(n=1_000_000)),
    ("ebnf", sampling(regex="[a-z]+", ebnf="root ::= 'a'")),
    ("temprature", sampling(temprature=1)),
    ("sampling_params", {"text": "a", "sampling_params": "hot"}),
    ("sampling_params", {"text": ["a", "b"], "sampling_params": [{}]}),
    ("promt", {"promt": "Hi"}),
    ("stream", {"text": "a", "stream": "yes"}),
    ("rid", {"text": "a", "rid": 7}),
    ("rid", {"text": "a", "rid": ""}),
    ("rid", {"text": ["a", "b"], "rid": ["same", "same"]}),
    ("rid", {"text": ["a", "b"], "rid": ["one"]}),
    ("return_logprob", {"text": "a", "return_logprob": 1}),
    ("return_logprob", {"text": ["a", "b"], "return_logprob": [True]}),
    ("logprob_start_len", {"text": "a", "return_logprob": True, "logprob_start_len": 1}),
    ("logprob_start_len", {"text": "a", "return_logprob": True, "logprob_start_len": -2}),
    ("logprob_start_len", {"text": "a", "return_logprob": True, "logprob_start_len": "0"}),
    ("top_logprobs_num", {"text": "a", "return_logprob": True, "top_logprobs_num": -1}),
    ("top_logprobs_num", {"text": "a", "return_logprob": True, "top_logprobs_num": 1025}),
    ("token_ids_logprob", {"text": "a", "return_logprob": True, "token_ids_logprob": [49152]}),
    ("token_ids_logprob", {"text": "a", "return_logprob": True, "token_ids_logprob": [0.5]}),
    ("priority", {"text": "a", "priority": 1}),
    ("input_embeds", {"text": "a", "input_embeds": [[0.5]]}),
    ("return_entropy", {"text": "a", "return_entropy": True}),
    ("image_data", {"text": "a", "image_data": "cat.png"}),
    ("lora_path", {"text": ["a", "b"], "lora_path": [None, "adapter"]}),
    ("extra_key", {"text": ["a", "b"], "extra_key": ["x"]}),
    ("slo.tbt", {"text": "a", "slo": {"tbt": 5}}),
    ("slo.tbt_ms", {"text": "a", "slo": {"tbt_ms": 0}}),
    ("slo", {"text": "a", "slo": "no-such-class"}),
    ("slo", {"text": ["a", "b"], "slo": [None]}),
    ("body", []),
    ("body", "text"),
]

COMPLETIONS: list[tuple[str, Any]] = [
    ("prompt", {}),
    ("prompt", {"prompt": None}),
    ("prompt", {"prompt": ""}),
    ("prompt", {"prompt": []}),
    ("prompt", {"prompt": [1, "a"]}),
    ("prompt", {"prompt": [[]]}),
    ("prompt", {"prompt": TOO_LONG}),
    ("prompt", {"prompt": [99999]}),
    ("prompt", {"prompt": [99999], "echo": True}),
    ("max_tokens", {"prompt": "a", "max_tokens": -1}),
    ("max_tokens", {"prompt": "a", "max_tokens": 100_000}),
    ("max_tokens", {"prompt": "a", "max_tokens": 1.5}),
    ("min_tokens", {"prompt": "a", "max_tokens": 2, "min_tokens": 3}),
    ("temperature", {"prompt": "a", "temperature": "hot"}),
    ("top_p", {"prompt": "a", "top_p": 7}),
    ("seed", {"prompt": "a", "seed": 2**63}),
    ("n", {"prompt": "a", "n": 0}),
    ("n", {"prompt": "a", "n": 129}),
    ("stop", {"prompt": "a", "stop": [""]}),
    ("logprobs", {"prompt": "a", "logprobs": -1}),
    ("logprobs", {"prompt": "a", "logprobs": True}),
    ("best_of", {"prompt": "a", "best_of": 4}),
    ("suffix", {"prompt": "a", "suffix": "end"}),
    ("response_format.type", {"prompt": "a", "response_format": {"type": "yaml"}}),
    ("response_format", {"prompt": "a", "response_format": "json_object"}),
    (
        "response_format",
        {"prompt": "a", "regex": "a", "response_format": {"type": "json_object"}},
    ),
    ("stream_options.include_usage", {"prompt": "a", "stream_options": {"include_usage": 1}}),
    ("stream_options.extra", {"prompt": "a", "stream_options": {"extra": True}}),
    ("max_new_tokens", {"prompt": "a", "max_new_tokens": 5}),
    ("slo.ttft_ms", {"prompt": "a", "slo": {"ttft_ms": "1s"}}),
    ("slo", {"prompt": ["a", "b"], "slo": [None, None]}),
]

CHAT: list[tuple[str, Any]] = [
    ("messages", {}),
    ("messages", {"messages": []}),
    ("messages", {"messages": "Hi"}),
    ("messages[0].role", {"messages": [{"content": "Hi"}]}),
    ("messages[0].role", {"messages": [{"role": "wizard", "content": "Hi"}]}),
    ("messages[0].content", {"messages": [{"role": "user"}]}),
    ("messages[0].mood", {"messages": [{"role": "user", "content": "Hi", "mood": "good"}]}),
    (
        "messages[0].content[0].type",
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
    ),
    (
        "messages[0].content[0].text",
        {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
    ),
    ("messages", {"messages": [{"role": "user", "content": "word " * 600}]}),
    ("max_tokens", {"messages": HI, "max_tokens": 5, "max_completion_tokens": 6}),
    ("max_completion_tokens", {"messages": HI, "max_completion_tokens": 5000}),
    ("max_tokens", {"messages": HI, "max_tokens": 5000}),
    ("temperature", {"messages": HI, "temperature": -1}),
    ("tools", {"messages": HI, "tools": [{"type": "function", "function": {"name": "f"}}]}),
    ("response_format.json_schema", {"messages": HI, "response_format": {"type": "json_schema"}}),
    (
        "response_format",
        {"messages": HI, "ebnf": "root ::= 'a'", "response_format": {"type": "json_object"}},
    ),
    ("logprobs", {"messages": HI, "logprobs": 3}),
    ("top_logprobs", {"messages": HI, "top_logprobs": 3}),
    ("input_ids", {"messages": HI, "input_ids": [99999]}),
    ("input_ids", {"messages": HI, "input_ids": []}),
    (
        "messages[0].tool_calls[0].function.name",
        {"messages": [{"role": "assistant", "tool_calls": [{"function": {}}]}]},
    ),
    ("continue_final_message", {"messages": HI, "continue_final_message": True}),
    ("chat_template_kwargs", {"messages": HI, "chat_template_kwargs": {"chat_template": "x"}}),
    ("chat_template_kwargs", {"messages": HI, "chat_template_kwargs": 3}),
    ("reasoning_effort", {"messages": HI, "reasoning_effort": "extreme"}),
    ("unheard_of", {"messages": HI, "unheard_of": 1}),
    ("n", {"messages": HI, "n": "two"}),
    ("slo.ttft_ms_per_token", {"messages": HI, "slo": {"ttft_ms_per_token": -1}}),
    ("slo", {"messages": HI, "slo": "no-such-class"}),
    ("slo", {"messages": HI, "slo": 5}),
]

OTHERS: list[tuple[str, str, Any]] = [
    ("/tokenize", "prompt", {}),
    ("/tokenize", "prompt", {"prompt": 7}),
    ("/detokenize", "tokens", {"tokens": "abc"}),
    ("/detokenize", "tokens", {"tokens": [49152]}),
    ("/abort_request", "rid", {"rid": 5}),
    ("/abort_request", "everything", {"everything": True}),
    ("/flush_cache?timeout=soon", "timeout", {}),
    ("/flush_cache?timeout=-1", "timeout", {}),
]


def name(value: Any) -> str:
    return value if isinstance(value, str) else ""


@pytest.fixture(autouse=True)
def _serves_the_next_request(server: Any) -> Any:
    yield
    response = server.client.post("/generate", json={"text": "Hi"})
    assert response.status_code == 200
    assert response.json()["text"] == "Hello there, General Kenobi!"
    assert len(server.engine.scheduler.received) == 1, "the bad request reached the engine"


def check_native(response: Any, field: str) -> None:
    assert response.status_code == 400
    assert list(response.json()) == ["error"]
    assert list(response.json()["error"]) == ["message"]
    assert field in response.json()["error"]["message"]


def check_flat(response: Any, field: str) -> None:
    assert response.status_code == 400, response.text
    error = response.json()
    message = error.pop("message")
    assert error == {"object": "error", "type": "BadRequestError", "param": field, "code": 400}
    assert field in message
    assert "new_tokens" not in message or field == "max_new_tokens"


@pytest.mark.parametrize(("field", "body"), NATIVE, ids=name)
def test_native(server: Any, field: str, body: Any) -> None:
    check_native(server.client.post("/generate", json=body), field)


@pytest.mark.parametrize(("field", "body"), COMPLETIONS, ids=name)
def test_completions(server: Any, field: str, body: dict[str, Any]) -> None:
    check_flat(server.client.post("/v1/completions", json=body), field)


@pytest.mark.parametrize(("field", "body"), CHAT, ids=name)
def test_chat(server: Any, field: str, body: dict[str, Any]) -> None:
    check_flat(server.client.post("/v1/chat/completions", json=body), field)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_bad_streams_are_refused_before_they_start(server: Any, path: str) -> None:
    body = {"prompt": "a", "messages": HI, "stream": True, "max_tokens": 5000}
    body.pop("messages" if path == "/v1/completions" else "prompt")
    check_flat(server.client.post(path, json=body), "max_tokens")


@pytest.mark.parametrize(("path", "field", "body"), OTHERS, ids=name)
def test_other_endpoints(server: Any, path: str, field: str, body: dict[str, Any]) -> None:
    check_native(server.client.post(path, json=body), field)


@pytest.mark.parametrize(
    ("raw", "field"),
    [
        (b"", "body"),
        (b"{", "body"),
        (b'{"text": "a",}', "body"),
        (b"\xff\xfe", "body"),
        (b'{"text": "\\ud800"}', "body"),
        (b"[" * 100_000, "body"),
        (b'{"text": "a", "sampling_params": {"temperature": NaN}}', "sampling_params.temperature"),
        (b'{"text": "a", "sampling_params": {"top_p": -Infinity}}', "sampling_params.top_p"),
        (b'{"input_ids": [[1, 2], [3, NaN]]}', "input_ids[1][1]"),
    ],
)
def test_bodies_that_are_no_json(server: Any, raw: bytes, field: str) -> None:
    headers = {"content-type": "application/json"}
    check_native(server.client.post("/generate", content=raw, headers=headers), field)
    check_flat(server.client.post("/v1/completions", content=raw, headers=headers), field)


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", ""])
def test_content_type(server: Any, content_type: str) -> None:
    headers = {"content-type": content_type}
    for path in ("/v1/completions", "/v1/chat/completions"):
        response = server.client.post(path, content=b'{"prompt": "a"}', headers=headers)
        check_flat(response, "Content-Type")


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_an_adapter_of_the_model(server: Any, path: str) -> None:
    body = {"model": "smollm2:poet", "messages": HI, "prompt": "a"}
    body.pop("messages" if path == "/v1/completions" else "prompt")
    response = server.client.post(path, json=body)
    check_flat(response, "model")


def test_unknown_model_card(server: Any) -> None:
    response = server.client.get("/v1/models/some/where")
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "model_not_found"


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/nowhere", 404), ("GET", "/generate", 405), ("DELETE", "/v1/models", 405)],
)
def test_wrong_paths_and_methods(server: Any, method: str, path: str, status: int) -> None:
    response = server.client.request(method, path)
    assert response.status_code == status
    assert response.json()["object"] == "error"
    assert response.json()["code"] == status
