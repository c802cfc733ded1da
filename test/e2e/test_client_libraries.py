"""OpenAI's and Anthropic's own clients against the real server: what needs a model that chooses.

How answers look is tested in test/cpu/frontend with a scripted engine.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import jsonschema_rs
import openai
import pytest

ASK: Any = [{"role": "user", "content": "What is the weather in Paris, and what time is it?"}]
CITY: Any = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "enum": ["Paris", "London", "Rome"]},
        "days": {"type": "integer", "enum": [1, 2, 3]},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
ZONE: Any = {
    "type": "object",
    "properties": {"zone": {"type": "string", "enum": ["UTC", "CET"]}},
    "required": ["zone"],
    "additionalProperties": False,
}
WEATHER: Any = {"type": "function", "function": {"name": "get_weather", "parameters": CITY}}
NOW: Any = {"type": "function", "function": {"name": "now", "parameters": ZONE}}
LIMIT_S = 120.0


@pytest.fixture
def openai_client(client: Any, server: Any) -> Iterator[openai.OpenAI]:
    url = f"{server.base_url}/v1"
    with openai.OpenAI(base_url=url, api_key="none", timeout=LIMIT_S, max_retries=0) as it:
        yield it


@pytest.fixture
def anthropic_client(client: Any, server: Any) -> Iterator[anthropic.Anthropic]:
    url = server.base_url
    with anthropic.Anthropic(base_url=url, api_key="none", timeout=LIMIT_S, max_retries=0) as it:
        yield it


@pytest.fixture
def model(openai_client: openai.OpenAI) -> str:
    [card] = openai_client.models.list()
    return card.id


def check_city(text: str) -> None:
    assert jsonschema_rs.is_valid(CITY, json.loads(text)), text


@pytest.mark.parametrize("stream", [False, True])
def test_a_required_tool_is_called_with_valid_arguments(
    openai_client: openai.OpenAI, model: str, stream: bool
) -> None:
    asked: Any = {
        "model": model,
        "messages": ASK,
        "tools": [WEATHER, NOW],
        "tool_choice": "required",
        "parallel_tool_calls": False,
        "temperature": 0,
        "max_completion_tokens": 100,
    }
    if stream:
        with openai_client.chat.completions.stream(**asked) as events:
            completion: Any = events.get_final_completion()
    else:
        completion = openai_client.chat.completions.create(**asked)
    [choice] = completion.choices
    [call] = choice.message.tool_calls
    assert choice.finish_reason == "tool_calls"
    schema = {"get_weather": CITY, "now": ZONE}[call.function.name]
    assert jsonschema_rs.is_valid(schema, json.loads(call.function.arguments))


def test_a_named_tool_is_the_one_that_is_called(
    openai_client: openai.OpenAI, anthropic_client: anthropic.Anthropic, model: str
) -> None:
    completion: Any = openai_client.chat.completions.create(
        model=model,
        messages=ASK,
        tools=[NOW, WEATHER],
        tool_choice={"type": "function", "function": {"name": "get_weather"}},
        temperature=0,
    )
    [call] = completion.choices[0].message.tool_calls
    assert call.function.name == "get_weather"
    check_city(call.function.arguments)
    with anthropic_client.messages.stream(
        model=model,
        max_tokens=100,
        messages=ASK,
        tools=[{"name": "get_weather", "input_schema": CITY}],
        tool_choice={"type": "tool", "name": "get_weather"},
    ) as events:
        message: Any = events.get_final_message()
    assert message.stop_reason == "tool_use"
    [block] = message.content
    assert jsonschema_rs.is_valid(CITY, block.input)


def test_answers_follow_a_schema(openai_client: openai.OpenAI, model: str) -> None:
    response_format: Any = {
        "type": "json_schema",
        "json_schema": {"name": "city", "schema": CITY, "strict": True},
    }
    chat = openai_client.chat.completions.create(
        model=model, messages=ASK, response_format=response_format, temperature=1, seed=3, n=2
    )
    for choice in chat.choices:
        check_city(choice.message.content or "")
    completion = openai_client.completions.create(
        model=model,
        prompt="A city:",
        max_tokens=200,  # more than all whitespace that is allowed
        extra_body={"response_format": response_format},
    )
    check_city(completion.choices[0].text)
    response = openai_client.responses.create(
        model=model,
        input="A city?",
        text={"format": {"type": "json_schema", "name": "city", "schema": CITY}},
    )
    check_city(response.output_text)


def test_a_schema_that_cannot_be_followed_is_a_bad_request(
    openai_client: openai.OpenAI, model: str
) -> None:
    wrong: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "cat"}}}
    with pytest.raises(openai.BadRequestError):
        openai_client.chat.completions.create(model=model, messages=ASK, response_format=wrong)


def test_log_probabilities_agree_between_the_two_forms(
    openai_client: openai.OpenAI, model: str
) -> None:
    prompt = "The capital of France is"
    got = openai_client.completions.create(
        model=model, prompt=prompt, logprobs=3, echo=True, max_tokens=3, temperature=0
    )
    [choice] = got.choices
    logprobs: Any = choice.logprobs
    assert choice.text == "".join(logprobs.tokens)
    assert logprobs.token_logprobs[0] is None
    # What was chosen greedily is the likeliest of its alternatives.
    for token, value, top in list(
        zip(logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True)
    )[-3:]:
        assert value == max(top.values())
        assert top[token] == value
    # What the prompt's end says of its next token is what that token had when it was chosen.
    again = openai_client.completions.create(
        model=model, prompt=choice.text, logprobs=0, echo=True, max_tokens=0
    )
    second: Any = again.choices[0].logprobs
    assert second.token_logprobs[1:] == pytest.approx(logprobs.token_logprobs[1:], abs=1e-3)
    chat = openai_client.chat.completions.create(
        model=model,
        messages=ASK,
        logprobs=True,
        top_logprobs=2,
        temperature=0,
        max_completion_tokens=5,
    )
    entries = (chat.choices[0].logprobs and chat.choices[0].logprobs.content) or []
    assert len(entries) == 5
    assert all(entry.logprob == entry.top_logprobs[0].logprob for entry in entries)


def test_scores_are_probabilities_of_labels(client: Any) -> None:
    tokens = client.http.post("/tokenize", json={"prompt": [" Paris", " London"]}).json()["tokens"]
    labels = [ids[0] for ids in tokens]
    body = {
        "query": "The capital of France is",
        "items": ["", " not"],
        "label_token_ids": labels,
        "apply_softmax": True,
    }
    first, second = client.http.post("/v1/score", json=body).json()["scores"]
    assert sum(first) == pytest.approx(1)
    assert sum(second) == pytest.approx(1)
    assert first[0] > 0.9


def test_a_conversation_in_each_api_has_the_same_prompt(
    openai_client: openai.OpenAI, anthropic_client: anthropic.Anthropic, model: str
) -> None:
    chat: Any = openai_client.chat.completions.create(
        model=model,
        messages=[{"role": "system", "content": "Be brief."}, *ASK],
        temperature=0,
        max_completion_tokens=8,
    )
    response: Any = openai_client.responses.create(
        model=model,
        instructions="Be brief.",
        input=ASK,
        temperature=0,
        max_output_tokens=8,
    )
    message: Any = anthropic_client.messages.create(
        model=model,
        system="Be brief.",
        messages=ASK,
        max_tokens=8,
        extra_body={"temperature": 0},
    )
    counted = anthropic_client.messages.count_tokens(model=model, system="Be brief.", messages=ASK)
    text = chat.choices[0].message.content
    assert text
    assert response.output_text == message.content[0].text == text
    usage = message.usage
    assert (
        chat.usage.prompt_tokens
        == response.usage.input_tokens
        == usage.input_tokens + usage.cache_read_input_tokens
        == counted.input_tokens
    )
