"""CUDA lanes: a lane is a stream of a green context, so its kernels stay on its own SMs.

Green contexts come from cuda-core, which reports the SM counts that the driver really granted.
All of them are created once: creating or destroying one under load is not safe and not needed,
since a re-partition only means that the next launch goes to another stream.

A slice of a prefill is launched kernel by kernel, which takes the host a millisecond or two, and
tens of them where something else slows its way to the device. Who launches it would notice decode
steps so much later. So prefill lanes are launched to by a thread of their own; decode, whose steps
are graphs, by the engine thread itself.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch

from drift_scheduler.lane import Lane, LaneMap, LaneTimeout, Phase, Span, Ticket, Work
from drift_scheduler.partition import Partition, PartitionError, PartitionTable, even_decode_shares
from drift_scheduler.work_thread import WorkThread

CLOSE_TIMEOUT_S = 30.0
LAUNCH_TIMEOUT_S = 60.0
POLL_S = 50e-6

# Event times are float32 milliseconds since a base event: after 8 s their step is still < 1 us.
CLOCK_REBASE_S = 8.0


class DeviceClock:
    """Maps CUDA events to time.monotonic() through a base event on an idle stream."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._base, self._base_s = self._read()

    def _read(self) -> tuple[torch.cuda.Event, float]:
        event = torch.cuda.Event(enable_timing=True)
        event.record(self._stream)
        event.synchronize()  # nothing else runs on this stream: microseconds
        return event, time.monotonic()

    def base(self) -> tuple[torch.cuda.Event, float]:
        """A base young enough for exact differences; a ticket keeps the one it was given."""
        if time.monotonic() - self._base_s > CLOCK_REBASE_S:
            self._base, self._base_s = self._read()
        return self._base, self._base_s


class CudaTicket:
    """Two events around the work, once that is launched."""

    def __init__(self, clock: DeviceClock) -> None:
        self._base, self._base_s = clock.base()
        self.start = torch.cuda.Event(enable_timing=True)
        self.end = torch.cuda.Event(enable_timing=True)
        self.launch_s = 0.0
        self._launched = threading.Event()
        self._error: BaseException | None = None

    def launched(self, error: BaseException | None = None) -> None:
        """Both events are recorded, or there was an error on the way."""
        self._error = error
        self._launched.set()

    def wait_launched(self, timeout_s: float) -> None:
        """Raises LaneTimeout, or what the work raised."""
        if not self._launched.wait(timeout_s):
            raise LaneTimeout(f"CUDA lane work still not launched after {timeout_s:.0f} s")
        if self._error is not None:
            raise self._error

    def done(self) -> bool:
        if not self._launched.is_set():
            return False
        if self._error is not None:
            raise self._error
        return bool(self.end.query())

    def wait(self, timeout_s: float) -> None:
        deadline_s = time.monotonic() + timeout_s
        self.wait_launched(timeout_s)
        while not self.end.query():
            if time.monotonic() > deadline_s:
                raise LaneTimeout(f"CUDA lane work still running after {timeout_s:.0f} s")
            time.sleep(POLL_S)

    def span(self) -> Span:
        start_s = self._base_s + self._base.elapsed_time(self.start) / 1e3
        return Span(start_s, start_s + self.start.elapsed_time(self.end) / 1e3)


class CudaLane:
    """Enqueues work on one stream, on `thread` if there is one and on the caller's otherwise."""

    def __init__(
        self,
        phase: Phase,
        partition: Partition,
        stream: torch.cuda.Stream,
        clock: DeviceClock,
        thread: WorkThread | None,
    ) -> None:
        self.phase = phase
        self.partition = partition
        self.stream = stream
        self._clock = clock
        self._thread = thread

    @property
    def sms(self) -> int:
        prefill = self.phase is Phase.PREFILL
        return self.partition.prefill_sms if prefill else self.partition.decode_sms

    def launch(self, work: Work, after: Sequence[Ticket] = ()) -> CudaTicket:
        ticket = CudaTicket(self._clock)
        if self._thread is None:
            self._enqueue(work, after, ticket)
        else:
            self._thread.put(partial(self._try_to_enqueue, work, tuple(after), ticket))
        return ticket

    def _enqueue(self, work: Work, after: Sequence[Ticket], ticket: CudaTicket) -> None:
        with torch.cuda.stream(self.stream), torch.inference_mode():
            for earlier in after:
                assert isinstance(earlier, CudaTicket), type(earlier)
                earlier.wait_launched(LAUNCH_TIMEOUT_S)
                self.stream.wait_event(earlier.end)
            began_s = time.monotonic()
            ticket.start.record(self.stream)
            work()
            ticket.end.record(self.stream)
            ticket.launch_s = time.monotonic() - began_s
        ticket.launched()

    def _try_to_enqueue(self, work: Work, after: Sequence[Ticket], ticket: CudaTicket) -> None:
        try:
            self._enqueue(work, after, ticket)
        except BaseException as error:
            ticket.launched(error)


