"""Chunked: prompts ride in decode steps of a fixed size."""

from __future__ import annotations

from dataclasses import dataclass

from drift_scheduler.dispatcher import Admission, Plan
from drift_scheduler.partition import PartitionTable
from drift_scheduler.view import LoadView


@dataclass(frozen=True, slots=True)
class Chunked:
    """Prompts ride in decode steps, on the whole device: what others call a mixed chunk.

    A step has at most `step_tokens` tokens, one of each running request and prompt tokens in what
    is left. With nothing waiting it is a plain decode step, with nothing running a chunk of
    `step_tokens`. While `step_tokens` requests or more are running no prompt goes on.
    """

    table: PartitionTable
    step_tokens: int
    decode_depth: int = 2

    def __post_init__(self) -> None:
        if self.step_tokens < 1:
            raise ValueError(f"step_tokens={self.step_tokens} must be at least 1")

    def admit(self, view: LoadView, now_s: float) -> Admission | None:
        return None

    def dispatch(self, view: LoadView, now_s: float) -> Plan:
        if view.prefill is not None:  # begun under another policy, and to be ended first
            return Plan(self.table.whole, prefill_layers=view.prefill.layers_left)
        room = max(self.step_tokens - view.running, 0) if view.can_fuse else 0
        decode = (view.running > 0 or room > 0) and view.takes_step(self.decode_depth)
        return Plan(self.table.whole, decode=decode, fused_tokens=room if decode else 0)
