"""Bad requests against the real server: a 4xx that names the field, then business as usual.

Every field and form has its own test in test/cpu/frontend; here a cross-section meets the whole
pipeline, context limit and vocabulary of a real model included.
"""

from __future__ import annotations

from typing import Any

import pytest

HI = [{"role": "user", "content": "Hi"}]
LONG = list(range(100, 5100))  # longer than the context

GENERATE: list[tuple[str, Any]] = [
    ("text", {}),
    ("text", {"text": "a", "input_ids": [1]}),
    ("text", {"text": 5}),
    ("text", {"text": ""}),
    ("input_ids", {"input_ids": []}),
    ("input_ids", {"input_ids": [1, "2"]}),
    ("input_ids", {"input_ids": [-1]}),
    ("input_ids", {"input_ids": [49152]}),
    ("input_ids", {"input_ids": LONG}),
    ("max_new_tokens", {"text": "a", "sampling_params": {"max_new_tokens": -1}}),
    ("max_new_tokens", {"text": "a", "sampling_params": {"max_new_tokens": 100_000}}),
    ("temperature", {"text": "a", "sampling_params": {"temperature": "hot"}}),
    ("temperature", {"text": "a", "sampling_params": {"temperature": -1}}),
    ("top_p", {"text": "a", "sampling_params": {"top_p": 0}}),
    ("top_k", {"text": "a", "sampling_params": {"top_k": 1.5}}),
    ("min_p", {"text": "a", "sampling_params": {"min_p": 2}}),
    ("n", {"text": "a", "sampling_params": {"n": 0}}),
    ("stop", {"text": "a", "sampling_params": {"stop": [""]}}),
    ("stop_token_ids", {"text": "a", "sampling_params": {"stop_token_ids": [99999]}}),
    ("temprature", {"text": "a", "sampling_params": {"temprature": 1}}),
    ("promt", {"promt": "a"}),
    ("rid", {"text": ["a", "b"], "rid": ["same", "same"]}),
    ("return_logprob", {"text": "a", "return_logprob": 1}),
    ("logprob_start_len", {"text": "a", "return_logprob": True, "logprob_start_len": 1}),
    ("stop_regex", {"text": "a", "sampling_params": {"stop_regex": "(a"}}),
    ("repetition_penalty", {"text": "a", "sampling_params": {"repetition_penalty": 0}}),
    ("priority", {"text": "a", "priority": 1}),
]
COMPLETIONS: list[tuple[str, Any]] = [
    ("prompt", {}),
    ("prompt", {"prompt": LONG}),
    ("max_tokens", {"prompt": "a", "max_tokens": -1}),
    ("best_of", {"prompt": "a", "best_of": 4}),
    ("unheard_of", {"prompt": "a", "unheard_of": 1}),
]
CHAT: list[tuple[str, Any]] = [
    ("messages", {}),
    ("messages", {"messages": []}),
    ("messages[0].role", {"messages": [{"role": "wizard", "content": "Hi"}]}),
    ("max_tokens", {"messages": HI, "max_tokens": 100_000}),
    ("top_p", {"messages": HI, "top_p": 7}),
    ("tools[0].function", {"messages": HI, "tools": [{"type": "function"}]}),
    ("tool_choice", {"messages": HI, "tool_choice": "required"}),
    ("response_format.type", {"messages": HI, "response_format": {"type": "yaml"}}),
]
RAW: list[tuple[str, str, str]] = [
    ("/generate", '{"text": ', "JSON"),
    ("/generate", '{"text": "a", "sampling_params": {"temperature": NaN}}', "temperature"),
    ("/v1/chat/completions", "not json", "JSON"),
]


@pytest.fixture(autouse=True)
def _serves_the_next_request(client: Any) -> Any:
    yield
    answer = client.generate("The capital of France is", {"temperature": 0, "max_new_tokens": 2})
    assert answer["text"].startswith(" Paris")


@pytest.mark.parametrize(("field", "body"), GENERATE)
def test_generate(client: Any, field: str, body: Any) -> None:
    response = client.http.post("/generate", json=body)
    assert response.status_code == 400
    assert field in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("path", "field", "body"),
    [("/v1/completions", *case) for case in COMPLETIONS]
    + [("/v1/chat/completions", *case) for case in CHAT],
)
def test_openai(client: Any, path: str, field: str, body: Any) -> None:
    response = client.http.post(path, json=body)
    assert response.status_code == 400
    error = response.json()
    assert (error["object"], error["type"], error["code"]) == ("error", "BadRequestError", 400)
    assert error["param"] == field
    assert field in error["message"]


@pytest.mark.parametrize(("path", "body", "says"), RAW)
def test_what_is_no_json_or_no_number(client: Any, path: str, body: str, says: str) -> None:
    headers = {"Content-Type": "application/json"}
    response = client.http.post(path, content=body, headers=headers)
    assert response.status_code == 400
    assert says in response.text


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_the_model_answers_to_any_name(client: Any, path: str) -> None:
    body = {"model": "gpt-9", "prompt": "a", "messages": HI, "max_tokens": 1}
    body.pop("messages" if path == "/v1/completions" else "prompt")
    response = client.http.post(path, json=body)
    assert (response.status_code, response.json()["model"]) == (200, "gpt-9")
