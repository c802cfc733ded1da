"""The loop turn that drives two workers from one thread.

    settle  -> finished work becomes tokens; a finished prefill joins decode
    admit   -> a new prefill batch, if none is in flight
    plan    -> which partition, how much of each phase
    launch  -> decode first, for its launch is short and its deadline near; then prefill layers

Prompts take one of two ways, from turn to turn: in a prefill batch, slice by slice on the prefill
lane, or as tokens that ride in a decode step (a fused step). A prompt may begin on one way and go
on on the other: fused steps and slices run one behind the other, in the order of launch.

The host never blocks on a lane. The engine behind the `Engine` protocol owns requests and
memory; the gang owns what is in flight.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from drift_scheduler.dispatcher import Dispatcher, LoadView, PrefillView
from drift_scheduler.lane import Lane, LaneProvider, Phase, Ticket, Work
from drift_scheduler.partition import Partition
from drift_scheduler.timeline import LaneRun, Timeline


class PrefillJob(Protocol):
    """A batch of prompts (or chunks of prompts) that runs through the layers in slices."""

    @property
    def requests(self) -> int: ...

    @property
    def tokens(self) -> int:
        """New tokens, those found in the prefix cache not counted."""
        ...

    @property
    def cancelled(self) -> bool:
        """Nobody wants the result any more: launch no further layers."""
        ...

    def slice_work(self, lane: Lane, first: int, last: int) -> Work:
        """Layers first..last-1; the last slice also samples each prompt's first token."""
        ...


class DecodeJob(Protocol):
    """One decode step of every running request, and prompt tokens that ride in it."""

    @property
    def requests(self) -> int: ...

    @property
    def tokens(self) -> int:
        """New tokens, those of prompts included."""
        ...

    @property
    def fused_tokens(self) -> int:
        """Those of prompts; 0 in a plain decode step."""
        ...

    def step_work(self, lane: Lane) -> Work: ...


P = TypeVar("P", bound=PrefillJob)
D = TypeVar("D", bound=DecodeJob)


class Engine(Protocol[P, D]):
    """What the gang asks of a serving engine. All calls come from the engine thread."""

    @property
    def num_layers(self) -> int: ...

    @property
    def waiting(self) -> int:
        """Prompts that could start or go on."""
        ...

    @property
    def waiting_tokens(self) -> int:
        """Their tokens that no launch has taken yet; what may be cached is counted too."""
        ...

    @property
    def running(self) -> int:
        """Requests that want another decode step."""
        ...

    def begin_prefill(self) -> P | None:
        """Forms a batch and takes memory for it; None if nothing fits now."""
        ...

    def finish_prefill(self, job: P) -> None:
        """All launched slices are done. A job that was cancelled half way also ends here."""
        ...

    def begin_decode(self, steps_in_flight: int, fused_tokens: int) -> D | None:
        """The next step, with memory for its tokens; None if no request can take one now.

        fused_tokens: prompt tokens that may ride in it; always 0 beside a prefill batch, since
        two half-filled prompts could wait for each other's memory. The steps before it are not
        settled yet: a prompt goes on where the last launch left it, and one that the last launch
        completed takes its first decode step.
        """
        ...

    def finish_decode(self, job: D) -> None:
        """The step is done; its tokens are on the host."""
        ...


@dataclass(slots=True)
class _Slice:
    ticket: Ticket
    partition: Partition
    layers: int


@dataclass(slots=True)
class _Prefill(Generic[P]):
    job: P
    launched: int = 0
    finished: int = 0
    finished_s: float = 0.0
    in_flight: deque[_Slice] = field(default_factory=deque)

    def view(self, num_layers: int) -> PrefillView:
        return PrefillView(
            tokens=self.job.tokens,
            layers_launched=self.launched,
            layers_total=num_layers,
            slices_in_flight=len(self.in_flight),
            layer_s=self.finished_s / self.finished if self.finished else None,
        )


@dataclass(slots=True)
class _Step(Generic[D]):
    job: D
    ticket: Ticket
    partition: Partition


