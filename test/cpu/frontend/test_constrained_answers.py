"""What a request says of its answer's form, and what the engine is told of it."""

from __future__ import annotations

import json
from typing import Any

import anthropic
import jsonschema_rs
import openai
import pytest

from sglang.srt.entrypoints.json_body import checked
from sglang.srt.entrypoints.openai.output_format import (
    Constraint,
    only_constraint,
    response_format_constraint,
)
from sglang.srt.entrypoints.openai.protocol import Tool
from sglang.srt.entrypoints.openai.tools import ToolPlan
from sglang.srt.errors import RequestError

HI: Any = [{"role": "user", "content": "Hi"}]
CITY: Any = {
    "type": "object",
    "properties": {"city": {"$ref": "#/$defs/City"}},
    "required": ["city"],
    "additionalProperties": False,
    "$defs": {"City": {"type": "string", "enum": ["Paris", "Rome"]}},
}
WEATHER: Any = {"type": "function", "function": {"name": "get_weather", "parameters": CITY}}
NOW: Any = {"type": "function", "function": {"name": "now"}}
NAMED: Any = {"type": "function", "function": {"name": "get_weather"}}
PARIS = [{"name": "get_weather", "parameters": {"city": "Paris"}}]
LIMIT_S = 20.0


def tools(*raw: Any) -> list[Tool]:
    return [checked(Tool, tool) for tool in raw]


def schema_of(choice: Any, *, parallel: bool = True) -> Any:
    plan = ToolPlan.of(tools(WEATHER, NOW), choice, parallel=parallel)
    assert plan.constraint is not None
    assert plan.constraint.name == "json_schema"
    return json.loads(plan.constraint.value)


@pytest.mark.parametrize(
    ("response_format", "constraint"),
    [
        (None, None),
        ({"type": "text"}, None),
        ({"type": "json_object"}, ("json_schema", {"type": "object"})),
        (
            {"type": "json_schema", "json_schema": {"name": "c", "schema": CITY, "strict": True}},
            ("json_schema", CITY),
        ),
        (
            {"type": "structural_tag", "structures": [], "triggers": []},
            ("structural_tag", {"type": "structural_tag", "structures": [], "triggers": []}),
        ),
    ],
)
def test_response_formats(response_format: Any, constraint: tuple[str, Any] | None) -> None:
    found = response_format_constraint(response_format)
    if constraint is None:
        assert found is None
    else:
        assert found is not None
        assert (found.name, json.loads(found.value)) == constraint


def test_a_request_has_one_constraint() -> None:
    assert only_constraint({"regex": "a", "ebnf": ""}) == Constraint("regex", "regex", "a")
    assert only_constraint({"regex": None}) is None
    with pytest.raises(RequestError, match="tool_choice: cannot be combined with regex"):
        only_constraint({"regex": "a"}, Constraint("tool_choice", "json_schema", "{}"))


@pytest.mark.parametrize(
    ("choice", "parallel", "answer", "valid"),
    [
        ("required", True, PARIS, True),
        ("required", True, [*PARIS, {"name": "now", "parameters": {}}], True),
        ("required", False, [*PARIS, {"name": "now", "parameters": {}}], False),
        ("required", True, [], False),
        ("required", True, [{"name": "other", "parameters": {}}], False),
        ("required", True, [{"name": "get_weather", "parameters": {"city": "Bonn"}}], False),
        ("required", True, [{"name": "get_weather", "parameters": {}}], False),
        (NAMED, True, PARIS, True),
        (NAMED, True, [{"name": "now", "parameters": {}}], False),
        (NAMED, True, PARIS * 2, False),
    ],
)
def test_schema_of_calls(choice: Any, parallel: bool, answer: Any, valid: bool) -> None:
    validator = jsonschema_rs.validator_for(schema_of(choice, parallel=parallel))
    assert validator.is_valid(answer) is valid


def strict(tool: Any) -> Any:
    return {"type": "function", "function": {**tool["function"], "strict": True}}


def test_strict_tools_hold_calls_to_their_schema_but_leave_answers_free() -> None:
    plan = ToolPlan.of(tools(strict(WEATHER), NOW), "auto", parser_name="qwen25")
    assert plan.may_answer
    assert plan.constraint is not None
    assert plan.constraint.name == "structural_tag"
    tag = json.loads(plan.constraint.value)
    assert tag["triggers"] == ["<tool_call>"]
    weather, now = tag["structures"]
    assert (weather["schema"], now["schema"]) == (CITY, {"type": "object"})
    # What the tag makes the model write is what the parser reads.
    assert plan.parser is not None
    written = weather["begin"] + '{"city": "Rome"}' + weather["end"]
    [call] = plan.parser.parse(written, plan.names).calls
    assert (call.name, call.arguments) == ("get_weather", '{"city": "Rome"}')


