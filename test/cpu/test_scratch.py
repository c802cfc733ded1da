from __future__ import annotations

import itertools

import pytest
import torch

from sglang.srt.layers.linear import Linear
from sglang.srt.layers.matmul.base import TorchMatmul, WithScratch
from sglang.srt.layers.matmul.lane_matmul import LaneMatmul
from sglang.srt.layers.matmul.scratch import NO_SCRATCH, Scratch
from sglang.srt.layers.matmul.table import LaneTable

WIDTH = 24
MAX_TOKENS = 10
CPU = torch.device("cpu")


def gate_up(*, bias=False, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn((2 * WIDTH, 16), generator=generator, dtype=dtype)
    return Linear(weight, torch.randn(2 * WIDTH, generator=generator) if bias else None)


@pytest.fixture
def scratch():
    return Scratch(MAX_TOKENS, WIDTH, torch.float32, CPU)


def memory_of(tensor):
    return tensor.untyped_storage().data_ptr()


@pytest.mark.parametrize("tokens", [1, 7, MAX_TOKENS])
def test_both_results_lie_side_by_side_in_the_same_memory(scratch, tokens):
    x, weight = torch.zeros(tokens, 16), gate_up().weight
    activated, product = scratch.activated(x, weight), scratch.gate_up(x, weight)
    assert activated.shape == (tokens, WIDTH)
    assert product.shape == (tokens, 2 * WIDTH)
    assert activated.is_contiguous()
    assert product.is_contiguous()
    assert memory_of(activated) == memory_of(product) == memory_of(scratch.gate_up(x, weight))
    activated.fill_(1)
    product.fill_(2)
    assert (activated == 1).all()


def test_what_does_not_fit_is_new_memory(scratch):
    weight = gate_up().weight
    kept = memory_of(scratch.gate_up(torch.zeros(1, 16), weight))
    for x in (torch.zeros(MAX_TOKENS + 1, 16), torch.zeros(2, 16, dtype=torch.float64)):
        taken = scratch.gate_up(x, weight)
        assert taken.shape == (len(x), 2 * WIDTH)
        assert taken.dtype == x.dtype
        assert memory_of(taken) != kept
    x = torch.zeros(3, 16)
    activated, product = NO_SCRATCH.activated(x, weight), NO_SCRATCH.gate_up(x, weight)
    assert memory_of(activated) != memory_of(product)


@pytest.mark.parametrize(
    "matmul", [TorchMatmul(), LaneMatmul(16, LaneTable({}, {}), torch.float32)]
)
def test_results_are_those_without_scratch(scratch, matmul):
    plain = TorchMatmul()
    shared = WithScratch(matmul, scratch)
    for tokens, bias in itertools.product((0, 1, 7, MAX_TOKENS, MAX_TOKENS + 5), (False, True)):
        x, linear = torch.randn(tokens, 16), gate_up(bias=bias)
        torch.testing.assert_close(
            shared.gate_up_silu(x, linear), plain.gate_up_silu(x, linear), rtol=1e-6, atol=1e-6
        )
        torch.testing.assert_close(shared(x, linear), linear(x))


def test_lanes_that_share_scratch_take_the_same_memory(scratch):
    a, b = (WithScratch(TorchMatmul(), scratch) for _ in range(2))
    x, linear = torch.randn(4, 16), gate_up()
    assert memory_of(a.gate_up_silu(x, linear)) == memory_of(b.gate_up_silu(x, linear))
