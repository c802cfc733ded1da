"""Virtual lanes: work takes the time it says, on a clock that the caller moves.

They let the gang loop and every dispatcher run without a device, in tests and simulations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heappop, heappush

from drift_scheduler.lane import Lane, LaneMap, LaneTimeout, Phase, Span, Ticket, Work
from drift_scheduler.partition import Partition, PartitionTable


class VirtualClock:
    """Seconds that pass only when told to."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s

    def advance_to(self, time_s: float) -> None:
        assert time_s >= self.now_s, f"clock cannot go back from {self.now_s} to {time_s}"
        self.now_s = time_s


@dataclass(frozen=True, slots=True)
class TimedWork:
    """Work that only takes time. delay_s: before it may begin, however idle its lane is."""

    duration_s: float
    delay_s: float = 0.0

    def __call__(self) -> None:
        pass


class VirtualTicket:
    launch_s = 0.0

    def __init__(self, clock: VirtualClock, span: Span) -> None:
        self._clock = clock
        self._span = span
        self.end_s = span.end_s

    def done(self) -> bool:
        return self._clock.now_s >= self._span.end_s

    def wait(self, timeout_s: float) -> None:
        if self._span.end_s > self._clock.now_s + timeout_s:
            raise LaneTimeout(f"virtual work ends at {self._span.end_s:.6f} s")
        self._clock.advance_to(max(self._clock.now_s, self._span.end_s))

    def span(self) -> Span:
        assert self.done(), "span() before done()"
        return self._span


class VirtualLane:
    """ends_s: a heap of when launched work ends, shared by all lanes."""

    def __init__(
        self, phase: Phase, partition: Partition, clock: VirtualClock, ends_s: list[float]
    ) -> None:
        self.phase = phase
        self.partition = partition
        self._clock = clock
        self._ends_s = ends_s
        self._free_at_s = 0.0

    @property
    def sms(self) -> int:
        prefill = self.phase is Phase.PREFILL
        return self.partition.prefill_sms if prefill else self.partition.decode_sms

    def launch(self, work: Work, after: Sequence[Ticket] = ()) -> VirtualTicket:
        assert isinstance(work, TimedWork), type(work)
        start_s = max(self._clock.now_s + work.delay_s, self._free_at_s)
        for earlier in after:
            assert isinstance(earlier, VirtualTicket), type(earlier)
            start_s = max(start_s, earlier.end_s)
        self._free_at_s = start_s + work.duration_s
        heappush(self._ends_s, self._free_at_s)
        return VirtualTicket(self._clock, Span(start_s, self._free_at_s))


class VirtualLanes:
    """Lanes for every partition of a table, on one clock."""

    def __init__(self, table: PartitionTable, clock: VirtualClock) -> None:
        self.table = table
        self.granted = {split.decode_sms: split.decode_sms for split in table.splits}
        self._clock = clock
        self._ends_s: list[float] = []
        self._map = LaneMap(
            [
                VirtualLane(phase, table[index], clock, self._ends_s)
                for index in range(len(table))
                for phase in Phase
            ]
        )

    def lane(self, phase: Phase, partition: Partition) -> Lane:
        return self._map[phase, partition]

    def next_completion_s(self) -> float | None:
        """When the next launched work ends; None if all of it has."""
        while self._ends_s and self._ends_s[0] <= self._clock.now_s:
            heappop(self._ends_s)
        return self._ends_s[0] if self._ends_s else None

    def completion_fd(self) -> int | None:
        return None

    def close(self) -> None:
        pass
