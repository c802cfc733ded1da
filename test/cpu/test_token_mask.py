"""Forbidden tokens cannot be chosen, whichever way a token is made."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sglang.srt.constrained.grammar import words_of
from sglang.srt.layers import token_mask
from sglang.srt.layers.token_mask import forbid
from sglang.srt.model_executor.host_batch import HostBatch, SampleWish, TokenMask
from sglang.srt.model_executor.model_runner import ModelRunner
from sglang.srt.sampling_params import SamplingParams


def words(sets: list[set[int]], vocab_size: int) -> torch.Tensor:
    return torch.from_numpy(np.stack([words_of(allowed, vocab_size) for allowed in sets]))


@given(data=st.data(), vocab_size=st.integers(1, 100), padding=st.sampled_from([0, 40]))
def test_exactly_the_forbidden_tokens_of_the_named_rows_get_minus_infinity(
    data, vocab_size, padding
):
    reqs = data.draw(st.integers(1, 6))
    rows = data.draw(st.permutations(range(reqs)))[: data.draw(st.integers(1, reqs))]
    sets = [data.draw(st.sets(st.integers(0, vocab_size - 1))) for _ in rows]
    logits = torch.randn(reqs, vocab_size)
    expected = logits.clone()
    for row, allowed in zip(rows, sets, strict=True):
        for token in range(vocab_size):
            if token not in allowed:
                expected[row, token] = -torch.inf
    forbid(logits, torch.tensor(rows), words(sets, vocab_size + padding))
    assert torch.equal(logits, expected)


def test_many_rows_are_masked_part_by_part(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(token_mask, "_PART_TOKENS", 2 * 50)
    logits = torch.zeros(7, 50)
    forbid(logits, torch.arange(7), words([{row} for row in range(7)], 50))
    assert torch.isfinite(logits).sum(dim=1).tolist() == [1] * 7
    assert logits.argmax(dim=1).tolist() == list(range(7))


def test_too_few_bits_are_told():
    with pytest.raises(ValueError, match="1 words for 33 tokens"):
        forbid(torch.zeros(1, 33), torch.tensor([0]), torch.zeros(1, 1, dtype=torch.int32))


class _Config:
    vocab_size = 50
    num_layers = 1
    context_length = 8


class _Model:
    config = _Config


def batch_of(wishes: list[SampleWish], decode: bool, mask: TokenMask | None) -> HostBatch:
    """As far as choosing looks at it."""
    reqs = len(wishes)
    ints = np.zeros(reqs, dtype=np.int64)
    fields = {field.name: ints for field in dataclasses.fields(HostBatch) if field.type == "Ints"}
    return HostBatch(decode_reqs=reqs if decode else 0, samples=tuple(wishes), mask=mask, **fields)


@pytest.mark.parametrize("decode", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 0.0},
        {"temperature": 1.0},
        {"temperature": 5.0, "top_k": 3},
        {"temperature": 5.0, "top_p": 0.2},
        {"temperature": 1.0, "min_p": 0.5, "top_p": 0.9},
    ],
)
def test_a_masked_row_gets_an_allowed_token_however_it_is_chosen(decode, dtype, sampling):
    runner = ModelRunner(_Model(), None, {}, device=torch.device("cpu"), num_rows=8)
    wishes = [SampleWish(SamplingParams(**sampling), seed) for seed in range(5)]
    allowed = [{1, 2}, {49}, set(range(0, 50, 7))]
    rows = np.array([0, 2, 4])
    mask = TokenMask(rows, words(allowed, 50).numpy())
    for _ in range(20):
        logits = (torch.randn(5, 50) * 8).to(dtype)
        free = logits.clone()
        batch, plain = batch_of(wishes, decode, mask), batch_of(wishes, decode, None)
        chosen, unmasked = runner.new_result(batch), runner.new_result(plain)
        where = torch.arange(5)
        runner.choose(plain, free, where, where, unmasked)
        runner.choose(batch, logits, where, where, chosen)
        for row, tokens in zip(rows.tolist(), allowed, strict=True):
            assert int(chosen[row]) in tokens
        # The rows beside them are not touched.
        assert chosen[[1, 3]].tolist() == unmasked[[1, 3]].tolist()
        assert runner.relay[:5].tolist() == chosen.tolist()
