"""What each lane ran, when, and for how long both were at work at once."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from drift_scheduler.lane import Phase, Span
from drift_scheduler.partition import Partition


@dataclass(frozen=True, slots=True)
class LaneRun:
    """One settled piece of work.

    tokens: new tokens, of which fused_tokens are prompt tokens that rode in a decode step.
    `layers` is 0 for decode, which always runs all of them.
    """

    phase: Phase
    partition: Partition
    span: Span
    requests: int
    tokens: int
    layers: int = 0
    fused_tokens: int = 0


class Timeline:
    """A ring of recent runs, and totals since the start.

    Runs of one phase do not overlap each other, and each phase's runs are added in order.
    """

    def __init__(self, capacity: int = 4096) -> None:
        self._runs: dict[Phase, deque[LaneRun]] = {phase: deque(maxlen=capacity) for phase in Phase}
        self._busy_s = dict.fromkeys(Phase, 0.0)
        self._both_busy_s = 0.0
        self._fused_busy_s = 0.0
        self._runs_by_partition: dict[int, int] = {}

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
        self._busy_s[run.phase] += run.span.duration_s
        if run.fused_tokens:
            self._fused_busy_s += run.span.duration_s
        index = run.partition.index
        self._runs_by_partition[index] = self._runs_by_partition.get(index, 0) + 1

    def runs(self, phase: Phase) -> list[LaneRun]:
        """Recent runs of one phase, oldest first."""
        return list(self._runs[phase])

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

    def launches(self, partition: Partition) -> int:
        """Pieces of work that ran under this partition."""
        return self._runs_by_partition.get(partition.index, 0)