class Gang(Generic[P, D]):
    """Two workers in step. `turn` does what can be done now and returns at once."""

    def __init__(
        self,
        engine: Engine[P, D],
        lanes: LaneProvider,
        dispatcher: Dispatcher,
        timeline: Timeline,
        clock: Callable[[], float],
    ) -> None:
        self._engine = engine
        self._lanes = lanes
        self._dispatcher = dispatcher
        self._timeline = timeline
        self._clock = clock
        self._prefill: _Prefill[P] | None = None
        self._decode: deque[_Step[D]] = deque()
        self._decode_step_s: float | None = None
        # A phase's launches may move between lanes: each one runs behind the last of its phase.
        self._last_decode: Ticket | None = None
        self._last_slice: Ticket | None = None
        # The last slice of prefills that have joined decode since the last decode launch.
        self._merged: Ticket | None = None
        # The last fused step, until a slice has been put behind it.
        self._last_fused: Ticket | None = None

    @property
    def idle(self) -> bool:
        """Nothing is in flight."""
        return self._prefill is None and not self._decode

    def turn(self) -> bool:
        """One round. Returns whether anything was settled or launched."""
        # Slices are polled before decode steps: a batch may follow a fused step that fills the
        # same prompt, and is only finished once that step is settled.
        settled = self._settle_slices() + self._settle_decode() + self._finish_prefill()
        now_s = self._clock()
        view = self._view()
        if view.waiting and self._prefill is None and self._dispatcher.admits(view, now_s):
            job = self._engine.begin_prefill()
            self._prefill = _Prefill(job) if job else None
            view = self._view()
        plan = self._dispatcher.dispatch(view, now_s)
        launched = False
        if plan.decode:
            launched |= self._launch_decode(plan.partition, plan.fused_tokens)
        if plan.prefill_layers and self._prefill and not self._prefill.job.cancelled:
            launched |= self._launch_prefill(plan.partition, plan.prefill_layers)
        return bool(settled) or launched

    def _settle_decode(self) -> int:
        settled = 0
        while self._decode and self._decode[0].ticket.done():
            step = self._decode.popleft()
            job, span = step.job, step.ticket.span()
            if not job.fused_tokens:
                self._decode_step_s = span.duration_s
            self._timeline.add(
                LaneRun(
                    Phase.DECODE,
                    step.partition,
                    span,
                    job.requests,
                    job.tokens,
                    fused_tokens=job.fused_tokens,
                )
            )
            self._engine.finish_decode(job)
            settled += 1
        return settled

    def _settle_slices(self) -> int:
        prefill = self._prefill
        if prefill is None:
            return 0
        settled = 0
        while prefill.in_flight and prefill.in_flight[0].ticket.done():
            done = prefill.in_flight.popleft()
            span = done.ticket.span()
            prefill.finished += done.layers
            prefill.finished_s += span.duration_s
            job = prefill.job
            self._timeline.add(
                LaneRun(Phase.PREFILL, done.partition, span, job.requests, job.tokens, done.layers)
            )
            settled += 1
        return settled

    def _finish_prefill(self) -> int:
        prefill = self._prefill
        if prefill is None:
            return 0
        complete = prefill.finished == self._engine.num_layers
        dropped = prefill.job.cancelled and not prefill.in_flight
        if not complete and not dropped:
            return 0
        self._prefill = None
        self._merged = self._last_slice
        self._engine.finish_prefill(prefill.job)
        return 1

    def _view(self) -> LoadView:
        return LoadView(
            waiting=self._engine.waiting,
            running=self._engine.running,
            decode_in_flight=len(self._decode),
            prefill=self._prefill.view(self._engine.num_layers) if self._prefill else None,
            decode_step_s=self._decode_step_s,
            waiting_tokens=self._engine.waiting_tokens,
        )

    def _launch_decode(self, partition: Partition, fused_tokens: int) -> bool:
        job = self._engine.begin_decode(len(self._decode), 0 if self._prefill else fused_tokens)
        if job is None:
            return False
        lane = self._lanes.lane(Phase.DECODE, partition)
        # Behind the prefill whose rows join now or whose prompt goes on here, so that its writes
        # are visible to this lane; not behind the slices of the prefill that is still running.
        ticket = lane.launch(job.step_work(lane), after=_given(self._last_decode, self._merged))
        self._last_decode, self._merged = ticket, None
        if job.fused_tokens:
            self._last_fused = ticket
        self._decode.append(_Step(job, ticket, partition))
        return True

    def _launch_prefill(self, partition: Partition, layers: int) -> bool:
        prefill = self._prefill
        assert prefill is not None
        first = prefill.launched
        last = min(first + layers, self._engine.num_layers)
        if first == last:
            return False
        lane = self._lanes.lane(Phase.PREFILL, partition)
        ticket = lane.launch(
            prefill.job.slice_work(lane, first, last),
            after=_given(self._last_slice, self._last_fused),
        )
        self._last_slice, self._last_fused = ticket, None
        prefill.in_flight.append(_Slice(ticket, partition, last - first))
        prefill.launched = last
        return True


def _given(*tickets: Ticket | None) -> list[Ticket]:
    return [ticket for ticket in tickets if ticket is not None]
