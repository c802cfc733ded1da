"""Slo: how soon a request wants its first token and each one after it."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Slo:
    """Seconds; infinity asks for nothing.

    The first token is due after the longer of ttft_s and ttft_per_token_s for each prompt token
    that was not cached; every other one tbt_s after the one before it.
    """

    ttft_s: float = math.inf
    ttft_per_token_s: float = 0.0
    tbt_s: float = math.inf

    def __post_init__(self) -> None:
        if not (self.ttft_s > 0 and self.ttft_per_token_s >= 0 and self.tbt_s > 0):
            raise ValueError(f"an SLO must be positive: {self}")

    def ttft_limit_s(self, uncached_tokens: int) -> float:
        """Of a request whose prompt has so many tokens outside the prefix cache."""
        return max(self.ttft_s, self.ttft_per_token_s * uncached_tokens)
