"""What a latency model is fitted to: points of work, and how a meter's times become samples.

An engine brings the Meter; `profile_grid` chooses points and `profile_pace` how often each is
repeated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from drift_scheduler.partition import Partition
from drift_scheduler.profile import Kind, Sample, Split
from drift_scheduler.shapes import DecodeShape, PrefillShape


@dataclass(frozen=True, slots=True)
class DecodeBatch:
    """Running requests of equal length: each attends to `context_each` tokens, its newest one
    included."""

    requests: int
    context_each: int

    @property
    def shape(self) -> DecodeShape:
        return DecodeShape(self.requests, self.requests * self.context_each)

    def __str__(self) -> str:
        return f"{self.requests}x{self.context_each}"


@dataclass(frozen=True, slots=True)
class PrefillBatch:
    """Equal prompts that run together: `new` tokens each, behind `cached` ones."""

    new: int
    cached: int = 0
    prompts: int = 1

    @property
    def shape(self) -> PrefillShape:
        return PrefillShape.of([(self.new, self.cached)] * self.prompts)

    @property
    def length(self) -> int:
        """Tokens of each prompt, cached and new."""
        return self.cached + self.new

    def __str__(self) -> str:
        return f"{'' if self.prompts == 1 else f'{self.prompts}x'}{self.new}+{self.cached}"


@dataclass(frozen=True, slots=True)
class Point:
    """Work to be timed: of one phase alone; or of both, which run side by side on a split, while
    on the whole device the prompt's tokens ride in the decode step."""

    partition: Partition
    decode: DecodeBatch | None = None
    prefill: PrefillBatch | None = None

    def __post_init__(self) -> None:
        if self.decode is None and self.prefill is None:
            raise ValueError("a point needs work of at least one phase")

    @property
    def side_by_side(self) -> bool:
        return self._both and not self.partition.exclusive

    @property
    def fused(self) -> bool:
        return self._both and self.partition.exclusive

    @property
    def _both(self) -> bool:
        return self.decode is not None and self.prefill is not None

    def __str__(self) -> str:
        joint = " with " if self.fused else " beside "
        work = [
            f"{phase} {batch}"
            for phase, batch in (("decode", self.decode), ("prefill", self.prefill))
            if batch is not None
        ]
        return f"{joint.join(work)} on {self.partition}"


@dataclass(frozen=True, slots=True)
class Measured:
    """seconds: the median of the runs; slowest_s: the longest, where it is known. layers: of a
    prefill, how many were timed; both times are of all layers even so. clock_mhz: of the SMs
    meanwhile, where it is known."""

    seconds: float
    clock_mhz: float | None = None
    layers: int = 0
    slowest_s: float | None = None


MAX_PREFILL_RUNS = 12


@dataclass(frozen=True, slots=True)
class Repetitions:
    """Timed runs of a point, one warm-up before them not counted: decode steps (fused ones are
    prefills in this respect) and whole prefills.

    settle_s: a prefill that is over sooner is run again, as often as fills that time, and only
    then does it count. A few short runs say more of the clock that the work before them left than
    of themselves.
    """

    decode_steps: int
    prefill_runs: int
    settle_s: float = 0.0

    def settled_runs(self, seconds: float) -> int:
        """How often a prefill that takes so long is to be run again; 0 if it need not be."""
        if not seconds * self.prefill_runs < self.settle_s:
            return 0
        return min(MAX_PREFILL_RUNS, math.ceil(self.settle_s / max(seconds, 1e-6)))

    def __str__(self) -> str:
        return f"{self.decode_steps} decode steps, {self.prefill_runs} prefills"


class Meter(Protocol):
    """Times work as it would be served, on lanes that nothing else uses meanwhile."""

    def decode(self, partition: Partition, batch: DecodeBatch, times: int) -> Measured:
        """One decode step."""
        ...

    def prefill(self, partition: Partition, batch: PrefillBatch, times: int) -> Measured:
        """All layers of a prefill batch, up to the sampled tokens."""
        ...

    def fused(self, decode: DecodeBatch, prefill: PrefillBatch, times: int) -> Measured:
        """One decode step in which the prompts ride, on the whole device."""
        ...

    def side_by_side(
        self,
        partition: Partition,
        decode: DecodeBatch,
        prefill: PrefillBatch,
        repetitions: Repetitions,
    ) -> tuple[Measured, Measured]:
        """A decode step and a prefill, each beside the other all the while."""
        ...


def measure(
    meter: Meter,
    points: Iterable[Point],
    repetitions: Callable[[Point], Repetitions],
    progress: Callable[[Point], None],
) -> list[Sample]:
    """One sample a point, two where phases run side by side.

    repetitions: asked before every point. progress: called before every point.
    """
    samples: list[Sample] = []
    for point in points:
        progress(point)
        samples += measure_one(meter, point, repetitions(point))
    return samples


def measure_one(meter: Meter, point: Point, repetitions: Repetitions) -> list[Sample]:
    """The samples of one point."""
    partition, decode, prefill = point.partition, point.decode, point.prefill
    if prefill is None:
        assert decode is not None
        step = meter.decode(partition, decode, repetitions.decode_steps)
        return [_sample(Kind.DECODE, point, step)]
    if decode is None:
        run = _settled(partial(meter.prefill, partition, prefill), repetitions)
        return [_sample(Kind.PREFILL, point, run)]
    if partition.exclusive:
        fused = _settled(partial(meter.fused, decode, prefill), repetitions)
        return [_sample(Kind.FUSED, point, fused)]
    step, run = meter.side_by_side(partition, decode, prefill, repetitions)
    return [_sample(Kind.DECODE, point, step), _sample(Kind.PREFILL, point, run)]


def _settled(run: Callable[[int], Measured], repetitions: Repetitions) -> Measured:
    measured = run(repetitions.prefill_runs)
    again = repetitions.settled_runs(measured.seconds)
    return run(again) if again else measured


def _sample(kind: Kind, point: Point, measured: Measured) -> Sample:
    return Sample(
        kind=kind,
        partition=Split.of(point.partition),
        seconds=measured.seconds,
        decode=point.decode.shape if point.decode else None,
        prefill=point.prefill.shape if point.prefill else None,
        layers=measured.layers if kind is Kind.PREFILL else 0,
        beside=point.side_by_side,
        clock_mhz=measured.clock_mhz,
        slowest_s=measured.slowest_s,
    )
