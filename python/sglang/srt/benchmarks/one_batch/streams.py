"""Streams of equal work on a lane, launched as the serving loop launches it, and timed.

A stream keeps two launches in flight, so that its lane need not wait for the host. `drive` turns
one stream or two of them, on disjoint lanes, from one thread.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from drift_scheduler.dispatcher import MAX_SLICES_IN_FLIGHT
from drift_scheduler.lane import Lane, LaneTimeout, Span, Ticket
from sglang.srt.model_executor.bring_up import DECODE_DEPTH
from sglang.srt.model_executor.host_batch import HostBatch
from sglang.srt.model_executor.model_runner import Run, Runner

STALL_LIMIT_S = 120.0


@dataclass(frozen=True, slots=True)
class Launch:
    """A decode step: its time on the lane, and the launching thread's time for it.

    host_s is wall-clock time, cpu_s time on a core. On a CPU lane the launch only hands over.
    """

    span: Span
    host_s: float
    cpu_s: float


@dataclass(frozen=True, slots=True)
class Slice:
    """Of a prefill: its time on the lane, and Ticket.launch_s."""

    span: Span
    launch_s: float


class Stream(Protocol):
    """Work of one phase that goes on until a count is reached or `stop` is called."""

    @property
    def idle(self) -> bool:
        """Nothing is in flight and nothing more will be launched."""
        ...

    def pump(self) -> bool:
        """Settles what is done, launches what may be. Returns whether there was any."""
        ...

    def stop(self) -> None:
        """Launch nothing new; what has begun is finished."""
        ...


def drive(streams: Sequence[Stream], wait: Callable[[], None], enough: Callable[[], bool]) -> None:
    """Turns the streams until all are idle; stops them once `enough`.

    wait: returns when work may have finished.

    Raises LaneTimeout when nothing finishes for STALL_LIMIT_S.
    """
    progress_s = time.monotonic()
    while not all(stream.idle for stream in streams):
        if sum(stream.pump() for stream in streams):
            progress_s = time.monotonic()
            if enough():
                for stream in streams:
                    stream.stop()
        elif time.monotonic() - progress_s > STALL_LIMIT_S:
            raise LaneTimeout(f"no work finished for {STALL_LIMIT_S:.0f} s")
        else:
            wait()


class DecodeStream:
    """Decode steps, one behind the other. `batch_of` gives the batch of step 0, 1, ..."""

    def __init__(
        self,
        runner: Runner,
        lane: Lane,
        batch_of: Callable[[int], HostBatch],
        steps: float = math.inf,
    ) -> None:
        self._runner = runner
        self._lane = lane
        self._batch_of = batch_of
        self._wanted = steps
        self._launched = 0
        self._in_flight: deque[tuple[Run, _Pending]] = deque()
        self.done: list[Launch] = []

    @property
    def idle(self) -> bool:
        return not self._in_flight and self._launched >= self._wanted

    def stop(self) -> None:
        self._wanted = self._launched

    def pump(self) -> bool:
        settled = 0
        while self._in_flight and self._in_flight[0][1].ticket.done():
            run, pending = self._in_flight.popleft()
            tokens = _Stopwatch()
            run.tokens()
            self.done.append(pending.finish(tokens.read()))
            settled += 1
        launched = 0
        while len(self._in_flight) < DECODE_DEPTH and self._launched < self._wanted:
            after = [self._in_flight[-1][1].ticket] if self._in_flight else []
            host = _Stopwatch()
            run = self._runner.start(self._batch_of(self._launched))
            work = run.slice_work(self._lane, 0, self._runner.num_layers)
            ticket = self._lane.launch(work, after)
            self._in_flight.append((run, _Pending(ticket, *host.read())))
            self._launched += 1
            launched += 1
        return bool(settled or launched)


@dataclass(frozen=True, slots=True)
class PrefillRun:
    """One prefill: its slices in order."""

    slices: tuple[Slice, ...]

    @property
    def span(self) -> Span:
        """From the start of the first slice to the end of the last, gaps between included."""
        return Span(self.slices[0].span.start_s, self.slices[-1].span.end_s)


class PrefillStream:
    """The same prefill again and again; as one launch if it is short enough for a graph.

    slice_layers: layers of a slice of the first run, the second, ...; then from the first again.
    With slices of all layers a prefill is one launch, and the next one is launched behind it only
    when it is done, as in serving, where its tokens decide what comes next.
    """

    def __init__(
        self,
        runner: Runner,
        lane: Lane,
        batch: HostBatch,
        slice_layers: Sequence[int],
        runs: float = math.inf,
    ) -> None:
        self._runner = runner
        self._lane = lane
        self._batch = batch
        self._slice_layers = slice_layers
        self._wanted = runs
        self._started = 0
        self._run: Run | None = None
        self._next_layer = 0
        self._in_flight: deque[Ticket] = deque()
        self._slices: list[Slice] = []
        self.done: list[PrefillRun] = []

    @property
    def idle(self) -> bool:
        return self._run is None and self._started >= self._wanted

    def stop(self) -> None:
        self._wanted = self._started

    def pump(self) -> bool:
        settled = 0
        while self._in_flight and self._in_flight[0].done():
            ticket = self._in_flight.popleft()
            self._slices.append(Slice(ticket.span(), ticket.launch_s))
            settled += 1
        layers = self._runner.num_layers
        if self._run and self._next_layer == layers and not self._in_flight:
            self._run.tokens()
            self.done.append(PrefillRun(tuple(self._slices)))
            self._run, self._slices = None, []
        launched = 0
        if self._run is None and self._started < self._wanted:
            self._run = self._runner.start(self._batch)
            self._started += 1
            self._next_layer = 0
        while (
            self._run and self._next_layer < layers and len(self._in_flight) < MAX_SLICES_IN_FLIGHT
        ):
            turn = (self._started - 1) % len(self._slice_layers)
            asked = layers if self._run.indivisible else self._slice_layers[turn]
            first, last = self._next_layer, min(self._next_layer + asked, layers)
            after = [self._in_flight[-1]] if self._in_flight else []
            work = self._run.slice_work(self._lane, first, last)
            self._in_flight.append(self._lane.launch(work, after))
            self._next_layer = last
            launched += 1
        return bool(settled or launched)


class _Stopwatch:
    def __init__(self) -> None:
        self._host_s, self._cpu_s = time.perf_counter(), time.thread_time()

    def read(self) -> tuple[float, float]:
        """(wall-clock, CPU) seconds of this thread since the start."""
        return time.perf_counter() - self._host_s, time.thread_time() - self._cpu_s


@dataclass(frozen=True, slots=True)
class _Pending:
    ticket: Ticket
    host_s: float
    cpu_s: float

    def finish(self, settling: tuple[float, float]) -> Launch:
        host_s, cpu_s = settling
        return Launch(self.ticket.span(), self.host_s + host_s, self.cpu_s + cpu_s)
