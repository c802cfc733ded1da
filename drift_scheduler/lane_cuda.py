"""CUDA lanes: a lane is a stream of a green context, so its kernels stay on its own SMs.

Green contexts come from cuda-core, which reports the SM counts that the driver really granted.
All of them are created once: creating or destroying one under load is not safe and not needed,
since a re-partition only means that the next launch goes to another stream.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch

from drift_scheduler.lane import Lane, LaneMap, LaneTimeout, Phase, Span, Ticket, Work
from drift_scheduler.partition import Partition, PartitionError, PartitionTable, even_decode_shares

CLOSE_TIMEOUT_S = 30.0
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
    """Two events around the work."""

    def __init__(self, clock: DeviceClock) -> None:
        self._base, self._base_s = clock.base()
        self.start = torch.cuda.Event(enable_timing=True)
        self.end = torch.cuda.Event(enable_timing=True)

    def done(self) -> bool:
        return bool(self.end.query())

    def wait(self, timeout_s: float) -> None:
        deadline_s = time.monotonic() + timeout_s
        while not self.end.query():
            if time.monotonic() > deadline_s:
                raise LaneTimeout(f"CUDA lane work still running after {timeout_s:.0f} s")
            time.sleep(POLL_S)

    def span(self) -> Span:
        start_s = self._base_s + self._base.elapsed_time(self.start) / 1e3
        return Span(start_s, start_s + self.start.elapsed_time(self.end) / 1e3)


class CudaLane:
    """Enqueues work on one stream. Launching is asynchronous; the engine thread does it."""

    def __init__(
        self,
        phase: Phase,
        partition: Partition,
        stream: torch.cuda.Stream,
        clock: DeviceClock,
    ) -> None:
        self.phase = phase
        self.partition = partition
        self.stream = stream
        self._clock = clock

    @property
    def sms(self) -> int:
        prefill = self.phase is Phase.PREFILL
        return self.partition.prefill_sms if prefill else self.partition.decode_sms

    def launch(self, work: Work, after: Sequence[Ticket] = ()) -> CudaTicket:
        ticket = CudaTicket(self._clock)
        with torch.cuda.stream(self.stream), torch.inference_mode():
            for earlier in after:
                assert isinstance(earlier, CudaTicket), type(earlier)
                self.stream.wait_event(earlier.end)
            ticket.start.record(self.stream)
            work()
            ticket.end.record(self.stream)
        return ticket


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
        self._green_contexts: list[Any] = []  # keeps contexts and streams alive
        # Decode SMs asked for -> granted.
        self.granted: dict[int, int] = {}
        pairs: dict[int, tuple[int, torch.cuda.Stream, torch.cuda.Stream]] = {}
        if split_count or decode_shares:
            pairs = self._create_pairs(total, split_count, decode_shares)
        splits = tuple(
            Partition(i + 1, prefill_sms, decode_sms)
            for i, (decode_sms, (prefill_sms, _, _)) in enumerate(sorted(pairs.items()))
        )
        self.table = PartitionTable(total, splits)
        whole = self.table.whole
        self._all: list[Lane] = [
            CudaLane(phase, whole, torch.cuda.Stream(device), clock) for phase in Phase
        ]
        for split in splits:
            _, decode_stream, prefill_stream = pairs[split.decode_sms]
            self._all.append(CudaLane(Phase.DECODE, split, decode_stream, clock))
            self._all.append(CudaLane(Phase.PREFILL, split, prefill_stream, clock))
        self._lanes = LaneMap(self._all)

    def _create_pairs(
        self, total: int, split_count: int, decode_shares: Sequence[int] | None
    ) -> dict[int, tuple[int, torch.cuda.Stream, torch.cuda.Stream]]:
        """Green-context streams by granted decode SMs: (prefill SMs, decode, prefill stream)."""
        try:
            from cuda.core import ContextOptions, Device, SMResourceOptions
        except ImportError as error:
            raise PartitionError(
                "partitioning SMs needs cuda-core >= 1.2: pip install 'sglang-drift[cuda]'"
            ) from error
        torch.zeros(1, device=self._device)  # creates the primary context that cuda-core joins
        device = Device(self._device.index or 0)
        device.set_current()
        sms = device.resources.sm
        if decode_shares is None:
            decode_shares = even_decode_shares(
                total, split_count, minimum=sms.min_partition_size, step=sms.coscheduled_alignment
            )
        pairs: dict[int, tuple[int, torch.cuda.Stream, torch.cuda.Stream]] = {}
        for share in decode_shares:
            if not 0 < share < total:
                raise PartitionError(f"{share} decode SMs do not fit a device of {total} SMs")
            (decode_part,), prefill_part = sms.split(SMResourceOptions(count=[share]))
            if prefill_part.sm_count < 1:
                raise PartitionError(f"{share} decode SMs leave no SM for prefill")
            self.granted[share] = decode_part.sm_count
            if decode_part.sm_count in pairs:
                continue
            streams = []
            for part in (decode_part, prefill_part):
                context = device.create_context(ContextOptions(resources=[part]))
                stream = context.create_stream()
                self._green_contexts += [context, stream]
                streams.append(torch.cuda.ExternalStream(int(stream.handle), self._device))
            pairs[decode_part.sm_count] = (prefill_part.sm_count, streams[0], streams[1])
        return pairs

    def lane(self, phase: Phase, partition: Partition) -> Lane:
        return self._lanes[phase, partition]

    def completion_fd(self) -> int | None:
        return None

    def close(self) -> None:
        for lane in self._all:
            lane.launch(lambda: None).wait(CLOSE_TIMEOUT_S)
        self._green_contexts.clear()
