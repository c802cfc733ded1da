"""What a latency depends on: the sizes of a prefill batch and of a decode step."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PrefillShape:
    """Prompts, or parts of them, that run together: n new tokens each, behind r cached ones.

    tokens = sum(n), squares = sum(n^2), cross = sum(n * r); the last two are what attention
    costs (Drift, equation 1).
    """

    tokens: int
    squares: int
    cross: int
    requests: int = 1

    @classmethod
    def of(cls, parts: Iterable[tuple[int, int]]) -> PrefillShape:
        """parts: (n, r) of each prompt."""
        tokens = squares = cross = requests = 0
        for new, cached in parts:
            tokens += new
            squares += new * new
            cross += new * cached
            requests += 1
        return cls(tokens, squares, cross, requests)


@dataclass(frozen=True, slots=True)
class DecodeShape:
    """A decode step: running requests, and the tokens that they attend to in all."""

    requests: int
    context: int


NOTHING_RUNNING = DecodeShape(0, 0)
