"""When each conversation begins, in seconds from the start of the run."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from sglang.bench.workload import Conversation


def poisson_arrivals_s(count: int, rate_per_s: float, seed: int) -> list[float]:
    """The first at 0, then exponential gaps of mean 1 / rate; an infinite rate gives all zeros.

    Fixed in advance rather than slept gap by gap, so that a late start does not delay the rest.
    """
    if math.isinf(rate_per_s):
        return [0.0] * count
    gaps_s = np.random.default_rng(seed).exponential(1.0 / rate_per_s, max(0, count - 1))
    return [0.0, *np.cumsum(gaps_s).tolist()][:count]


def trace_arrivals_s(conversations: Sequence[Conversation], slowdown_factor: float) -> list[float]:
    """The trace's own times, stretched. Every conversation must have a trace_s."""
    arrivals_s: list[float] = []
    for conversation in conversations:
        assert conversation.trace_s is not None, "a trace data set sets trace_s"
        arrivals_s.append(conversation.trace_s * slowdown_factor)
    return arrivals_s
