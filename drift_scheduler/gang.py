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

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Generic, Protocol, TypeVar

from drift_scheduler.backlog import Backlog
from drift_scheduler.dispatcher import Admission, Dispatcher, Forecast, Plan
from drift_scheduler.host_delay import HostDelay
from drift_scheduler.lane import Lane, LaneProvider, Phase, Span, Ticket, Work
from drift_scheduler.partition import Partition
from drift_scheduler.shapes import DecodeShape, PrefillShape
from drift_scheduler.timeline import LaneRun, Timeline
from drift_scheduler.view import LoadView, PrefillView


class PrefillJob(Protocol):
    """A batch of prompts (or chunks of prompts) that runs through the layers in slices."""

    @property
    def shape(self) -> PrefillShape: ...

    @property
    def due_s(self) -> float:
        """When the first token of one of its prompts is due, the earliest; infinity without."""
        ...

    @property
    def indivisible(self) -> bool:
        """All its layers are one launch, however few are asked for: a short batch, as a graph."""
        ...

    @property
    def cancelled(self) -> bool:
        """Nobody wants the result any more: launch no further layers."""
        ...

    def slice_work(self, lane: Lane, first: int, last: int) -> Work:
        """Layers first..last-1; the last slice also samples each prompt's first token.

        Slices of another job may have run on the lane since the last one.
        """
        ...


class DecodeJob(Protocol):
    """One decode step of every running request, and prompt tokens that ride in it."""

    @property
    def shape(self) -> DecodeShape:
        """Of the running requests."""
        ...

    @property
    def fused(self) -> PrefillShape | None:
        """Of the prompts that ride in it; None in a plain decode step."""
        ...

    def step_work(self, lane: Lane) -> Work: ...