class _Pair(NamedTuple):
    """The two sides of a split. owners: what the streams end with."""

    prefill_sms: int
    decode: torch.cuda.Stream
    prefill: torch.cuda.Stream
    owners: list[Any]


# By device and decode SMs, for as long as the process lives: torch notes events on a stream when
# it frees pinned memory that was used there, however long after the lanes are closed.
_pairs: dict[tuple[int, int], _Pair] = {}


class CudaLanes:
    """All lanes of one GPU.

    decode_shares: SMs asked for decode in each split, e.g. [16, 32, 48]; the rest goes to prefill.
    The driver rounds up to its granularity; equal results are offered once. None with
    `split_count` spaces them evenly. Raises PartitionError naming the share that does not fit.
    """

    def __init__(
        self,
        device: torch.device,
        split_count: int = 0,
        decode_shares: Sequence[int] | None = None,
    ) -> None:
        self._device = device
        total = torch.cuda.get_device_properties(device).multi_processor_count
        clock = DeviceClock(device)
        # Decode SMs asked for -> granted.
        self.granted: dict[int, int] = {}
        pairs: dict[int, _Pair] = {}
        if split_count or decode_shares:
            pairs = self._create_pairs(total, split_count, decode_shares)
        splits = tuple(
            Partition(i + 1, pair.prefill_sms, decode_sms)
            for i, (decode_sms, pair) in enumerate(sorted(pairs.items()))
        )
        self.table = PartitionTable(total, splits)
        self._thread = WorkThread("prefill-launches", partial(torch.cuda.set_device, device))
        self._all: list[Lane] = []

        def add(phase: Phase, partition: Partition, stream: torch.cuda.Stream) -> None:
            thread = self._thread if phase is Phase.PREFILL else None
            self._all.append(CudaLane(phase, partition, stream, clock, thread))

        for phase in Phase:
            add(phase, self.table.whole, torch.cuda.Stream(device))
        for split in splits:
            pair = pairs[split.decode_sms]
            add(Phase.DECODE, split, pair.decode)
            add(Phase.PREFILL, split, pair.prefill)
        self._lanes = LaneMap(self._all)

    def _create_pairs(
        self, total: int, split_count: int, decode_shares: Sequence[int] | None
    ) -> dict[int, _Pair]:
        """By granted decode SMs."""
        try:
            from cuda.core import ContextOptions, Device, SMResourceOptions
        except ImportError as error:
            raise PartitionError(
                "partitioning SMs needs cuda-core >= 1.2: pip install 'sglang-drift[cuda]'"
            ) from error
        torch.zeros(1, device=self._device)  # creates the primary context that cuda-core joins
        index = self._device.index or 0
        device = Device(index)
        device.set_current()
        sms = device.resources.sm
        if decode_shares is None:
            decode_shares = even_decode_shares(
                total, split_count, minimum=sms.min_partition_size, step=sms.coscheduled_alignment
            )
        pairs: dict[int, _Pair] = {}
        for share in decode_shares:
            if not 0 < share < total:
                raise PartitionError(f"{share} decode SMs do not fit a device of {total} SMs")
            (decode_part,), prefill_part = sms.split(SMResourceOptions(count=[share]))
            if prefill_part.sm_count < 1:
                raise PartitionError(f"{share} decode SMs leave no SM for prefill")
            granted = self.granted[share] = decode_part.sm_count
            if (index, granted) not in _pairs:
                contexts = [
                    device.create_context(ContextOptions(resources=[part]))
                    for part in (decode_part, prefill_part)
                ]
                owned = [context.create_stream() for context in contexts]
                decode, prefill = (
                    torch.cuda.ExternalStream(int(stream.handle), self._device) for stream in owned
                )
                _pairs[index, granted] = _Pair(
                    prefill_part.sm_count, decode, prefill, [*contexts, *owned]
                )
            pairs[granted] = _pairs[index, granted]
        return pairs

    def lane(self, phase: Phase, partition: Partition) -> Lane:
        return self._lanes[phase, partition]

    def completion_fd(self) -> int | None:
        return None

    def close(self) -> None:
        for lane in self._all:
            lane.launch(lambda: None).wait(CLOSE_TIMEOUT_S)
        self._thread.close(CLOSE_TIMEOUT_S)
