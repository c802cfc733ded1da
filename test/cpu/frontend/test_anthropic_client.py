"""What Anthropic's own client sees of /v1/messages."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import pytest

from sglang.srt.messages import FinishReason

TEXT = "Hello there, General Kenobi!"
HI: Any = [{"role": "user", "content": "Hi"}]
WEATHER: Any = {
    "name": "get_weather",
    "description": "Weather of a city.",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}},
}
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'
LIMIT_S = 20.0


@pytest.fixture
def engine(parsing_server: Any) -> Any:
    parsing_server.engine.says(TEXT)
    parsing_server.engine.scheduler.received.clear()
    return parsing_server.engine


@pytest.fixture
def client(parsing_server: Any, engine: Any) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(
        base_url=parsing_server.url, api_key="none", timeout=LIMIT_S, max_retries=0
    ) as client:
        yield client


def prompt_of(engine: Any) -> str:
    text: str = engine.tokenizer.decode(engine.last_request.input_ids)
    return text


def create(client: anthropic.Anthropic, **fields: Any) -> Any:
    defaults = {"model": "smollm2", "max_tokens": 100, "messages": HI}
    return client.messages.create(**{**defaults, **fields})


def streamed(client: anthropic.Anthropic, **fields: Any) -> Any:
    """The message that the client puts together from a stream."""
    defaults = {"model": "smollm2", "max_tokens": 100, "messages": HI}
    with client.messages.stream(**{**defaults, **fields}) as stream:
        return stream.get_final_message()


ASK = {"whole": create, "streamed": streamed}


@pytest.fixture(params=sorted(ASK))
def ask(request: pytest.FixtureRequest) -> Any:
    return ASK[request.param]


def test_text(client: anthropic.Anthropic, engine: Any, ask: Any) -> None:
    message = ask(client, system="Be kind.")
    assert message.id.startswith("msg_")
    assert (message.type, message.role, message.model) == ("message", "assistant", "smollm2")
    [block] = message.content
    assert (block.type, block.text) == ("text", TEXT)
    assert (message.stop_reason, message.stop_sequence) == ("end_turn", None)
    assert message.usage.input_tokens == len(engine.last_request.input_ids)
    assert message.usage.output_tokens == len(engine.tokenizer(TEXT)["input_ids"]) + 1
    assert message.usage.cache_read_input_tokens == 0
    assert prompt_of(engine) == "[system]Be kind.\n[user]Hi\n[assistant]"


def test_max_tokens(client: anthropic.Anthropic, ask: Any) -> None:
    message = ask(client, max_tokens=2)
    assert (message.stop_reason, message.usage.output_tokens) == ("max_tokens", 2)


def test_stop_sequences(client: anthropic.Anthropic, ask: Any) -> None:
    message = ask(client, stop_sequences=["General", "never"])
    assert message.content[0].text == "Hello there, "
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", "General")


def test_sampling_reaches_the_engine(client: anthropic.Anthropic, engine: Any) -> None:
    create(client, max_tokens=9, extra_body={"temperature": 0.5, "top_p": 0.9, "top_k": 7})
    sampling = engine.last_request.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.5, 0.9, 7)
    assert sampling.max_new_tokens == 9


def test_a_call_of_a_tool(client: anthropic.Anthropic, engine: Any, ask: Any) -> None:
    engine.says(f"One moment. {CALL}")
    message = ask(client, tools=[WEATHER])
    text, call = message.content
    assert (text.type, text.text) == ("text", "One moment.")
    assert (call.type, call.name, call.input) == ("tool_use", "get_weather", {"city": "Paris"})
    assert call.id.startswith("toolu_")
    assert message.stop_reason == "tool_use"
    assert '"name": "get_weather"' in prompt_of(engine)


def test_thoughts(client: anthropic.Anthropic, engine: Any, ask: Any) -> None:
    engine.says(f"<think>Hm.</think>{TEXT}")
    message = ask(client, thinking={"type": "enabled", "budget_tokens": 1024}, max_tokens=200)
    thought, text = message.content
    assert (thought.type, thought.thinking) == ("thinking", "Hm.")
    assert text.text == TEXT


def test_no_thoughts_if_disabled(client: anthropic.Anthropic, engine: Any) -> None:
    create(client, thinking={"type": "disabled"})
    assert prompt_of(engine).endswith("[assistant]<think></think>")


def test_tools_results_and_thoughts_of_earlier_turns(
    client: anthropic.Anthropic, engine: Any
) -> None:
    use = {"type": "tool_use", "id": "t1", "name": "get_weather", "input": {"city": "Paris"}}
    result = [
        {"type": "tool_result", "tool_use_id": "t1", "content": "Rain."},
        {
            "type": "tool_result",
            "tool_use_id": "t2",
            "content": [{"type": "text", "text": "none"}],
            "is_error": True,
        },
        {"type": "text", "text": "And now?", "cache_control": {"type": "ephemeral"}},
    ]
    create(
        client,
        system=[{"type": "text", "text": "A"}, {"type": "text", "text": "B"}],
        messages=[
            *HI,
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "Hm.", "signature": ""},
                    {"type": "text", "text": "Well"},
                    use,
                ],
            },
            {"role": "user", "content": result},
        ],
    )
    assert prompt_of(engine) == (
        "[system]A\nB\n[user]Hi\n"
        '[assistant](Hm.)Well<call t1 get_weather {"city": "Paris"}>\n'
        "[tool t1]Rain.\n[tool t2]Error: none\n[user]And now?\n[assistant]"
    )


def test_the_assistants_last_words_are_gone_on_with(
    client: anthropic.Anthropic, engine: Any
) -> None:
    create(client, messages=[*HI, {"role": "assistant", "content": "The answer"}])
    assert prompt_of(engine).endswith("[assistant]The answer")


def test_events_of_a_stream(parsing_server: Any, engine: Any) -> None:
    engine.says(f"<think>Hm.</think>One moment. {CALL}")
    body = {
        "model": "smollm2",
        "max_tokens": 100,
        "messages": HI,
        "tools": [WEATHER],
        "stream": True,
    }
    response = parsing_server.client.post("/v1/messages", json=body)
    assert response.headers["content-type"].startswith("text/event-stream")
    events = []
    for part in response.text.strip().split("\n\n"):
        name, data = part.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
    assert [e["type"] for e in events[:2]] == ["message_start", "ping"]
    assert [e["type"] for e in events[-2:]] == ["message_delta", "message_stop"]
    starts = [e for e in events if e["type"] == "content_block_start"]
    stops = [e for e in events if e["type"] == "content_block_stop"]
    assert [e["content_block"]["type"] for e in starts] == ["thinking", "text", "tool_use"]
    assert [e["index"] for e in starts] == [e["index"] for e in stops] == [0, 1, 2]
    kinds = {e["delta"]["type"] for e in events if e["type"] == "content_block_delta"}
    assert kinds == {"thinking_delta", "signature_delta", "text_delta", "input_json_delta"}
    arguments = "".join(e.get("delta", {}).get("partial_json", "") for e in events)
    assert json.loads(arguments) == {"city": "Paris"}


def test_count_tokens(client: anthropic.Anthropic, engine: Any) -> None:
    counted = client.messages.count_tokens(
        model="smollm2", messages=HI, system="S", tools=[WEATHER]
    )
    create(client, system="S", tools=[WEATHER])
    assert counted.input_tokens == len(engine.last_request.input_ids)


def test_cached_tokens_are_not_input_tokens(client: anthropic.Anthropic, engine: Any) -> None:
    engine.scheduler._cached_tokens = lambda: 3
    try:
        usage = create(client).usage
    finally:
        engine.scheduler._cached_tokens = lambda: 0
    assert usage.cache_read_input_tokens == 3
    assert usage.input_tokens == len(engine.last_request.input_ids) - 3


@pytest.mark.parametrize(
    ("field", "fields"),
    [
        ("max_tokens", {"max_tokens": 0}),
        ("max_tokens", {"max_tokens": 5000}),
        ("temperature", {"extra_body": {"temperature": -1}}),
        ("stop_sequences", {"stop_sequences": [""]}),
        ("messages", {"messages": []}),
        (r"messages\[0\].role", {"messages": [{"role": "wizard", "content": "Hi"}]}),
        (
            r"messages\[0\].content\[0\].type",
            {"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]},
        ),
        (
            r"messages\[0\].content\[0\].tool_use_id",
            {"messages": [{"role": "user", "content": [{"type": "tool_result"}]}]},
        ),
        (r"tools\[0\].type", {"tools": [{"type": "web_search_20250305", "name": "web_search"}]}),
        ("tool_choice", {"tools": [WEATHER], "tool_choice": {"type": "tool", "name": "other"}}),
        ("mcp_servers", {"extra_body": {"mcp_servers": [{"name": "x"}]}}),
        ("unheard_of", {"extra_body": {"unheard_of": 1}}),
    ],
)
def test_bad_requests_name_the_field(
    client: anthropic.Anthropic, field: str, fields: dict[str, Any]
) -> None:
    with pytest.raises(anthropic.BadRequestError, match=field) as caught:
        create(client, **fields)
    body: Any = caught.value.body
    assert body["type"] == "error"
    assert body["error"]["type"] == "invalid_request_error"


def test_errors_of_other_kinds(client: anthropic.Anthropic, engine: Any, serve: Any) -> None:
    with pytest.raises(anthropic.NotFoundError):
        client.models.retrieve("other")
    engine.refuses(FinishReason(type="abort", message="queue full", status_code=503))
    with pytest.raises(anthropic.APIStatusError, match="queue full") as full:
        create(client)
    body: Any = full.value.body
    assert (full.value.status_code, body["error"]["type"]) == (503, "overloaded_error")
    with serve(api_key="secret") as served:
        with pytest.raises(anthropic.AuthenticationError) as stranger:
            create(anthropic.Anthropic(base_url=served.url, api_key="guess", max_retries=0))
        body = stranger.value.body
        assert body["error"]["type"] == "authentication_error"
        served.engine.says(TEXT)
        message = create(anthropic.Anthropic(base_url=served.url, api_key="secret"))
        assert message.content[0].text == TEXT


def test_what_we_did_wrong_is_not_told(client: anthropic.Anthropic, engine: Any) -> None:
    engine.refuses(FinishReason(type="abort", message="page 7 is lost", status_code=500))
    with pytest.raises(anthropic.InternalServerError) as caught:
        create(client)
    body: Any = caught.value.body
    assert body["error"] == {"type": "api_error", "message": "internal server error"}


def test_a_failure_inside_a_stream_is_an_error_event(
    client: anthropic.Anthropic, engine: Any
) -> None:
    failure = FinishReason(type="abort", message="no room left", status_code=503)
    engine.scheduler.script = lambda request: [100, failure]
    engine.scheduler.token_interval_s = 0.05  # the first token gets through by itself
    try:
        with pytest.raises(anthropic.APIStatusError, match="no room left"):
            streamed(client)
    finally:
        engine.scheduler.token_interval_s = 0.0
