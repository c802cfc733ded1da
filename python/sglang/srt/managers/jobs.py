"""Jobs: what the gang drives; prefill goes through the layers in slices, a decode step whole."""

from __future__ import annotations

from dataclasses import dataclass

from drift_scheduler.lane import Lane, Work
from sglang.srt.model_executor.model_runner import Run
from sglang.srt.requests import Request


@dataclass(slots=True)
class Fill:
    """A request's part in a prefill batch: its tokens start..end-1."""

    request: Request
    start: int
    end: int
    completes_prompt: bool

    @property
    def samples(self) -> bool:
        """Whether this part ends with a token to choose; max_new_tokens=0 only fills the cache."""
        return self.completes_prompt and self.request.max_new_tokens > 0


class PrefillBatch:
    """Prompts, or chunks of them, that run through the layers together."""

    def __init__(self, fills: list[Fill], run: Run) -> None:
        self.fills = fills
        self.run = run

    @property
    def cached_tokens(self) -> int:
        """Tokens found in the prefix cache by the requests that start in this batch."""
        return sum(f.start for f in self.fills if f.start == f.request.cached_tokens)

    @property
    def requests(self) -> int:
        return len(self.fills)

    @property
    def tokens(self) -> int:
        return sum(fill.end - fill.start for fill in self.fills)

    @property
    def cancelled(self) -> bool:
        return all(fill.request.finish is not None for fill in self.fills)

    def slice_work(self, lane: Lane, first: int, last: int) -> Work:
        return self.run.slice_work(lane, first, last)


class DecodeBatch:
    """One step of the running requests."""

    def __init__(self, members: list[Request], run: Run, num_layers: int) -> None:
        self.members = members
        self.run = run
        self._num_layers = num_layers

    @property
    def requests(self) -> int:
        return len(self.members)

    def step_work(self, lane: Lane) -> Work:
        return self.run.slice_work(lane, 0, self._num_layers)