def test_strict_is_refused_where_it_cannot_be_kept() -> None:
    with pytest.raises(RequestError, match="strict cannot be kept"):
        ToolPlan.of(tools(strict(WEATHER)), "auto", parser_name="llama3")
    ToolPlan.of(tools(strict(WEATHER)), "required", parser_name="llama3")


def test_a_response_format_goes_before_strict_tools(serve: Any) -> None:
    with serve(tool_call_parser="hermes") as served:
        served.engine.says("{}")
        body: Any = {"messages": HI, "tools": [strict(WEATHER)]}
        served.client.post("/v1/chat/completions", json=body).raise_for_status()
        assert served.engine.last_request.sampling.structural_tag
        body["response_format"] = {"type": "json_object"}
        served.client.post("/v1/chat/completions", json=body).raise_for_status()
        sampling = served.engine.last_request.sampling
        assert (sampling.json_schema, sampling.structural_tag) == ('{"type": "object"}', None)


def test_two_tools_may_not_mean_different_things_by_a_name() -> None:
    other = {**CITY, "$defs": {"City": {"type": "integer"}}}
    both = tools(WEATHER, {"type": "function", "function": {"name": "b", "parameters": other}})
    with pytest.raises(RequestError, match=r"\$defs.City"):
        ToolPlan.of(both, "required")


@pytest.fixture
def engine(server: Any) -> Any:
    return server.engine


@pytest.fixture
def client(server: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=LIMIT_S)


@pytest.mark.parametrize("choice", ["required", NAMED], ids=["required", "named"])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_calls_that_must_come(
    client: openai.OpenAI, engine: Any, choice: Any, stream: bool
) -> None:
    """The server has no parser: a schema writes the calls."""
    engine.says(json.dumps(PARIS))
    asked: Any = {
        "model": "smollm2",
        "messages": HI,
        "tools": [WEATHER, NOW],
        "tool_choice": choice,
    }
    if stream:
        with client.chat.completions.stream(**asked) as events:
            completion: Any = events.get_final_completion()
    else:
        completion = client.chat.completions.create(**asked)
    assert json.loads(engine.last_request.sampling.json_schema) == schema_of(choice)
    [made] = completion.choices
    [call] = made.message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == (
        "get_weather",
        {"city": "Paris"},
    )
    assert made.finish_reason == "tool_calls"


def test_anthropic_and_responses_choose_tools_too(
    server: Any, client: openai.OpenAI, engine: Any
) -> None:
    engine.says(json.dumps(PARIS))
    response = client.responses.create(
        model="smollm2",
        input="Hi",
        tools=[{"type": "function", "strict": False, **WEATHER["function"]}],
        tool_choice={"type": "function", "name": "get_weather"},
    )
    item: Any = response.output[0]
    assert (item.type, item.name) == ("function_call", "get_weather")
    message = anthropic.Anthropic(base_url=server.url, api_key="none").messages.create(
        model="smollm2",
        max_tokens=50,
        messages=HI,
        tools=[{"name": "get_weather", "input_schema": CITY}],
        tool_choice={"type": "any"},
    )
    block: Any = message.content[0]
    assert (block.type, block.input) == ("tool_use", {"city": "Paris"})


FORMAT: Any = {"type": "json_schema", "json_schema": {"name": "city", "schema": CITY}}


def test_formats_reach_the_engine_from_every_surface(
    server: Any, client: openai.OpenAI, engine: Any
) -> None:
    client.chat.completions.create(model="smollm2", messages=HI, response_format=FORMAT)
    client.completions.create(model="smollm2", prompt="Hi", extra_body={"response_format": FORMAT})
    client.responses.create(
        model="smollm2",
        input="Hi",
        text={"format": {"type": "json_schema", "name": "city", "schema": CITY}},
    )
    anthropic.Anthropic(base_url=server.url, api_key="none").messages.create(
        model="smollm2",
        max_tokens=50,
        messages=HI,
        output_config={"format": {"type": "json_schema", "schema": CITY}},
    )
    schemas = [request.sampling.json_schema for request in engine.scheduler.received]
    assert [json.loads(schema) for schema in schemas] == [CITY] * 4


@pytest.mark.parametrize("name", ["regex", "ebnf", "json_schema"])
def test_constraints_may_be_written_as_such(client: openai.OpenAI, engine: Any, name: str) -> None:
    value = "{}" if name == "json_schema" else "a+"
    client.chat.completions.create(model="smollm2", messages=HI, extra_body={name: value})
    assert getattr(engine.last_request.sampling, name) == value


def test_a_constrained_answer_has_no_thoughts(serve: Any, plain_template: str) -> None:
    with serve(template=plain_template, reasoning_parser="deepseek-r1") as served:
        served.engine.says('{"a": 1}')
        body = {"messages": HI, "response_format": {"type": "json_object"}}
        got = served.client.post("/v1/chat/completions", json=body).json()
    message = got["choices"][0]["message"]
    assert (message["content"], message["reasoning_content"]) == ('{"a": 1}', None)
