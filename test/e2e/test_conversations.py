"""Two-turn conversations, four at once: the second turn finds the first in the cache."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import openai
import pytest

from benchmark.conversation import Turn, follow_up_ids, opening_ids, reusable_tokens

QUESTIONS = [
    ("Why is the sky blue?", "And why is it red in the evening?"),
    ("Name three animals that live in the sea.", "Which of them is the largest?"),
    ("Write a function that adds two numbers in Python.", "Now let it add three."),
    ("What is the capital of Portugal?", "How many people live there?"),
]
MAX_TOKENS = 32
LIMIT_S = 120.0


@dataclass(frozen=True)
class Reply:
    text: str
    usage: Any
    finish_reason: str


@pytest.fixture(scope="module")
def chat(server: Any) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=f"{server.base_url}/v1", api_key="none", timeout=LIMIT_S, max_retries=0
    ) as client:
        yield client


def test_generate(client: Any, tokenizer: Any) -> None:
    params = {"temperature": 0, "max_new_tokens": MAX_TOKENS}

    def ask(turn: Turn) -> Turn:
        answer = client.generate(turn.prompt_ids, params)
        turn.output_ids = answer["output_ids"]
        info = answer["meta_info"]
        turn.cached_tokens = info["cached_tokens"]
        assert info["prompt_tokens"] == len(turn.prompt_ids)
        assert info["completion_tokens"] == len(turn.output_ids)
        return turn

    def hold(questions: tuple[str, str]) -> tuple[Turn, Turn]:
        opening, follow_up = questions
        first = ask(Turn(opening, opening_ids(tokenizer, opening)))
        return first, ask(Turn(follow_up, follow_up_ids(tokenizer, first, follow_up)))

    client.flush_cache()
    with ThreadPoolExecutor(len(QUESTIONS)) as pool:
        conversations = list(pool.map(hold, QUESTIONS))
    for first, second in conversations:
        assert second.cached_tokens == reusable_tokens(first)


def test_chat_completions(client: Any, chat: openai.OpenAI) -> None:
    def hold(questions: tuple[str, str]) -> list[tuple[list[Any], Reply]]:
        messages: list[Any] = []
        turns = []
        for question in questions:
            messages.append({"role": "user", "content": question})
            reply = streamed(chat, messages)
            turns.append((list(messages), reply))
            messages.append({"role": "assistant", "content": reply.text})
        return turns

    client.flush_cache()
    with ThreadPoolExecutor(len(QUESTIONS)) as pool:
        conversations = list(pool.map(hold, QUESTIONS))
    for (_, first), (_, second) in conversations:
        assert cached(second) >= first.usage.prompt_tokens
    for messages, reply in (turn for turns in conversations for turn in turns):
        assert reply.text.strip()
        assert_usage_adds_up(client, messages, reply)
        assert_same_without_stream(chat, messages, reply)


def streamed(chat: openai.OpenAI, messages: list[Any]) -> Reply:
    """A reply put together from its deltas."""
    stream = chat.chat.completions.create(
        model="default",
        messages=messages,
        temperature=0,
        max_tokens=MAX_TOKENS,
        stream=True,
        stream_options={"include_usage": True},
    )
    *chunks, last = list(stream)
    assert last.choices == [] and last.usage is not None
    choices = [choice for chunk in chunks for choice in chunk.choices]
    assert choices[0].delta.role == "assistant"
    reasons = [choice.finish_reason for choice in choices]
    assert reasons[:-1] == [None] * (len(reasons) - 1) and reasons[-1] is not None
    pieces = [choice.delta.content or "" for choice in choices]
    assert sum(map(bool, pieces)) > 1, "the text came in one piece"
    return Reply("".join(pieces), last.usage, reasons[-1])


def cached(reply: Reply) -> int:
    return int(reply.usage.prompt_tokens_details.cached_tokens)


def assert_usage_adds_up(client: Any, messages: list[Any], reply: Reply) -> None:
    usage = reply.usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert 0 < usage.completion_tokens <= MAX_TOKENS
    assert (usage.completion_tokens == MAX_TOKENS) or reply.finish_reason == "stop"
    assert cached(reply) < usage.prompt_tokens
    response = client.http.post("/tokenize", json={"messages": messages})
    assert usage.prompt_tokens == response.json()["count"]


def assert_same_without_stream(chat: openai.OpenAI, messages: list[Any], reply: Reply) -> None:
    whole = chat.chat.completions.create(
        model="default", messages=messages, temperature=0, max_tokens=MAX_TOKENS
    )
    [choice] = whole.choices
    assert choice.message.content == reply.text
    assert choice.finish_reason == reply.finish_reason
    assert whole.usage is not None
    assert whole.usage.completion_tokens == reply.usage.completion_tokens
    assert cached(Reply("", whole.usage, "")) == whole.usage.prompt_tokens - 1
