"""SimEngine: gang.Engine without a model; requests, memory and a prefix cache, but only times.

    waiting    in the backlog, nothing held
    filling    holds what is filled of its prompt; of one at most, only the beginning is launched
    running    a decode step after the other takes one more token
    finished   had as many tokens as the trace says; its prompt's full blocks stay cached

It follows the serving engine: who is admitted and when, what is reserved for answers, who is
retracted. It differs in this: prefixes are shared in blocks, answers are not kept for a next turn
to reuse, and a request gives its memory back at its last token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from drift_scheduler.backlog import Backlog
from drift_scheduler.dispatcher import Admission
from drift_scheduler.first_tokens import FirstTokens, may_hold
from drift_scheduler.gang import DecodeLoad
from drift_scheduler.lane import Lane
from drift_scheduler.lane_virtual import TimedWork, VirtualClock
from drift_scheduler.shapes import DecodeShape
from drift_scheduler.simulation.admission import Ask, SimAdmission, expected_output
from drift_scheduler.simulation.jobs import SimPrefill, SimStep, shape_of
from drift_scheduler.simulation.kv_pool import BLOCK_TOKENS, KvPool
from drift_scheduler.simulation.request import Fill, SimRequest
from drift_scheduler.simulation.times import LaunchTimes

# As in the serving engine: prompts of a captured prefill batch.
_GRAPH_PROMPTS = 32


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """max_running: requests that hold memory at once. prefill_tokens: new tokens of a prefill
    batch; a longer prompt is cut into chunks. block_tokens: see KvPool.

    launch_s: host time before a launch runs. batch_launch_s: more of it before the first slice of
    a prefill batch, which is planned then. layer_launch_s: host time for each layer of what is
    launched kernel by kernel, while it runs. A thread of its own spends it on prefill, one slice
    behind the other. graph_tokens: prefill batches and fused steps of so many tokens are a graph:
    one launch, and a batch is not sliced.
    """

    kv_tokens: int
    max_running: int = 256
    prefill_tokens: int = 8192
    launch_s: float = 0.0
    batch_launch_s: float = 0.0
    layer_launch_s: float = 0.0
    graph_tokens: int = 0
    block_tokens: int = BLOCK_TOKENS

    def __post_init__(self) -> None:
        counts = (self.kv_tokens, self.max_running, self.prefill_tokens, self.block_tokens)
        host_s = (self.launch_s, self.batch_launch_s, self.layer_launch_s)
        if min(counts) < 1 or min(*host_s, self.graph_tokens) < 0:
            raise ValueError(f"limits must be positive: {self}")


class Listener(Protocol):
    """Hears what becomes of requests, as their client sees it."""

    def token_gap(self, gap_s: float) -> None:
        """Between two tokens of one request."""
        ...

    def finished(self, request: SimRequest) -> None: ...

    def shed(self, request: SimRequest) -> None: ...

    def refused(self, request: SimRequest) -> None:
        """It is longer than the KV pool."""
        ...


class SimEngine:
    """See the module."""

    def __init__(
        self,
        limits: EngineLimits,
        times: LaunchTimes,
        pool: KvPool,
        clock: VirtualClock,
        listener: Listener,
    ) -> None:
        self._limits = limits
        self._times = times
        self._pool = pool
        self._clock = clock
        self._listener = listener
        self._admission = SimAdmission(pool, limits.max_running, self._expected_growth)
        self.backlog: Backlog = self._admission.backlog
        # Whose prompts are half filled or in flight; a dict for its order.
        self._filling: dict[SimRequest, None] = {}
        # A new list at every change, since steps keep the old ones.
        self._running: list[SimRequest] = []
        self._leaving: dict[int, list[SimRequest]] = {}  # by last step
        self._next_step = 0
        self._context = 0  # tokens that the next step attends to
        self._tbt_of: dict[float, int] = {}  # how many of the running want it
        self._joined: list[SimRequest] = []  # since the last step was launched
        self._load: DecodeLoad | None = None
        self._first_tokens: FirstTokens[SimRequest] = FirstTokens()
        self._prefilling: list[SimPrefill] = []
        self._stepping: list[SimStep] = []
        self._filling_tokens = 0  # of launched fills
        self._host_s = 0.0  # that launches still cost
        self._slices_launched_s = 0.0  # when the thread that launches prefill is done
        # Whose tokens are on the host and not sent, in order, and whether it was the last one.
        self._outbox: list[tuple[SimRequest, bool]] = []
        self.unfinished = 0
        """Requests that are anywhere in the engine."""
        self.retractions = 0
        self.preemptions = 0

    @property
    def num_layers(self) -> int:
        return self._times.num_layers

    @property
    def waiting(self) -> int:
        return 0 if self._admission.blocked else len(self.backlog)

    @property
    def waiting_tokens(self) -> int:
        return 0 if self._admission.blocked else self.backlog.new_tokens

    @property
    def tokens_to_fill(self) -> int:
        """Prompt tokens that wait or whose launch is not done yet."""
        return self.backlog.new_tokens + self._filling_tokens

    def decode_load(self) -> DecodeLoad:
        if self._load is None:
            self._load = DecodeLoad(
                DecodeShape(len(self._running), self._context),
                min(self._tbt_of, default=math.inf),
                min(
                    (
                        request.pace.last_s + request.slo.tbt_s
                        for request in self._joined
                        if request.has_first_token
                    ),
                    default=math.inf,
                ),
            )
        return self._load

    def add(self, request: SimRequest) -> None:
        """The request has arrived. One that cannot fit even alone is refused."""
        if request.input_tokens + request.output_tokens > self._pool.capacity:
            self._listener.refused(request)
            return
        assert not request.blocks or request.block_tokens == self._pool.block_tokens
        self.unfinished += 1
        self._admission.add(request)

    def send(self) -> None:
        """The turn is over, and the host has time for what was settled in it."""
        now_s = self._clock.now_s
        token_gap = self._listener.token_gap
        for request, last in self._outbox:
            seen = request.seen
            if seen.tokens:
                token_gap(now_s - seen.last_s)
            seen.token(now_s)
            if last:
                self._listener.finished(request)
        self._outbox.clear()

    def take_host_s(self) -> float:
        """How long the host is kept by what has been launched since it was last asked."""
        host_s, self._host_s = self._host_s, 0.0
        return host_s

    def shed(self, keys: Sequence[str]) -> None:
        for key in keys:
            request = self._admission.shed(key)
            if request is not None:
                self.unfinished -= 1
                self._listener.shed(request)

    def begin_prefill(self, admission: Admission) -> SimPrefill | None:
        limit = self._limits.prefill_tokens
        tokens = min(admission.tokens or limit, limit)
        fills = self._choose(Ask(tokens, admission.order, beside=admission.preempts))
        if not fills:
            return None
        self.preemptions += admission.preempts
        shape = shape_of(fills)
        graphed = shape.tokens <= self._limits.graph_tokens and shape.requests <= _GRAPH_PROMPTS
        job = SimPrefill(fills, self._slice_of, shape, indivisible=graphed)
        self._prefilling.append(job)
        return job

    def finish_prefill(self, job: SimPrefill) -> None:
        self._prefilling.remove(job)
        self._settle(job.fills, joins_later=True)
        for fill in job.fills:
            if fill.completes_prompt and fill.request.steps:
                self._join(fill.request)

    def begin_decode(
        self, steps_in_flight: int, fused_tokens: int, fused_order: Sequence[str] | None
    ) -> SimStep | None:
        assert not (fused_tokens and self._prefilling), "a fused step beside a prefill batch"
        while not self._pool.take(len(self._running)):
            if steps_in_flight:
                return None  # their tokens tell who leaves of itself
            self._retract(self._running[-1])
        members = self._running
        fills: list[Fill] = []
        if fused_tokens:
            order = None if fused_order is None else tuple(fused_order)
            fills = self._choose(Ask(fused_tokens, order))
        if not members and not fills:
            return None
        self._send(self._first_tokens.step_launched())
        shape = DecodeShape(len(members), self._context)
        last = self._leaving.pop(self._next_step, [])
        self._next_step += 1
        self._context += len(members)
        if last:
            self._stop_stepping(last)
        self._joined, self._load = [], None
        for fill in fills:
            if fill.completes_prompt and fill.request.steps:
                self._join(fill.request)
        fused = shape_of(fills) if fills else None
        step = SimStep(members, last, fills, self._step_s, shape, fused)
        self._stepping.append(step)
        return step

    def finish_decode(self, job: SimStep) -> None:
        self._stepping.remove(job)
        self._send(self._first_tokens.step_settled())
        for request in job.members:
            self._take_token(request)
        for request in job.last:
            self._finish(request)
        if job.fills:
            self._settle(job.fills)

    def check(self) -> None:
        """Asserts that every token of the pool is accounted for."""
        holders = {*self._filling, *self._running}
        holders |= {request for step in self._stepping for request in step.last}
        self._pool.check(sum(map(self._own_tokens, holders)))
        assert len(holders) <= self._limits.max_running, f"{len(holders)} hold memory"
        assert self.unfinished == len(holders) + self._admission.queued, self.unfinished

    def _choose(self, ask: Ask) -> list[Fill]:
        fills = self._admission.choose(ask)
        for fill in fills:
            self._filling[fill.request] = None
            self._filling_tokens += fill.tokens
        return fills

    def _expected_growth(self) -> int:
        """Of running requests and of prompts in flight."""
        partial = self._admission.partial
        started = [request for request in self._filling if request is not partial]
        return sum(
            expected_output(request.last_step + 1 - self._next_step) for request in self._running
        ) + sum(expected_output(request.steps + 1) for request in started)

    def _settle(self, fills: Sequence[Fill], *, joins_later: bool = False) -> None:
        """The parts are computed. joins_later: their requests take part in a step that is not
        launched yet."""
        for fill in fills:
            self._filling_tokens -= fill.tokens
            if fill.completes_prompt:
                request = fill.request
                new_blocks = request.blocks[request.read_blocks :]
                request.read_blocks = len(request.blocks)
                self._pool.publish(new_blocks)
                self._admission.published(new_blocks)
                now_s = self._clock.now_s
                holds = joins_later and may_hold(request.slo, request.due_s, now_s)
                if holds and request.steps:
                    self._first_tokens.hold(request)
                else:
                    self._take_first_token(request)

    def _take_first_token(self, request: SimRequest) -> None:
        """The first one since its prompt began to be filled."""
        self._take_token(request)
        self._load = None
        if request.pace.tokens == request.output_tokens:
            del self._filling[request]
            self._finish(request)

    def _take_token(self, request: SimRequest) -> None:
        pace = request.pace
        pace.token(self._clock.now_s)
        self._outbox.append((request, pace.tokens == request.output_tokens))

    def _send(self, held: Sequence[SimRequest]) -> None:
        """First tokens that have been kept back."""
        for request in held:
            self._take_first_token(request)

    def _join(self, request: SimRequest) -> None:
        del self._filling[request]
        request.next_step = self._next_step
        request.last_step = self._next_step + request.steps - 1
        self._leaving.setdefault(request.last_step, []).append(request)
        self._running = [*self._running, request]
        self._joined.append(request)
        self._context += request.prompt_tokens + 1
        tbt_s = request.slo.tbt_s
        self._tbt_of[tbt_s] = self._tbt_of.get(tbt_s, 0) + 1
        self._load = None

    def _stop_stepping(self, requests: Sequence[SimRequest]) -> None:
        """They take part in no step from the next one on."""
        self._running = [request for request in self._running if request not in requests]
        self._joined = [request for request in self._joined if request not in requests]
        for request in requests:
            self._context -= request.prompt_tokens + 1 + self._next_step - request.next_step
            tbt_s = request.slo.tbt_s
            self._tbt_of[tbt_s] -= 1
            if not self._tbt_of[tbt_s]:
                del self._tbt_of[tbt_s]
        self._load = None

    def _retract(self, request: SimRequest) -> None:
        """Memory has run short: it waits again, and what it has answered is filled anew."""
        self._send(self._first_tokens.release())
        self._stop_stepping([request])
        self._leaving[request.last_step].remove(request)
        self._release(request)
        self.retractions += 1
        request.prompt_tokens = request.input_tokens + request.pace.tokens
        self._admission.add(request)

    def _finish(self, request: SimRequest) -> None:
        self._release(request)
        self.unfinished -= 1

    def _release(self, request: SimRequest) -> None:
        self._pool.give_back(self._own_tokens(request))
        self._pool.let_go(request.blocks[: request.read_blocks])
        request.filled = request.read_blocks = 0
        request.last_step = -1
        self._admission.memory_freed()

    def _own_tokens(self, request: SimRequest) -> int:
        """Of its prompt, and of the decode steps launched for it."""
        steps = 0
        if request.last_step >= 0:
            steps = min(request.last_step + 1, self._next_step) - request.next_step
        return request.filled - self._pool.block_tokens * request.read_blocks + steps

    def _slice_of(self, job: SimPrefill, lane: Lane, first: int, last: int) -> TimedWork:
        limits, now_s = self._limits, self._clock.now_s
        begins_s = max(now_s, self._slices_launched_s) + limits.launch_s
        if first == 0:
            begins_s += limits.batch_launch_s
        self._slices_launched_s = begins_s
        if not job.indivisible:
            self._slices_launched_s += (last - first) * limits.layer_launch_s
        beside = self._stepping[-1].shape if self._stepping else None
        took_s = self._times.layers_s(job.shape, first, last, lane, beside)
        return TimedWork(max(took_s, self._slices_launched_s - begins_s), begins_s - now_s)

    def _step_s(self, job: SimStep, lane: Lane) -> float:
        self._launch(self._limits.launch_s)
        if job.fused is not None:
            if job.shape.requests + job.fused.tokens > self._limits.graph_tokens:
                self._host_s += self.num_layers * self._limits.layer_launch_s
            return self._times.fused_s(job.shape, job.fused)
        beside = self._prefilling[-1].shape if self._prefilling else None
        return self._times.step_s(job.shape, lane, beside)

    def _launch(self, host_s: float) -> None:
        """The host is busy with the launch, which begins when that is done."""
        if host_s:
            self._clock.advance_to(self._clock.now_s + host_s)
