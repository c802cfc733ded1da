"""What OpenAI's own client sees of /v1/responses."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from sglang.srt.entrypoints.openai.responses.store import ResponseStore, Stored
from sglang.srt.errors import NotFound
from sglang.srt.messages import FinishReason

TEXT = "Hello there, General Kenobi!"
WEATHER: Any = {
    "type": "function",
    "name": "get_weather",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    "strict": False,
}
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'
LIMIT_S = 20.0


@pytest.fixture
def engine(parsing_server: Any) -> Any:
    parsing_server.engine.says(TEXT)
    parsing_server.engine.scheduler.received.clear()
    return parsing_server.engine


@pytest.fixture
def client(parsing_server: Any, engine: Any) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=f"{parsing_server.url}/v1", api_key="none", timeout=LIMIT_S, max_retries=0
    ) as client:
        yield client


def prompt_of(engine: Any) -> str:
    text: str = engine.tokenizer.decode(engine.last_request.input_ids)
    return text


def create(client: openai.OpenAI, **fields: Any) -> Any:
    return client.responses.create(**{"model": "smollm2", "input": "Hi", **fields})


def streamed(client: openai.OpenAI, **fields: Any) -> Any:
    """The response that the client puts together from a stream."""
    with client.responses.stream(**{"model": "smollm2", "input": "Hi", **fields}) as stream:
        return stream.get_final_response()


ASK = {"whole": create, "streamed": streamed}


@pytest.fixture(params=sorted(ASK))
def ask(request: pytest.FixtureRequest) -> Any:
    return ASK[request.param]


def test_text(client: openai.OpenAI, engine: Any, ask: Any) -> None:
    response = ask(client, instructions="Be kind.", max_output_tokens=50)
    assert response.id.startswith("resp_")
    assert (response.object, response.status) == ("response", "completed")
    assert response.output_text == TEXT
    [item] = response.output
    assert (item.type, item.role, item.status) == ("message", "assistant", "completed")
    usage = response.usage
    assert usage.input_tokens == len(engine.last_request.input_ids)
    assert usage.total_tokens == usage.input_tokens + usage.output_tokens
    assert engine.last_request.sampling.max_new_tokens == 50
    assert prompt_of(engine) == "[system]Be kind.\n[user]Hi\n[assistant]"


def test_items_of_all_kinds_reach_the_template(client: openai.OpenAI, engine: Any) -> None:
    items: Any = [
        {"role": "user", "content": [{"type": "input_text", "text": "Weather?"}]},
        {
            "type": "reasoning",
            "id": "rs_1",
            "summary": [],
            "content": [{"type": "reasoning_text", "text": "Hm."}],
        },
        {
            "type": "message",
            "id": "msg_1",
            "role": "assistant",
            "status": "completed",
            "content": [{"type": "output_text", "text": "Well", "annotations": []}],
        },
        {
            "type": "function_call",
            "call_id": "c1",
            "name": "get_weather",
            "arguments": '{"city": "Paris"}',
        },
        {"type": "function_call_output", "call_id": "c1", "output": "Rain."},
    ]
    create(client, input=items)
    assert prompt_of(engine) == (
        '[user]Weather?\n[assistant](Hm.)Well<call c1 get_weather {"city": "Paris"}>\n'
        "[tool c1]Rain.\n[assistant]"
    )


def test_thoughts_and_calls_are_items(client: openai.OpenAI, engine: Any, ask: Any) -> None:
    engine.says(f"<think>Hm.</think>One moment. {CALL}")
    response = ask(client, tools=[WEATHER])
    thought, text, call = response.output
    assert (thought.type, thought.content[0].text) == ("reasoning", "Hm.")
    assert text.content[0].text == "One moment."
    assert (call.type, call.name, call.status) == ("function_call", "get_weather", "completed")
    assert json.loads(call.arguments) == {"city": "Paris"}
    assert call.call_id.startswith("call_")
    assert response.usage.output_tokens_details.reasoning_tokens > 0


@pytest.mark.parametrize("stream", [False, True])
def test_a_cut_off_answer_is_incomplete(client: openai.OpenAI, stream: bool) -> None:
    response = create(client, max_output_tokens=2, stream=stream)
    if stream:
        *_, last = response
        assert last.type == "response.incomplete"
        response = last.response
    assert response.status == response.output[0].status == "incomplete"
    assert response.incomplete_details.reason == "max_output_tokens"


def test_events_are_numbered_and_in_order(client: openai.OpenAI, engine: Any) -> None:
    engine.says(f"One moment. {CALL}")
    events = list(create(client, tools=[WEATHER], stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    names = [event.type.removeprefix("response.") for event in events]
    assert names[:4] == ["created", "in_progress", "output_item.added", "content_part.added"]
    assert names[-3:] == ["function_call_arguments.done", "output_item.done", "completed"]
    once = [name for name in names if not name.endswith(".delta")]
    assert once[4:7] == ["output_text.done", "content_part.done", "output_item.done"]
    assert events[0].response.status == "in_progress"
    deltas = "".join(e.delta for e in events if e.type == "response.output_text.delta")
    assert deltas == "One moment."
    assert events[-1].response.id == events[0].response.id


def test_stored_responses_are_found_and_gone_on_from(client: openai.OpenAI, engine: Any) -> None:
    first = create(client, instructions="Once.", input="One")
    assert client.responses.retrieve(first.id).output_text == TEXT
    engine.says("Two it is.")
    second = streamed(client, input="Two", previous_response_id=first.id)
    assert prompt_of(engine) == f"[user]One\n[assistant]{TEXT}\n[user]Two\n[assistant]"
    create(client, input="Three", previous_response_id=second.id)
    assert "[assistant]Two it is.\n[user]Three" in prompt_of(engine)


def test_what_is_not_stored_is_not_found(client: openai.OpenAI) -> None:
    response = create(client, store=False)
    with pytest.raises(openai.NotFoundError, match=response.id) as caught:
        client.responses.retrieve(response.id)
    assert caught.value.code == "response_id_not_found"
    with pytest.raises(openai.NotFoundError, match="previous_response_id"):
        create(client, previous_response_id=response.id)


def test_a_response_in_the_background(client: openai.OpenAI) -> None:
    response = create(client, background=True)
    assert response.status in ("queued", "in_progress")
    deadline_s = time.monotonic() + LIMIT_S
    while response.status in ("queued", "in_progress"):
        assert time.monotonic() < deadline_s
        response = client.responses.retrieve(response.id)
    assert (response.status, response.output_text) == ("completed", TEXT)


def test_cancelling_ends_the_engines_work(
    parsing_server: Any, client: openai.OpenAI, engine: Any
) -> None:
    engine.says_forever("word ")
    try:
        response = create(client, background=True)
        cancelled = client.responses.cancel(response.id)
        assert cancelled.status == "cancelled"
        assert client.responses.retrieve(response.id).status == "cancelled"
        assert parsing_server.state.manager.in_flight == 0
    finally:
        engine.scheduler.token_interval_s = 0.0


def test_only_what_runs_in_the_background_can_be_cancelled(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="background"):
        client.responses.cancel(create(client).id)


@pytest.mark.parametrize(
    ("field", "fields"),
    [
        ("input", {"input": 5}),
        ("input", {"input": []}),
        (r"input\[0\].type", {"input": [{"type": "computer_call"}]}),
        (r"input\[0\].role", {"input": [{"role": "wizard", "content": "Hi"}]}),
        (r"tools\[0\].type", {"tools": [{"type": "web_search"}]}),
        ("tool_choice", {"tools": [WEATHER], "tool_choice": {"type": "function", "name": "x"}}),
        ("max_output_tokens", {"max_output_tokens": -1}),
        ("temperature", {"temperature": -1}),
        ("text.format", {"text": {"format": {"type": "yaml"}}}),
        ("truncation", {"truncation": "auto"}),
        ("background", {"background": True, "stream": True}),
        ("unheard_of", {"extra_body": {"unheard_of": 1}}),
    ],
)
def test_bad_requests_name_the_field_in_openais_form(
    client: openai.OpenAI, field: str, fields: dict[str, Any]
) -> None:
    with pytest.raises(openai.BadRequestError, match=field) as caught:
        create(client, **fields)
    body: Any = caught.value.body
    assert body["type"] == "invalid_request_error"
    assert body["param"]


def test_a_failure_inside_a_stream_fails_the_response(client: openai.OpenAI, engine: Any) -> None:
    failure = FinishReason(type="abort", message="no room left", status_code=503)
    engine.scheduler.script = lambda request: [100, failure]
    engine.scheduler.token_interval_s = 0.05  # the first token gets through by itself
    try:
        *_, last = create(client, stream=True)
    finally:
        engine.scheduler.token_interval_s = 0.0
    assert last.type == "response.failed"
    assert last.response.error.message == "no room left"


def test_the_store_forgets_the_oldest() -> None:
    store = ResponseStore(max_responses=2)
    for name in ("a", "b", "c"):
        store.put(Stored({"id": name}))
    assert len(store) == 2
    assert store.get("c").response == {"id": "c"}
    with pytest.raises(NotFound, match="'a'"):
        store.get("a")
