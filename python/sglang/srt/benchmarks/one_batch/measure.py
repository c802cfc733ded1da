"""Measurements of one case on lanes: alone, or beside a case of the other phase."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from drift_scheduler.lane import Lane, Span
from sglang.srt.benchmarks.one_batch.streams import (
    DecodeStream,
    Launch,
    PrefillRun,
    PrefillStream,
    drive,
)
from sglang.srt.model_executor.host_batch import HostBatch
from sglang.srt.model_executor.model_runner import Runner


@dataclass(frozen=True, slots=True)
class Repetitions:
    """How often a case is measured, after `warm_up` runs that do not count."""

    decode_steps: int
    prefill_runs: int
    warm_up: int


@dataclass(frozen=True, slots=True)
class Distribution:
    """Milliseconds."""

    median: float
    p10: float
    p90: float
    largest: float
    count: int

    @classmethod
    def of(cls, durations_s: Sequence[float]) -> Distribution:
        milliseconds = np.asarray(durations_s) * 1e3
        p10, median, p90, largest = np.percentile(milliseconds, (10, 50, 90, 100)).tolist()
        return cls(median, p10, p90, largest, len(durations_s))


@dataclass(frozen=True, slots=True)
class DecodeTimes:
    """step: on the lane. gap_ms: lane idle between two steps. launch_ms, cpu_ms: of the launching
    thread for a step. steps_per_s counts the gaps."""

    step: Distribution
    gap_ms: float
    launch_ms: float
    cpu_ms: float
    steps_per_s: float

    @classmethod
    def of(cls, launches: Sequence[Launch]) -> DecodeTimes:
        """At least two launches, in order."""
        spans = [launch.span for launch in launches]
        return cls(
            step=Distribution.of([span.duration_s for span in spans]),
            gap_ms=_median_gap_ms(spans),
            launch_ms=_median_ms([launch.host_s for launch in launches]),
            cpu_ms=_median_ms([launch.cpu_s for launch in launches]),
            steps_per_s=_rate(spans),
        )


@dataclass(frozen=True, slots=True)
class PrefillTimes:
    """run: from the first layer to the sampled token. launch_ms: of one slice, see Ticket.launch_s.
    runs_per_s counts the gaps."""

    run: Distribution
    launch_ms: float
    runs_per_s: float

    @classmethod
    def of(cls, runs: Sequence[PrefillRun]) -> PrefillTimes:
        """Of at least one run and all that followed it."""
        return cls.of_some(runs, _rate([run.span for run in runs]))

    @classmethod
    def of_some(cls, runs: Sequence[PrefillRun], runs_per_s: float) -> PrefillTimes:
        """Of at least one run; others may have come between."""
        return cls(
            run=Distribution.of([run.span.duration_s for run in runs]),
            launch_ms=_median_ms([part.launch_s for run in runs for part in run.slices]),
            runs_per_s=runs_per_s,
        )


class Bench:
    """A runner whose lanes it has for itself. wait: returns when work may have finished."""

    def __init__(self, runner: Runner, repetitions: Repetitions, wait: Callable[[], None]) -> None:
        self._runner = runner
        self._wait = wait
        self._repetitions = repetitions

    @property
    def num_layers(self) -> int:
        return self._runner.num_layers

    def decode(self, lane: Lane, batch: HostBatch) -> DecodeTimes:
        warm_up = self._repetitions.warm_up
        steps = warm_up + self._repetitions.decode_steps
        stream = DecodeStream(self._runner, lane, lambda step: batch, steps)
        drive([stream], self._wait, enough=_never)
        return DecodeTimes.of(stream.done[warm_up:])

    def steps(self, lane: Lane, batches: Sequence[HostBatch]) -> list[Launch]:
        """One step a batch, nothing left out."""
        stream = DecodeStream(self._runner, lane, batches.__getitem__, len(batches))
        drive([stream], self._wait, enough=_never)
        return stream.done

    def prefill(self, lane: Lane, batch: HostBatch, slice_layers: int) -> PrefillTimes:
        return self.prefill_in_turn(lane, batch, [slice_layers])[0]

    def prefill_in_turn(
        self, lane: Lane, batch: HostBatch, slice_layers: Sequence[int]
    ) -> list[PrefillTimes]:
        """For each number of layers of a slice. Its runs alternate with those of the others, since
        a device that warms up gets slower from run to run."""
        ways = len(slice_layers)
        first = self._repetitions.warm_up * ways
        runs = first + self._repetitions.prefill_runs * ways
        stream = PrefillStream(self._runner, lane, batch, slice_layers, runs)
        drive([stream], self._wait, enough=_never)
        done = stream.done
        began_s = done[first - 1].span.end_s if first else done[0].span.start_s
        ends_s = [began_s, *(run.span.end_s for run in done[first:])]
        spent_s = [after_s - before_s for before_s, after_s in itertools.pairwise(ends_s)]
        return [
            PrefillTimes.of_some(
                done[first + way :: ways], len(spent_s[way::ways]) / sum(spent_s[way::ways])
            )
            for way in range(ways)
        ]

    def side_by_side(
        self,
        decode_lane: Lane,
        step: HostBatch,
        prefill_lane: Lane,
        prefill: HostBatch,
        slice_layers: int,
    ) -> tuple[DecodeTimes, PrefillTimes]:
        """Both phases without a pause. What ran while the other phase warmed up or had stopped
        does not count, so the spans that do lie beside work of the other phase throughout."""
        repetitions = self._repetitions
        decodes = DecodeStream(self._runner, decode_lane, lambda index: step)
        prefills = PrefillStream(self._runner, prefill_lane, prefill, [slice_layers])
        window = _Window(decodes, prefills, repetitions.warm_up)

        def enough() -> bool:
            return (
                len(window.steps()) >= repetitions.decode_steps
                and len(window.runs()) >= repetitions.prefill_runs
            )

        drive([decodes, prefills], self._wait, enough)
        return DecodeTimes.of(window.steps()), PrefillTimes.of(window.runs())


class _Window:
    """The time in which two streams are both under way and warm."""

    def __init__(self, decodes: DecodeStream, prefills: PrefillStream, warm_up: int) -> None:
        self._decodes = decodes
        self._prefills = prefills
        self._warm_up = max(warm_up, 1)

    def steps(self) -> list[Launch]:
        start_s, end_s = self._bounds_s()
        return [step for step in self._decodes.done if _inside(step.span, start_s, end_s)]

    def runs(self) -> list[PrefillRun]:
        start_s, end_s = self._bounds_s()
        return [run for run in self._prefills.done if _inside(run.span, start_s, end_s)]

    def _bounds_s(self) -> tuple[float, float]:
        """From the end of both warm-ups to the end of the phase that ended first."""
        ends = [
            [step.span.end_s for step in self._decodes.done],
            [run.span.end_s for run in self._prefills.done],
        ]
        if any(len(phase) <= self._warm_up for phase in ends):
            return math.inf, -math.inf
        start_s = max(phase[self._warm_up - 1] for phase in ends)
        return start_s, min(phase[-1] for phase in ends)


def _inside(span: Span, start_s: float, end_s: float) -> bool:
    return start_s <= span.start_s and span.end_s <= end_s


def _never() -> bool:
    return False


def _median_ms(seconds: Sequence[float]) -> float:
    return float(np.median(np.asarray(seconds))) * 1e3


def _median_gap_ms(spans: Sequence[Span]) -> float:
    gaps_s = [after.start_s - before.end_s for before, after in itertools.pairwise(spans)]
    return _median_ms(gaps_s)


def _rate(spans: Sequence[Span]) -> float:
    """Per second, from the first start to the last end."""
    return len(spans) / (spans[-1].end_s - spans[0].start_s)
