"""Ids of requests and checks of prompts, without any process."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang.srt.errors import RequestError
from sglang.srt.managers.prompts import (
    Limits,
    Prompt,
    PromptEncoder,
    TokenizedPrompt,
    namespace_of,
)
from sglang.srt.managers.request_ids import WireIds, public_ids
from sglang.srt.sampling_params import SamplingParams


@pytest.mark.parametrize(
    ("rid", "answers", "ids"),
    [
        ("a", [1], ["a"]),
        ("a", [1, 1], ["a_0", "a_1"]),
        ("a", [2], ["a_0", "a_1"]),
        (["x", "y"], [1, 1], ["x", "y"]),
        (["x", "y"], [2, 1], ["x_0", "x_1", "y"]),
    ],
)
def test_public_ids(rid: str | list[str], answers: list[int], ids: list[str]) -> None:
    assert public_ids(rid, answers) == ids


@pytest.mark.parametrize(
    ("rid", "answers"), [("", [1]), (["x"], [1, 1]), (["x", "x"], [1, 1]), (["x", "x_0"], [2, 1])]
)
def test_public_ids_refused(rid: str | list[str], answers: list[int]) -> None:
    with pytest.raises(RequestError, match="rid") as caught:
        public_ids(rid, answers)
    assert caught.value.field == "rid"


@given(st.lists(st.text(max_size=3), min_size=2, max_size=20))
def test_no_wire_id_begins_another(names: list[str]) -> None:
    wire = WireIds()
    ids = [wire.make(name) for name in names]
    assert not any(a is not b and b.startswith(a) for a in ids for b in ids)


KEYS = st.one_of(st.none(), st.text(max_size=4))


@given(KEYS, KEYS, KEYS, KEYS)
def test_namespaces_of_different_keys_differ(
    key_a: str | None, salt_a: str | None, key_b: str | None, salt_b: str | None
) -> None:
    same = ((key_a or "", salt_a or "")) == ((key_b or "", salt_b or ""))
    assert (namespace_of(key_a, salt_a) == namespace_of(key_b, salt_b)) == same


def encode(tokenizer: Any, prompt: Prompt, **limits: Any) -> TokenizedPrompt:
    encoder = PromptEncoder(tokenizer, Limits(**{"vocab_size": 50, "context_length": 10, **limits}))
    try:
        [tokenized] = asyncio.run(encoder.encode([prompt]))
        return tokenized
    finally:
        encoder.close()


def ids_prompt(length: int, **sampling: Any) -> Prompt:
    return Prompt(SamplingParams(**sampling), input_ids=[1] * length, field="input_ids")


def test_no_limit_means_the_rest_of_the_context() -> None:
    assert encode(None, ids_prompt(4, max_new_tokens=None)).sampling.max_new_tokens == 6


def test_prompt_and_answer_may_fill_the_context() -> None:
    assert encode(None, ids_prompt(4, max_new_tokens=6)).sampling.max_new_tokens == 6


@pytest.mark.parametrize(
    ("prompt", "field"),
    [
        (ids_prompt(0), "input_ids"),
        (ids_prompt(10, max_new_tokens=0), "input_ids"),
        (ids_prompt(4, max_new_tokens=7), "max_new_tokens"),
        (Prompt(SamplingParams(), input_ids=[1, 50], field="prompt"), "prompt"),
        (Prompt(SamplingParams(), input_ids=[-1], field="prompt"), "prompt"),
        (Prompt(SamplingParams(), text="words"), "text"),
    ],
)
def test_refused(prompt: Prompt, field: str) -> None:
    with pytest.raises(RequestError, match=field) as caught:
        encode(None, prompt)
    assert caught.value.field == field


def test_auto_truncation_leaves_room_for_a_token() -> None:
    tokenized = encode(None, ids_prompt(25, max_new_tokens=5, min_new_tokens=3), auto_truncate=True)
    assert len(tokenized.input_ids) == 9
    assert tokenized.sampling.max_new_tokens == 1
    assert tokenized.sampling.min_new_tokens == 1


def test_long_texts_do_not_hold_up_the_loop(tokenizer: Any) -> None:
    """The loop goes on turning while a long text is tokenised in the worker."""
    text = "many words " * 20_000
    encoder = PromptEncoder(tokenizer, Limits(49152, 1_000_000))

    async def main() -> tuple[int, list[int]]:
        turns = 0
        task = asyncio.create_task(encoder.tokenize([text]))
        while not task.done():
            turns += 1
            await asyncio.sleep(0)
        return turns, (await task)[0]

    turns, ids = asyncio.run(main())
    encoder.close()
    assert turns > 5
    assert ids == tokenizer(text)["input_ids"]