@dataclass(frozen=True, slots=True)
class DecodeLoad:
    """The next decode step; see LoadView for the fields."""

    shape: DecodeShape
    tbt_s: float = math.inf
    joined_due_s: float = math.inf
    awaits_tokens: bool = False


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
    def backlog(self) -> Backlog:
        """The waiting prompts, to choose among."""
        ...

    def decode_load(self) -> DecodeLoad:
        """Of the requests that want another decode step."""
        ...

    def shed(self, keys: Sequence[str]) -> None:
        """Refuses waiting prompts: the server is overloaded."""
        ...

    def begin_prefill(self, admission: Admission) -> P | None:
        """Forms a batch and takes memory for it; None if nothing fits now.

        With admission.preempts a batch is in flight and stays so; no prompt is cut.
        """
        ...

    def finish_prefill(self, job: P) -> None:
        """All launched slices are done. A job that was cancelled half way also ends here."""
        ...

    def begin_decode(
        self, steps_in_flight: int, fused_tokens: int, fused_order: Sequence[str] | None
    ) -> D | None:
        """The next step, with memory for its tokens; None if no request can take one now.

        fused_tokens: prompt tokens that may ride in it; always 0 beside a prefill batch, since
        two half-filled prompts could wait for each other's memory. fused_order: see Plan. The
        steps before it are not settled yet: a prompt goes on where the last launch left it, and
        one that the last launch completed takes its first decode step.
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
    beside: DecodeShape | None
    forecast: Forecast | None
    reason: str


@dataclass(slots=True)
class _Prefill(Generic[P]):
    job: P
    launched: int = 0
    finished: int = 0
    finished_s: float = 0.0
    in_flight: deque[_Slice] = field(default_factory=deque)

    def view(self, num_layers: int) -> PrefillView:
        return PrefillView(
            shape=self.job.shape,
            layers_launched=self.launched,
            layers_total=num_layers,
            slices_in_flight=len(self.in_flight),
            layer_s=self.finished_s / self.finished if self.finished else None,
            due_s=self.job.due_s,
            indivisible=self.job.indivisible,
        )


@dataclass(slots=True)
class _Step(Generic[D]):
    job: D
    ticket: Ticket
    partition: Partition
    launched_s: float
    beside: PrefillShape | None
    forecast: Forecast | None
    reason: str


def _nothing(run: LaneRun) -> None:
    return None


def _no_matter() -> None:
    return None


class Gang(Generic[P, D]):
    """Two workers in step. `turn` does what can be done now and returns at once.

    observe: called with every run as it is settled. host_delay: what is known of the host; nothing
    if left out.
    """

    def __init__(
        self,
        engine: Engine[P, D],
        lanes: LaneProvider,
        dispatcher: Dispatcher,
        timeline: Timeline,
        clock: Callable[[], float],
        observe: Callable[[LaneRun], None] = _nothing,
        host_delay: HostDelay | None = None,
    ) -> None:
        self.dispatcher = dispatcher  # may be replaced between turns
        self.on_settled: Callable[[], None] = _no_matter
        """Called when work has become tokens and before anything is launched: launches take the
        host far longer than sending tokens does."""
        self.look_again_s: float | None = None
        """When the next turn is due even if nothing happens by then."""
        self._engine = engine
        self._lanes = lanes
        self._timeline = timeline
        self._clock = clock
        self._observe = observe
        self._prefill: _Prefill[P] | None = None
        # A batch that the one in flight has pre-empted.
        self._parked: _Prefill[P] | None = None
        self._decode: deque[_Step[D]] = deque()
        self._decode_step_s: float | None = None
        self._decode_ended_s = 0.0
        # None if nobody wanted another token then: the next step goes on with nobody's.
        self._decode_settled_s: float | None = None
        self._host_delay = HostDelay() if host_delay is None else host_delay
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

    @property
    def has_finished_work(self) -> bool:
        """Something in flight has ended, for the next turn to settle."""
        oldest = [step.ticket for step in islice(self._decode, 1)]
        for prefill in filter(None, (self._prefill, self._parked)):
            oldest += [part.ticket for part in islice(prefill.in_flight, 1)]
        return any(ticket.done() for ticket in oldest)

    @property
    def host_allowance_s(self) -> float:
        """See HostDelay."""
        return self._host_delay.allowance_s

    def learn_host_anew(self) -> None:
        """What the host adds hangs on what is launched: another policy launches otherwise."""
        self._host_delay = HostDelay()

    def turn(self) -> bool:
        """One round. Returns whether anything was settled or launched."""
        # Slices are polled before decode steps: a batch may follow a fused step that fills the
        # same prompt, and is only finished once that step is settled.
        settled = self._settle_slices() + self._settle_decode()
        if settled:
            self.on_settled()
        if self._finish_prefill():
            self.on_settled()
            settled += 1
        now_s = self._clock()
        view = self._view()
        if not view.running and not self._decode:
            self._decode_settled_s = None
        if view.waiting and self._may_admit():
            view = self._admit(view, now_s)
        plan = self.dispatcher.dispatch(view, now_s)
        self.look_again_s = plan.look_again_s
        launched = False
        if plan.decode:
            launched |= self._launch_decode(plan)
        if plan.prefill_layers and self._prefill and not self._prefill.job.cancelled:
            launched |= self._launch_prefill(plan, view)
        launched_on = plan.partition if launched else None
        self._timeline.look(view, launched_on, now_s, self._decode_ended_s)
        return bool(settled) or launched

    def _may_admit(self) -> bool:
        if self._prefill is None:
            return True
        return self._parked is None and self._prefill.launched < self._engine.num_layers

    def _admit(self, view: LoadView, now_s: float) -> LoadView:
        admission = self.dispatcher.admit(view, now_s)
        if admission is None:
            return view
        if admission.shed:
            self._engine.shed(admission.shed)
        if admission.preempts == (self._prefill is None):
            return self._view()
        job = self._engine.begin_prefill(admission)
        if job is not None:
            if self._prefill is not None:
                self._timeline.preempted()
            self._parked, self._prefill = self._prefill, _Prefill(job)
        return self._view()

    def _settle_decode(self) -> int:
        settled = 0
        while self._decode and self._decode[0].ticket.done():
            step = self._decode.popleft()
            job, span = step.job, step.ticket.span()
            fused = job.fused
            if fused is None:
                self._decode_step_s = span.duration_s
            settled_s = self._clock()
            self._note_delay(step, span, settled_s)
            self._decode_ended_s, self._decode_settled_s = span.end_s, settled_s
            self._note(
                LaneRun(
                    Phase.DECODE,
                    step.partition,
                    span,
                    job.shape.requests + (fused.requests if fused else 0),
                    job.shape.requests + (fused.tokens if fused else 0),
                    decode=job.shape,
                    prefill=fused or step.beside,
                    fused_tokens=fused.tokens if fused else 0,
                    forecast=step.forecast,
                    reason=step.reason,
                    settled_s=settled_s,
                )
            )
            self._engine.finish_decode(job)
            settled += 1
        return settled

    def _note_delay(self, step: _Step[D], span: Span, settled_s: float) -> None:
        """By what the host has delayed the step's tokens: it launched the step late, or noticed
        its end late; what it noticed the last one late by is not added."""
        if self._decode_settled_s is None:
            return
        launched_late_s = max(0.0, step.launched_s - self._decode_ended_s)
        noticed_late_s = settled_s - span.end_s
        last_late_s = self._decode_settled_s - self._decode_ended_s
        self._host_delay.observe(launched_late_s + noticed_late_s - last_late_s)

    def _settle_slices(self) -> int:
        # A parked batch's slices were launched before those of the batch in flight, and may end
        # between two polls: runs are noted in the order in which they ran.
        settled = self._settle_slices_of(self._parked) if self._parked else 0
        if self._prefill and not (self._parked and self._parked.in_flight):
            settled += self._settle_slices_of(self._prefill)
        return settled

    def _settle_slices_of(self, prefill: _Prefill[P]) -> int:
        settled = 0
        while prefill.in_flight and prefill.in_flight[0].ticket.done():
            done = prefill.in_flight.popleft()
            span = done.ticket.span()
            prefill.finished += done.layers
            prefill.finished_s += span.duration_s
            shape = prefill.job.shape
            self._note(
                LaneRun(
                    Phase.PREFILL,
                    done.partition,
                    span,
                    shape.requests,
                    shape.tokens,
                    layers=done.layers,
                    prefill=shape,
                    decode=done.beside,
                    forecast=done.forecast,
                    reason=done.reason,
                    settled_s=self._clock(),
                )
            )
            settled += 1
        return settled

    def _note(self, run: LaneRun) -> None:
        self._timeline.add(run)
        self._observe(run)

    def _finish_prefill(self) -> int:
        prefill = self._prefill
        if prefill is None:
            return 0
        complete = prefill.finished == self._engine.num_layers
        dropped = prefill.job.cancelled and not prefill.in_flight
        if not complete and not dropped:
            return 0
        self._prefill, self._parked = self._parked, None
        self._merged = self._last_slice
        self._engine.finish_prefill(prefill.job)
        return 1

    def _view(self) -> LoadView:
        engine = self._engine
        load = engine.decode_load()
        return LoadView(
            waiting=engine.waiting,
            waiting_tokens=engine.waiting_tokens,
            backlog=engine.backlog,
            running=load.shape.requests,
            decode=load.shape,
            tbt_s=load.tbt_s,
            joined_due_s=load.joined_due_s,
            awaits_tokens=load.awaits_tokens,
            decode_in_flight=len(self._decode),
            decode_step_s=self._decode_step_s,
            decode_ends_s=self._decode_ends_s(),
            prefill=self._prefill.view(engine.num_layers) if self._prefill else None,
            parked=self._parked.view(engine.num_layers) if self._parked else None,
            host_s=self.host_allowance_s,
        )

    def _decode_ends_s(self) -> float | None:
        """When the launched steps are expected to end, one behind the other."""
        if not self._decode:
            return None
        end_s = self._decode_ended_s
        for step in self._decode:
            took_s = step.forecast.expected_s if step.forecast else self._decode_step_s
            if took_s is None:
                return None
            end_s = max(end_s, step.launched_s) + took_s
        return end_s

    def _launch_decode(self, plan: Plan) -> bool:
        fused_tokens = 0 if self._prefill else plan.fused_tokens
        job = self._engine.begin_decode(len(self._decode), fused_tokens, plan.fused_order)
        if job is None:
            return False
        lane = self._lanes.lane(Phase.DECODE, plan.partition)
        # Behind the prefill whose rows join now or whose prompt goes on here, so that its writes
        # are visible to this lane. Behind the slices of the prefill that is still running only
        # where both have the whole device, so that they take turns on it.
        turns = plan.partition.exclusive and self._prefill is not None
        behind = self._last_slice if turns else self._merged
        launched_s = self._clock()
        ticket = lane.launch(job.step_work(lane), after=_given(self._last_decode, behind))
        self._last_decode, self._merged = ticket, None
        if job.fused:
            self._last_fused = ticket
        prefill = None if plan.partition.exclusive else self._prefill
        runs_beside = prefill and (prefill.in_flight or plan.prefill_layers)
        beside = prefill.job.shape if prefill and runs_beside else None
        self._decode.append(
            _Step(job, ticket, plan.partition, launched_s, beside, plan.step, plan.reason)
        )
        return True

    def _launch_prefill(self, plan: Plan, view: LoadView) -> bool:
        prefill = self._prefill
        assert prefill is not None
        first = prefill.launched
        last = min(first + plan.prefill_layers, self._engine.num_layers)
        if prefill.job.indivisible:
            last = self._engine.num_layers
        if first == last:
            return False
        lane = self._lanes.lane(Phase.PREFILL, plan.partition)
        ticket = lane.launch(
            prefill.job.slice_work(lane, first, last),
            after=_given(
                self._last_slice,
                self._last_decode if plan.partition.exclusive else self._last_fused,
            ),
        )
        self._last_slice, self._last_fused = ticket, None
        runs_beside = self._decode and view.running and not plan.partition.exclusive
        beside = view.decode if runs_beside else None
        prefill.in_flight.append(
            _Slice(
                ticket,
                plan.partition,
                last - first,
                beside,
                plan.layer.times(last - first) if plan.layer else None,
                plan.reason,
            )
        )
        prefill.launched = last
        return True


def _given(*tickets: Ticket | None) -> list[Ticket]:
    return [ticket for ticket in tickets if ticket is not None]
