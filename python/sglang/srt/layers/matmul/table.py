"""LaneTable: which kernel a lane takes for each product. Plain data: what a tuner finds, what a
cache keeps, what a LaneMatmul looks up."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from drift_scheduler.lane import Phase
from sglang.srt.layers.matmul.choice import Choice

DECODE_TOKENS = (16, 32, 64, 128, 256)
PREFILL_TOKENS = (64, 256, 512, 1024, 2048, 4096, 8192)
# Up to here a kernel's rows are laid out for a number of tokens: it must hold them all. Beyond, a
# kernel takes rows as they come, and one measured with fewer tokens serves more.
_CEILING_TOKENS = 256


class Shape(NamedTuple):
    """Of a weight [n, k]: comparable with a tensor's shape."""

    n: int
    k: int


@dataclass(frozen=True, slots=True)
class LaneTable:
    """products, by shape and measured number of tokens. fused: the same of gate and up projections
    with their activation, where one kernel for all wins."""

    products: Mapping[Shape, Mapping[int, Choice]]
    fused: Mapping[Shape, Mapping[int, Choice | None]]


def measured_tokens(phase: Phase, limit: int) -> tuple[int, ...]:
    """The numbers of tokens to measure for a phase that has up to `limit` at once."""
    ladder = DECODE_TOKENS if phase is Phase.DECODE else PREFILL_TOKENS
    return tuple(m for index, m in enumerate(ladder) if index == 0 or ladder[index - 1] < limit)


def rung(ladder: Sequence[int], m: int) -> int:
    """The index of the measured number of tokens, of rising ones, that stands for m."""
    if m <= _CEILING_TOKENS:
        return min(bisect_left(ladder, m), len(ladder) - 1)
    return max(bisect_right(ladder, m) - 1, 0)
