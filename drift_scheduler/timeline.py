"""What each lane ran, when, as against what was expected, and how the queue stood meanwhile."""

from __future__ import annotations

import enum
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass

from drift_scheduler.clock import ClockReader
from drift_scheduler.dispatcher import Forecast
from drift_scheduler.lane import Phase, Span
from drift_scheduler.partition import Partition
from drift_scheduler.recent import Recent
from drift_scheduler.samples import QueueSample, QueueSampler
from drift_scheduler.shapes import DecodeShape, PrefillShape
from drift_scheduler.view import LoadView


class RunMode(enum.StrEnum):
    """How a piece of work had the device: alone, on a part of it, or with prompts riding in it."""

    DECODE = "decode"
    PREFILL = "prefill"
    SPLIT = "split"
    FUSED = "fused"


@dataclass(frozen=True, slots=True)
class LaneRun:
    """One settled piece of work.

    tokens: new tokens, of which fused_tokens are prompt tokens that rode in a decode step.
    `layers` is 0 for decode, which always runs all of them. decode, prefill: what the work was,
    or, of the other phase, what was planned to run beside it or rode in it. forecast: what it was
    expected to take, where a model said so; reason: why it was launched like this. settled_s: when
    the host took notice of its end.
    """

    phase: Phase
    partition: Partition
    span: Span
    requests: int
    tokens: int
    layers: int = 0
    fused_tokens: int = 0
    decode: DecodeShape | None = None
    prefill: PrefillShape | None = None
    forecast: Forecast | None = None
    reason: str = ""
    settled_s: float | None = None

    @property
    def mode(self) -> RunMode:
        if self.fused_tokens:
            return RunMode.FUSED
        if not self.partition.exclusive:
            return RunMode.SPLIT
        return RunMode.DECODE if self.phase is Phase.DECODE else RunMode.PREFILL

    @property
    def late(self) -> bool:
        """It took longer than it was to take at worst."""
        return self.forecast is not None and self.span.duration_s > self.forecast.worst_s


@dataclass(frozen=True, slots=True)
class PolicyChange:
    """From `time_s` on the policy of this name decided."""

    time_s: float
    policy: str


@dataclass(frozen=True, slots=True)
class TimelinePage:
    """A part of what the rings hold.

    next_run, next_sample: where the next page goes on; it was the last one when they have reached
    end_run and end_sample. truncated: there were older runs in the window, no longer kept.
    """

    now_s: float
    runs: list[LaneRun]
    samples: list[QueueSample]
    policies: list[PolicyChange]
    next_run: int
    next_sample: int
    end_run: int
    end_sample: int
    truncated: bool


