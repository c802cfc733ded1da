"""Jobs: what the gang drives; prefill goes through the layers in slices, a decode step whole."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from drift_scheduler.lane import Lane, Work
from drift_scheduler.shapes import DecodeShape, PrefillShape
from sglang.srt.model_executor.model_runner import Run
from sglang.srt.requests import Request


@dataclass(slots=True)
class Fill:
    """A request's part in a launch that fills prompts: its tokens start..end-1.

    scored: at which of them the next token's log-probability is to be told.
    """

    request: Request
    start: int
    end: int
    completes_prompt: bool
    scored: range = range(0)

    @property
    def tokens(self) -> int:
        return self.end - self.start

    @property
    def cached_tokens(self) -> int:
        """Tokens found in the prefix cache, if the request starts with this part."""
        return self.start if self.start == self.request.cached_tokens else 0

    @property
    def samples(self) -> bool:
        """Whether this part ends with a token to choose; max_new_tokens=0 only fills the cache."""
        return self.completes_prompt and self.request.max_new_tokens > 0


class PrefillBatch:
    """Prompts, or chunks of them, that run through the layers together."""

    def __init__(self, fills: Sequence[Fill], run: Run) -> None:
        self.fills = fills
        self.run = run
        self.shape = _shape_of(fills)

    @property
    def due_s(self) -> float:
        """When the first of the prompts that this batch completes is to have its token."""
        return min(
            (
                fill.request.due_s
                for fill in self.fills
                if fill.completes_prompt and fill.request.finish is None
            ),
            default=math.inf,
        )

    @property
    def indivisible(self) -> bool:
        return self.run.indivisible

    @property
    def cancelled(self) -> bool:
        return all(fill.request.finish is not None for fill in self.fills)

    def slice_work(self, lane: Lane, first: int, last: int) -> Work:
        return self.run.slice_work(lane, first, last)


class DecodeBatch:
    """One step of the running requests, and the chunks of prompts that ride in it.

    shape: of the members. The run's tokens are those of the members, then those of the fills that
    sample.
    """

    def __init__(
        self,
        members: Sequence[Request],
        shape: DecodeShape,
        fills: Sequence[Fill],
        run: Run,
        num_layers: int,
    ) -> None:
        self.members = members
        self.shape = shape
        self.fills = fills
        self.fused = _shape_of(fills) if fills else None
        self.run = run
        self._num_layers = num_layers

    def step_work(self, lane: Lane) -> Work:
        return self.run.slice_work(lane, 0, self._num_layers)


def _shape_of(fills: Sequence[Fill]) -> PrefillShape:
    return PrefillShape.of([(fill.tokens, fill.start) for fill in fills])
