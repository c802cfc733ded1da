"""CPU lanes: a lane is a thread with its own cores and its own number of intra-op threads."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from functools import partial

import torch

from drift_scheduler.lane import Lane, LaneMap, LaneTimeout, Phase, Span, Ticket, Work
from drift_scheduler.partition import Partition, PartitionError, PartitionTable, even_decode_shares
from drift_scheduler.work_thread import WorkThread

CLOSE_TIMEOUT_S = 30.0
AFTER_TIMEOUT_S = 600.0

# Decode of a small model is bound by memory, and a second thread on a second core of the same
# socket mostly adds hand-over costs; measured on two cores it is slower than one.
SOLO_DECODE_MIN_CORES_FOR_ALL = 4


class CpuTicket:
    """Finished by the lane's thread; read by the engine thread."""

    launch_s = 0.0

    def __init__(self) -> None:
        self._finished = threading.Event()
        self._error: BaseException | None = None
        self._span: Span | None = None

    def finish(self, span: Span, error: BaseException | None) -> None:
        self._span, self._error = span, error
        self._finished.set()

    def done(self) -> bool:
        if not self._finished.is_set():
            return False
        if self._error is not None:
            raise self._error
        return True

    def wait(self, timeout_s: float) -> None:
        if not self._finished.wait(timeout_s):
            raise LaneTimeout(f"CPU lane work still running after {timeout_s:.0f} s")
        self.done()

    def span(self) -> Span:
        assert self._span is not None, "span() before done()"
        return self._span


class CpuLane:
    """Runs work on a thread pinned to `cores` with `threads` intra-op threads."""

    def __init__(
        self,
        phase: Phase,
        partition: Partition,
        cores: Sequence[int],
        threads: int,
        completion_fd: int,
    ) -> None:
        self.phase = phase
        self.partition = partition
        self.cores = tuple(cores)
        self._threads = threads
        self._completion_fd = completion_fd
        # set_num_threads also writes a process-wide default, so lanes start one by one.
        self._thread = WorkThread(f"lane-{phase}-{partition}", self._prepare)

    @property
    def sms(self) -> int:
        return len(self.cores)

    def launch(self, work: Work, after: Sequence[Ticket] = ()) -> CpuTicket:
        ticket = CpuTicket()
        self._thread.put(partial(self._do, work, tuple(after), ticket))
        return ticket

    def close(self) -> None:
        self._thread.close(CLOSE_TIMEOUT_S)

    def _prepare(self) -> None:
        os.sched_setaffinity(0, self.cores)
        # The first use in a thread takes over the process-wide default: let that happen before.
        torch.get_num_threads()
        torch.set_num_threads(self._threads)

    def _do(self, work: Work, after: Sequence[Ticket], ticket: CpuTicket) -> None:
        error: BaseException | None = None
        start_s = time.monotonic()
        try:
            for earlier in after:
                earlier.wait(AFTER_TIMEOUT_S)
            start_s = time.monotonic()
            with torch.inference_mode():
                work()
        except BaseException as caught:
            error = caught
        ticket.finish(Span(start_s, time.monotonic()), error)
        os.eventfd_write(self._completion_fd, 1)


class CpuLanes:
    """All lanes of the machine's CPU: the whole, and with `split_count` also disjoint halves.

    decode_shares: cores for decode in each split, rising; the rest goes to prefill. None with
    `split_count` spaces them evenly. `cores` defaults to those the process may run on.
    Raises PartitionError when a share does not fit.
    """

    def __init__(
        self,
        split_count: int = 0,
        decode_shares: Sequence[int] | None = None,
        cores: Sequence[int] | None = None,
    ) -> None:
        cores = sorted(os.sched_getaffinity(0)) if cores is None else list(cores)
        shares = list(decode_shares or ())
        if split_count and decode_shares is None:
            if len(cores) < 2:
                raise PartitionError("multiplexing on CPU needs at least 2 cores, found 1")
            shares = even_decode_shares(len(cores), split_count, minimum=1, step=1)
        for share in shares:
            if not 0 < share < len(cores):
                raise PartitionError(f"{share} decode cores do not fit {len(cores)} cores")
        self.granted = {share: share for share in shares}
        self.table = PartitionTable(
            len(cores),
            tuple(Partition(i + 1, len(cores) - d, d) for i, d in enumerate(shares)),
        )
        self._completion_fd = os.eventfd(0, os.EFD_NONBLOCK)
        solo_decode = len(cores) if len(cores) >= SOLO_DECODE_MIN_CORES_FOR_ALL else 1
        whole = self.table.whole
        self._lanes = [
            self._start(Phase.PREFILL, whole, cores, len(cores)),
            self._start(Phase.DECODE, whole, cores, solo_decode),
        ]
        for split in self.table.splits:
            for phase, mine in (
                (Phase.DECODE, cores[: split.decode_sms]),
                (Phase.PREFILL, cores[split.decode_sms :]),
            ):
                self._lanes.append(self._start(phase, split, mine, len(mine)))
        self._map = LaneMap(self._lanes)

    def _start(
        self, phase: Phase, partition: Partition, cores: Sequence[int], threads: int
    ) -> CpuLane:
        return CpuLane(phase, partition, cores, threads, self._completion_fd)

    def lane(self, phase: Phase, partition: Partition) -> Lane:
        return self._map[phase, partition]

    def completion_fd(self) -> int | None:
        return self._completion_fd

    def close(self) -> None:
        for lane in self._lanes:
            lane.close()
        os.close(self._completion_fd)
