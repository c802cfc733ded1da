"""Ollama's API, and the envelope of Vertex AI."""

from __future__ import annotations

import json
from typing import Any

import pytest

TEXT = "Hello there, General Kenobi!"
HI: Any = [{"role": "user", "content": "Hi"}]
ASKED: Any = {"model": "smollm2", "messages": HI}
WEATHER: Any = {
    "type": "function",
    "function": {"name": "get_weather", "parameters": {"type": "object", "properties": {}}},
}
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'


@pytest.fixture
def engine(parsing_server: Any) -> Any:
    parsing_server.engine.says(TEXT)
    parsing_server.engine.scheduler.received.clear()
    return parsing_server.engine


@pytest.fixture
def client(parsing_server: Any, engine: Any) -> Any:
    return parsing_server.client


def lines(response: Any) -> list[Any]:
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("application/x-ndjson")
    return [json.loads(line) for line in response.text.splitlines()]


class TestOllama:
    def test_chat_streams_by_default(self, client: Any, engine: Any) -> None:
        got = lines(client.post("/api/chat", json={"model": "smollm2", "messages": HI}))
        assert "".join(line["message"]["content"] for line in got) == TEXT
        assert [line["done"] for line in got] == [False] * (len(got) - 1) + [True]
        last = got[-1]
        assert last["done_reason"] == "stop"
        assert last["prompt_eval_count"] == len(engine.last_request.input_ids)
        assert last["eval_count"] == len(engine.tokenizer(TEXT)["input_ids"]) + 1

    def test_chat_whole_with_options(self, client: Any, engine: Any) -> None:
        options = {"temperature": 0.5, "num_predict": 2, "repeat_penalty": 1.1, "top_k": 0}
        body = {"model": "smollm2", "messages": HI, "stream": False, "options": options}
        got = client.post("/api/chat", json=body).json()
        assert (got["done"], got["done_reason"], got["eval_count"]) == (True, "length", 2)
        sampling = engine.last_request.sampling
        assert (sampling.temperature, sampling.repetition_penalty) == (0.5, 1.1)
        assert (sampling.max_new_tokens, sampling.top_k) == (2, -1)

    @pytest.mark.parametrize("stream", [False, True])
    def test_thoughts_and_tools(self, client: Any, engine: Any, stream: bool) -> None:
        engine.says(f"<think>Hm.</think>One moment. {CALL}")
        body = {"model": "smollm2", "messages": HI, "tools": [WEATHER], "stream": stream}
        response = client.post("/api/chat", json=body)
        messages = [line["message"] for line in (lines(response) if stream else [response.json()])]
        assert "".join(message.get("thinking", "") for message in messages) == "Hm."
        assert "".join(message["content"] for message in messages) == "One moment."
        call = {"function": {"name": "get_weather", "arguments": {"city": "Paris"}}}
        assert messages[-1]["tool_calls"] == [call]

    def test_generate(self, client: Any, engine: Any) -> None:
        body = {"model": "smollm2", "prompt": "Hi", "system": "S", "stream": False}
        assert client.post("/api/generate", json=body).json()["response"] == TEXT
        prompt = engine.tokenizer.decode(engine.last_request.input_ids)
        assert prompt == "[system]S\n[user]Hi\n[assistant]"
        client.post("/api/generate", json={**body, "raw": True})
        assert engine.tokenizer.decode(engine.last_request.input_ids) == "Hi"

    def test_format(self, client: Any, engine: Any) -> None:
        body = {"model": "smollm2", "messages": HI, "format": {"type": "integer"}}
        lines(client.post("/api/chat", json=body))
        assert json.loads(engine.last_request.sampling.json_schema) == {"type": "integer"}

    def test_tags_and_show(self, client: Any) -> None:
        [card] = client.get("/api/tags").json()["models"]
        assert card["name"] == "smollm2"
        shown = client.post("/api/show", json={"model": "smollm2:latest"}).json()
        assert shown["capabilities"] == ["completion", "tools", "thinking"]
        assert shown["model_info"]["llama.context_length"] == 512

    @pytest.mark.parametrize(
        ("field", "body"),
        [
            ("messages", {"model": "smollm2"}),
            ("num_predict", {**ASKED, "options": {"num_predict": 9999}}),
            ("options.mirostat", {**ASKED, "options": {"mirostat": 1}}),
            ("images", {**ASKED, "images": ["x"]}),
        ],
    )
    def test_errors(self, client: Any, field: str, body: Any) -> None:
        response = client.post("/api/chat", json=body)
        assert response.status_code == 400
        assert field in response.json()["error"]


class TestVertex:
    def test_predictions_in_order(self, client: Any, engine: Any) -> None:
        engine.scheduler.script = lambda request: request.input_ids.tolist()
        body = {
            "instances": [{"text": "one"}, {"text": "two"}],
            "parameters": {"sampling_params": {"max_new_tokens": 4}},
        }
        got = client.post("/vertex_generate", json=body).json()
        assert [prediction["text"] for prediction in got["predictions"]] == ["one", "two"]
        assert engine.last_request.sampling.max_new_tokens == 4
        assert client.post("/vertex_generate", json={"instances": []}).json() == {"predictions": []}

    @pytest.mark.parametrize(
        ("field", "body"),
        [
            ("instances", {}),
            ("instances[1]", {"instances": [{"text": "a"}, {"prompt": "b"}]}),
            ("text", {"instances": [{"text": "a"}, {"input_ids": [1]}]}),
            ("parameters.stream", {"instances": [{"text": "a"}], "parameters": {"stream": True}}),
        ],
    )
    def test_errors(self, client: Any, field: str, body: Any) -> None:
        response = client.post("/vertex_generate", json=body)
        assert response.status_code == 400
        assert field in response.json()["error"]["message"]
