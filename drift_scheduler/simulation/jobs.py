"""Jobs of the simulated engine: they take the time that the latency model says."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from drift_scheduler.lane import Lane, Phase
from drift_scheduler.lane_virtual import TimedWork
from drift_scheduler.shapes import DecodeShape, PrefillShape
from drift_scheduler.simulation.request import Fill, SimRequest


def shape_of(fills: Sequence[Fill]) -> PrefillShape:
    return PrefillShape.of((fill.tokens, fill.start) for fill in fills)


@dataclass(slots=True, eq=False)
class SimPrefill:
    """A prefill batch. slice_of(job, lane, first, last): layers first..last-1 as they take time."""

    fills: list[Fill]
    slice_of: Callable[[SimPrefill, Lane, int, int], TimedWork]
    shape: PrefillShape
    cancelled: bool = False
    indivisible: bool = False

    @property
    def due_s(self) -> float:
        return min(
            (fill.request.due_s for fill in self.fills if fill.completes_prompt), default=math.inf
        )

    def slice_work(self, lane: Lane, first: int, last: int) -> TimedWork:
        assert lane.phase is Phase.PREFILL, lane.phase
        return self.slice_of(self, lane, first, last)


@dataclass(slots=True, eq=False)
class SimStep:
    """A decode step of `members`, of whom `last` want no other; step_s: how long it takes."""

    members: list[SimRequest]
    last: list[SimRequest]
    fills: list[Fill]
    step_s: Callable[[SimStep, Lane], float]
    shape: DecodeShape
    fused: PrefillShape | None

    def step_work(self, lane: Lane) -> TimedWork:
        assert lane.phase is Phase.DECODE, lane.phase
        return TimedWork(self.step_s(self, lane))
