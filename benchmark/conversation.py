"""A two-turn conversation over POST /generate, driven by token ids and timed by its stream.

Turn 2 sends exactly the ids of turn 1's prompt and answer followed by the next question, so what
the server finds in its prefix cache can be predicted to the token.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import aiohttp

_ANSWER_MARK = "\x00answer\x00"


class ChatTokenizer(Protocol):
    """The part of a transformers tokenizer that a conversation needs."""

    def apply_chat_template(
        self, conversation: list[dict[str, str]], *, tokenize: bool, add_generation_prompt: bool
    ) -> Any: ...

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]: ...


@dataclass(frozen=True, slots=True)
class Script:
    """What the user says: an opening, perhaps with a document in it, and a follow-up."""

    name: str
    opening: str
    follow_up: str
    document: str = ""


@dataclass(slots=True)
class Turn:
    """One question and its answer. Times in ms, seen by the client."""

    question: str
    prompt_ids: list[int]
    answer: str = ""
    output_ids: list[int] = field(default_factory=list)
    cached_tokens: int = 0
    ttft_ms: float = 0.0
    tbt_ms: list[float] = field(default_factory=list)

    @property
    def tbt_median_ms(self) -> float:
        return percentile(self.tbt_ms, 50)

    @property
    def tbt_p99_ms(self) -> float:
        return percentile(self.tbt_ms, 99)


class GenerateError(Exception):
    """The server answered with an error or ended a stream early."""


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that at least `percent` % of the values do not exceed; 0.0 of none."""
    if not values:
        return 0.0
    rank = max(1, math.ceil(len(values) * percent / 100))
    return sorted(values)[rank - 1]


def opening_ids(tokenizer: ChatTokenizer, text: str) -> list[int]:
    """The ids of a conversation's first prompt."""
    messages = [{"role": "user", "content": text}]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tokenizer.encode(rendered, add_special_tokens=False)


def follow_up_ids(tokenizer: ChatTokenizer, first: Turn, question: str) -> list[int]:
    """The ids of the second prompt: all of turn 1 unchanged, then what the template adds."""
    messages = [
        {"role": "user", "content": first.question},
        {"role": "assistant", "content": _ANSWER_MARK},
        {"role": "user", "content": question},
    ]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    tail = tokenizer.encode(rendered.partition(_ANSWER_MARK)[2], add_special_tokens=False)
    if first.output_ids and tail[:1] == first.output_ids[-1:]:
        del tail[0]  # the model ended its turn itself
    return first.prompt_ids + first.output_ids + tail


def reusable_tokens(first: Turn) -> int:
    """How much of turn 2's prompt the cache must hold at least.

    Keys and values of the last generated token were never computed: nothing came after it.
    """
    return len(first.prompt_ids) + len(first.output_ids) - 1


def token_gaps_ms(arrivals: Iterable[tuple[float, int]]) -> tuple[float, list[float]]:
    """From (seconds since the request, tokens so far) of each event to TTFT and the time between
    tokens. An event with several tokens counts as that many equal gaps."""
    ttft_ms, gaps_ms = 0.0, []
    last_s, last_tokens = 0.0, 0
    for at_s, tokens in arrivals:
        fresh = tokens - last_tokens
        if fresh <= 0:
            continue
        if last_tokens == 0:
            ttft_ms = at_s * 1000
        else:
            gaps_ms += [(at_s - last_s) * 1000 / fresh] * fresh
        last_s, last_tokens = at_s, tokens
    return ttft_ms, gaps_ms


async def ask(
    session: aiohttp.ClientSession,
    turn: Turn,
    *,
    max_new_tokens: int,
    on_token: Callable[[int], None],
) -> None:
    """Sends one turn and fills in its answer and times; calls `on_token` with each new count.

    Raises GenerateError with the server's own words.
    """
    body = {
        "input_ids": turn.prompt_ids,
        "sampling_params": {"temperature": 0, "max_new_tokens": max_new_tokens},
        "stream": True,
    }
    started_s = time.monotonic()
    arrivals: list[tuple[float, int]] = []
    final: dict[str, Any] = {}
    async with session.post("/generate", json=body) as response:
        if response.status != 200:
            raise GenerateError(f"HTTP {response.status}: {await response.text()}")
        async for line in response.content:
            event = parse_event(line)
            if event is None:
                continue
            tokens = event["meta_info"]["completion_tokens"]
            on_token(tokens - (arrivals[-1][1] if arrivals else 0))
            arrivals.append((time.monotonic() - started_s, tokens))
            final = event
    finish = final.get("meta_info", {}).get("finish_reason")
    if finish is None or finish["type"] == "abort":
        raise GenerateError(f"the stream ended without an answer: {finish}")
    turn.answer = final["text"]
    turn.output_ids = final["output_ids"]
    turn.cached_tokens = final["meta_info"]["cached_tokens"]
    turn.ttft_ms, turn.tbt_ms = token_gaps_ms(arrivals)


def parse_event(line: bytes) -> dict[str, Any] | None:
    """The object of one server-sent line; None for blank lines and [DONE]."""
    if not line.startswith(b"data:"):
        return None
    data = line.removeprefix(b"data:").strip()
    if data == b"[DONE]":
        return None
    event: dict[str, Any] = json.loads(data)
    if "error" in event:
        raise GenerateError(f"error in the stream: {event['error']}")
    return event
