"""Greedy tokens of a multiplexing server under load against transformers, cold and from the cache.

How they are compared is said in benchmark/greedy.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from benchmark.greedy import TIE, Answered, Ids, Reference, ask_all, twenty_prompts

NEW_TOKENS = 64
RIDING_NEW_TOKENS = 16
REUSED_NEW_TOKENS = 24
AT_ONCE = 8
MAX_PROMPTS_WITH_TIES = 3


@pytest.fixture(scope="module")
def texts(tokenizer: Any) -> list[str]:
    return twenty_prompts(tokenizer)


@pytest.fixture(scope="module")
def ask(server: Any) -> Callable[[Sequence[str | Ids], int], list[Answered]]:
    """Sends the prompts, eight at a time."""
    return lambda prompts, new_tokens: ask_all(
        server.base_url, prompts, new_tokens, at_once=AT_ONCE
    )


@dataclass(frozen=True)
class ColdRun:
    answers: list[Answered]
    both_busy_s: float


@pytest.fixture(scope="module")
def cold(server: Any, texts: list[str], ask: Callable[..., list[Answered]]) -> ColdRun:
    """Every prompt answered with an empty cache behind it, the phases side by side."""
    policy = server.client.http.get("/pd_multiplex/policy").json()
    side_by_side = {"policy": "adaptive:split-only"}
    server.client.http.post("/pd_multiplex/policy", json=side_by_side).raise_for_status()
    server.client.flush_cache()
    before_s = server.client.state()["pd_multiplex"]["both_busy_s"]
    answers = ask(texts, NEW_TOKENS)
    after_s = server.client.state()["pd_multiplex"]["both_busy_s"]
    server.client.http.post("/pd_multiplex/policy", json=policy).raise_for_status()
    return ColdRun(answers, after_s - before_s)


def check(reference: Reference, answers: list[Answered]) -> None:
    """All answers are the reference's, but for few ties."""
    with_ties = [a.prompt for a in answers if reference.ties(a.prompt, a.output)]
    print(f"{len(answers)} answers, {len(with_ties)} with logits within {TIE:g} of each other")
    assert len(with_ties) <= MAX_PROMPTS_WITH_TIES


def test_cold(cold: ColdRun, reference: Reference, texts: list[str], tokenizer: Any) -> None:
    prompts = [answered.prompt for answered in cold.answers]
    assert prompts == [tokenizer(text)["input_ids"] for text in texts]
    lengths = sorted(map(len, prompts))
    assert len(lengths) == 20 and lengths[0] <= 5 and lengths[-1] >= 250
    check(reference, cold.answers)


def test_prefill_and_decode_ran_at_once(cold: ColdRun) -> None:
    assert cold.both_busy_s > 0


def test_same_prompts_again(
    cold: ColdRun, reference: Reference, ask: Callable[..., list[Answered]]
) -> None:
    prompts = [answered.prompt for answered in cold.answers]
    answers = ask(prompts, REUSED_NEW_TOKENS)
    assert [a.cached_tokens for a in answers] == [len(prompt) - 1 for prompt in prompts]
    check(reference, answers)


def test_prompts_with_part_of_their_answers(
    cold: ColdRun, reference: Reference, ask: Callable[..., list[Answered]]
) -> None:
    known = [1 + (7 * i) % (NEW_TOKENS - 1) for i in range(len(cold.answers))]
    prompts = [a.prompt + a.output[:count] for a, count in zip(cold.answers, known, strict=True)]
    answers = ask(prompts, REUSED_NEW_TOKENS)
    assert [a.cached_tokens for a in answers] == [len(prompt) - 1 for prompt in prompts]
    check(reference, answers)


def test_beginnings_of_prompts_with_another_end(
    cold: ColdRun,
    reference: Reference,
    tokenizer: Any,
    ask: Callable[..., list[Answered]],
) -> None:
    end = tokenizer("\n\nBut that is not the whole story. As it turns out,")["input_ids"]
    kept = [1 + (11 * i) % len(a.prompt) for i, a in enumerate(cold.answers)]
    prompts = [a.prompt[:count] + end for a, count in zip(cold.answers, kept, strict=True)]
    answers = ask(prompts, REUSED_NEW_TOKENS)
    for answered, count in zip(answers, kept, strict=True):
        assert count <= answered.cached_tokens < len(answered.prompt)
    check(reference, answers)


def test_prompts_that_ride_in_decode_steps(
    launch: Callable[..., Any], smollm2: Path, reference: Reference, texts: list[str]
) -> None:
    """A server that never divides its device: short prompts, and two that take several steps."""
    policy = ["--enable-mixed-chunk", "--chunked-prefill-size=64"]
    server = launch(
        smollm2, *policy, "--dtype=float32", "--context-length=1024", "--max-total-tokens=8K"
    ).ready()
    answers = ask_all(
        server.base_url, texts[:3] + texts[-2:], RIDING_NEW_TOKENS, at_once=AT_ONCE // 2
    )
    check(reference, answers)
    lanes = server.client.state()["pd_multiplex"]
    assert lanes["fused_busy_s"] > 0
    assert lanes["prefill_busy_s"] == 0
    assert not lanes["enabled"] and len(lanes["partitions"]) == 1