class Timeline:
    """Rings of recent runs and samples, and totals since the start.

    Runs of one phase do not overlap each other, and each phase's runs are added in order.
    """

    def __init__(self, capacity: int = 8192, sm_clock: ClockReader | None = None) -> None:
        self._runs: dict[Phase, deque[LaneRun]] = {phase: deque(maxlen=capacity) for phase in Phase}
        self._settled: Recent[LaneRun] = Recent(2 * capacity)
        self._samples: Recent[QueueSample] = Recent(2 * capacity)
        self._sampler = QueueSampler(sm_clock=sm_clock)
        self._policies: deque[PolicyChange] = deque(maxlen=64)
        self._partition: Partition | None = None
        self._busy_s = dict.fromkeys(Phase, 0.0)
        self._both_busy_s = 0.0
        self._fused_busy_s = 0.0
        self._runs_by_partition: Counter[int] = Counter()
        self._runs_by_mode: Counter[RunMode] = Counter()
        self._forecasts = 0
        self._overruns = 0
        self._repartitions = 0
        self._preemptions = 0

    def add(self, run: LaneRun) -> None:
        """Counts the run; its overlap with the other phase is counted by whichever comes last."""
        other = self._runs[Phase.DECODE if run.phase is Phase.PREFILL else Phase.PREFILL]
        for earlier in reversed(other):
            if earlier.span.end_s <= run.span.start_s:
                break
            shared_s = min(run.span.end_s, earlier.span.end_s) - max(
                run.span.start_s, earlier.span.start_s
            )
            self._both_busy_s += max(0.0, shared_s)
        self._runs[run.phase].append(run)
        self._settled.add(run)
        self._busy_s[run.phase] += run.span.duration_s
        if run.fused_tokens:
            self._fused_busy_s += run.span.duration_s
        self._runs_by_partition[run.partition.index] += 1
        self._runs_by_mode[run.mode] += 1
        if run.forecast is not None:
            self._forecasts += 1
            self._overruns += run.late

    def look(
        self, view: LoadView, launched_on: Partition | None, now_s: float, decode_ended_s: float
    ) -> None:
        """At the end of every turn. launched_on: None if it launched nothing."""
        before = self._partition
        if launched_on is not None and launched_on is not before:
            self._repartitions += before is not None and before.index != launched_on.index
            self._partition = launched_on
        if self._partition is not None:
            sample = self._sampler.look(
                view, self._partition, self._repartitions, now_s, decode_ended_s
            )
            if sample is not None:
                self._samples.add(sample)

    def preempted(self) -> None:
        """A prefill batch was parked in favour of another."""
        self._preemptions += 1

    def policy_changed(self, policy: str, now_s: float) -> None:
        """From now on it decides. To name the one that did anyway is no change."""
        if policy != self.policy:
            self._policies.append(PolicyChange(now_s, policy))

    def runs(self, phase: Phase) -> list[LaneRun]:
        """Recent runs of one phase, oldest first."""
        return list(self._runs[phase])

    def page(
        self,
        now_s: float,
        seconds: float,
        limit: int,
        next_run: int | None = None,
        next_sample: int | None = None,
    ) -> TimelinePage:
        """Runs and samples of the last `seconds`, oldest first, `limit` of each at most.

        next_run, next_sample: None for the first page, then those of the page before; then what
        was added in the meantime is there too.
        """
        if next_run is None:
            next_run = self._settled.find(now_s - seconds, _ended_s)
            truncated = next_run == self._settled.first > 0
        else:
            truncated = next_run < self._settled.first
        if next_sample is None:
            next_sample = self._samples.find(now_s - seconds, _taken_s)
        runs = self._settled.page(next_run, limit)
        samples = self._samples.page(next_sample, limit)
        return TimelinePage(
            now_s=now_s,
            runs=runs,
            samples=samples,
            policies=list(self._policies),
            next_run=max(next_run, self._settled.first) + len(runs),
            next_sample=max(next_sample, self._samples.first) + len(samples),
            end_run=self._settled.added,
            end_sample=self._samples.added,
            truncated=truncated,
        )

    def busy_s(self, phase: Phase) -> float:
        return self._busy_s[phase]

    @property
    def both_busy_s(self) -> float:
        """Seconds during which prefill and decode kernels were in progress at the same time."""
        return self._both_busy_s

    @property
    def fused_busy_s(self) -> float:
        """Seconds of decode steps in which prompt tokens rode; busy_s(DECODE) has them too."""
        return self._fused_busy_s

    @property
    def policy(self) -> str:
        """The one that decides now, "" if nobody has said."""
        return self._policies[-1].policy if self._policies else ""

    @property
    def counts(self) -> Mapping[str, int]:
        """Since the start: runs by mode, runs with a forecast and those that took longer than
        its worst, launches on another partition than the launch before, batches parked."""
        return {
            **{f"{mode}_runs": self._runs_by_mode[mode] for mode in RunMode},
            "forecasts": self._forecasts,
            "overruns": self._overruns,
            "repartitions": self._repartitions,
            "preemptions": self._preemptions,
        }

    def counted_runs(self) -> int:
        """Pieces of work that have run since the start."""
        return sum(self._runs_by_mode.values())

    def launches(self, partition: Partition) -> int:
        """Pieces of work that ran under this partition."""
        return self._runs_by_partition[partition.index]


def _ended_s(run: LaneRun) -> float:
    return run.span.end_s


def _taken_s(sample: QueueSample) -> float:
    return sample.time_s
