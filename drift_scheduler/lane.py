"""Lane and Ticket: where a phase's work runs, and how the host follows it without blocking.

A lane runs its work in the order of launch. Two lanes run side by side unless a launch says
`after`. Lanes share no scratch memory. The engine thread alone launches and polls; what a launch
costs the host may be left to another thread.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from drift_scheduler.partition import Partition, PartitionTable

# Enqueues (CUDA) or computes (CPU) one piece of work. It must capture all it reads: it may run
# later, on another thread.
Work = Callable[[], None]


class Phase(enum.StrEnum):
    PREFILL = "prefill"
    DECODE = "decode"


class LaneTimeout(RuntimeError):
    """Work on a lane did not finish within its limit."""


@dataclass(frozen=True, slots=True)
class Span:
    """When work ran on its lane, in seconds of time.monotonic()."""

    start_s: float
    end_s: float

    @property
    def duration_s(self) -> float:
        return self.end_s - self.start_s


class Ticket(Protocol):
    """One launched piece of work."""

    @property
    def launch_s(self) -> float:
        """What launching took the thread that did it, once it is done; 0 where lanes compute."""
        ...

    def done(self) -> bool:
        """Polls; never blocks. Raises what the work raised."""
        ...

    def wait(self, timeout_s: float) -> None:
        """Blocks until done. Raises LaneTimeout, or what the work raised."""
        ...

    def span(self) -> Span:
        """When the work ran; only once it is done."""
        ...


class Lane(Protocol):
    """One phase's part of the device under one partition."""

    phase: Phase
    partition: Partition

    @property
    def sms(self) -> int:
        """SMs (GPU) or cores (CPU) that this lane's work runs on."""
        ...

    def launch(self, work: Work, after: Sequence[Ticket] = ()) -> Ticket:
        """Runs `work` behind all earlier work of this lane and behind the tickets in `after`.

        `after` orders on the device: the host does not wait.
        """
        ...


class LaneProvider(Protocol):
    """Creates every lane of a device at start and hands them out."""

    @property
    def table(self) -> PartitionTable: ...

    @property
    def granted(self) -> Mapping[int, int]:
        """Decode shares asked for, and what the device made of them."""
        ...

    def lane(self, phase: Phase, partition: Partition) -> Lane: ...

    def completion_fd(self) -> int | None:
        """A file descriptor that becomes readable when work finishes; None: poll instead."""
        ...

    def close(self) -> None:
        """Waits for launched work (with a limit) and releases the lanes."""
        ...


class LaneMap:
    """The lanes of a provider by phase and partition."""

    def __init__(self, lanes: Sequence[Lane]) -> None:
        self._lanes = {(lane.phase, lane.partition.index): lane for lane in lanes}

    def __getitem__(self, key: tuple[Phase, Partition]) -> Lane:
        phase, partition = key
        return self._lanes[phase, partition.index]
