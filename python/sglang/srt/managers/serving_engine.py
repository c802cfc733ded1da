"""ServingEngine: requests, memory and tokens, behind the protocol that the gang drives.

It owns all shared state of the scheduler process, on one thread. Who holds what:

    compiling  nothing, until its grammar is compiled (constrained/grammar_queue.py)
    waiting    a queue entry, nothing on the device
    filling    row and sequence; its prompt is being computed, at once or chunk by chunk
    running    row and sequence, one more slot a step, until its last step is launched
    finished   row and sequence until the last job that could touch them is done

A prompt is filled by a prefill batch, which joins decode when the host has seen it finish, or by
fused steps: there the next step is launched before the host has seen the last one, so a request
is running as soon as the step that completes its prompt is launched. Two prefill batches can be
in flight at once, one of them parked until the other is done; they finish in any order.

What a grammar allows next depends on the tokens before. So a decode step with a request that has
one is launched when its last token is known, and not, as others are, while that is computed.

A sequence's slots are its own or the prefix tree's; SequenceCache keeps the account.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from drift_scheduler.backlog import Backlog
from drift_scheduler.dispatcher import Admission
from drift_scheduler.first_tokens import FirstTokens, may_hold
from drift_scheduler.gang import DecodeLoad
from sglang.srt.constrained.grammar import GrammarError
from sglang.srt.constrained.grammar_queue import GrammarQueue
from sglang.srt.managers.admission import Ask, EngineLimits, PromptAdmission
from sglang.srt.managers.batch_builder import BatchBuilder, sequence_of
from sglang.srt.managers.jobs import DecodeBatch, Fill, PrefillBatch
from sglang.srt.managers.outbox import Outbox
from sglang.srt.managers.running import RunningRequests
from sglang.srt.mem_cache.sequence_cache import SequenceCache
from sglang.srt.mem_cache.slot_allocator import SlotIds
from sglang.srt.mem_cache.slot_table import RowPool
from sglang.srt.messages import FinishReason, GenerateRequest
from sglang.srt.model_executor.model_runner import Run, Runner
from sglang.srt.requests import Request


class ServingEngine:
    """See the module. `random_seed` gives requests without a seed of their own one each.

    on_prefill sees the prompts of every launch that fills some, on_decode the members of every
    step that has some, both as the launch begins. on_finish sees every request as it ends, refused
    and aborted ones too; request.finish says how. clock is the one of GenerateRequest.arrival_s.
    """

    def __init__(
        self,
        runner: Runner,
        cache: SequenceCache,
        rows: RowPool,
        limits: EngineLimits,
        *,
        eos_token_ids: frozenset[int],
        outbox: Outbox,
        random_seed: int,
        grammars: GrammarQueue | None = None,
        on_prefill: Callable[[Sequence[Fill]], None] = lambda fills: None,
        on_decode: Callable[[Sequence[Request]], None] = lambda members: None,
        on_finish: Callable[[Request], None] = lambda request: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._runner = runner
        self._cache = cache
        self._rows = rows
        self._limits = limits
        self._eos_token_ids = eos_token_ids
        self._outbox = outbox
        self._seeds = np.random.default_rng(random_seed)
        self._on_prefill = on_prefill
        self._on_decode = on_decode
        self._on_finish = on_finish
        self._clock = clock

        self._batches = BatchBuilder(limits.context_length)
        self.grammars = (
            GrammarQueue(None, "this engine takes no grammars") if grammars is None else grammars
        )
        self._admission = PromptAdmission(cache, rows, limits)
        self._prefilling: list[PrefillBatch] = []
        self._first_tokens: FirstTokens[Request] = FirstTokens()
        self._fused: list[DecodeBatch] = []  # steps in flight in which prompts ride
        self._running = RunningRequests()
        # Finished requests that launched work can still touch.
        self._leaving: list[Request] = []
        self._by_rid: dict[str, Request] = {}
        self.retractions = 0

    @property
    def num_layers(self) -> int:
        return self._runner.num_layers

    @property
    def waiting(self) -> int:
        return self._admission.waiting

    @property
    def waiting_tokens(self) -> int:
        return self._admission.waiting_tokens

    @property
    def backlog(self) -> Backlog:
        return self._admission.backlog

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def queued(self) -> int:
        """Requests that wait, whether or not they could start now, or for their grammar."""
        return self._admission.queued + len(self.grammars)

    @property
    def num_running(self) -> int:
        """Requests in prefill or decode."""
        return len(self._by_rid) - self.queued

    @property
    def idle(self) -> bool:
        """No request is anywhere in the engine."""
        return not self._by_rid and not self._leaving

    @property
    def only_compiles(self) -> bool:
        """All requests wait for their grammars."""
        return len(self._by_rid) == len(self.grammars) and not self._leaving

    def decode_load(self) -> DecodeLoad:
        return self._running.load()

    def add(self, message: GenerateRequest) -> None:
        """Queues a request, or answers it at once with an abort that says why."""
        pool_tokens = self._cache.allocator.total
        room = min(self._limits.context_length, pool_tokens) - len(message.input_ids)
        wanted = message.sampling.max_new_tokens
        seed = message.sampling.sampling_seed
        request = Request(
            message,
            max_new_tokens=max(room, 0) if wanted is None else wanted,
            seed=int(self._seeds.integers(2**62)) if seed is None else seed,
            eos_token_ids=self._eos_token_ids,
        )
        max_queued = self._limits.max_queued
        if request.rid in self._by_rid:
            self._refuse(request, 400, f"rid {request.rid!r} is already in use")
        elif request.max_new_tokens > room:
            in_context = pool_tokens >= self._limits.context_length
            where = "context" if in_context else "KV pool"
            knobs = (
                "--context-length" if in_context else "--max-total-tokens or --mem-fraction-static"
            )
            self._refuse(
                request,
                400,
                f"{len(request.prompt)} prompt tokens and max_new_tokens={request.max_new_tokens} "
                f"exceed the {room + len(request.prompt)} tokens of the {where}: lower them, "
                f"or start the server with a larger {knobs}",
            )
        elif max_queued is not None and self.queued >= max_queued:
            self._refuse(request, 503, f"the queue is full (--max-queued-requests {max_queued})")
        else:
            self._by_rid[request.rid] = request
            if request.grammar is None:
                self._admission.add(request, self._filling())
            else:
                self.grammars.add(request)
                self.take_compiled()

    def take_compiled(self) -> None:
        """Requests whose grammar has been compiled wait for their prefill from now on."""
        for request, outcome in self.grammars.take():
            if isinstance(outcome, GrammarError):
                del self._by_rid[request.rid]
                self._refuse(request, outcome.status_code, str(outcome))
            else:
                request.constrain(outcome)
                self._admission.add(request, self._filling())

    def shed(self, keys: Sequence[str]) -> None:
        """Refuses prompts that wait; whoever has had a token is served to the end."""
        reason = FinishReason(
            type="abort",
            message="the server is overloaded: the first token could not come in time "
            "(--slo-overload shed)",
            status_code=503,
        )
        for key in keys:
            if key in self.backlog and not self._by_rid[key].output:
                self._end(self._by_rid[key], reason)

    def abort(self, rid_prefix: str, *, abort_all: bool = False) -> None:
        """Ends all requests whose id starts with the prefix; an empty prefix names none."""
        reason = FinishReason(type="abort", message="aborted by the client", status_code=499)
        for rid in list(self._by_rid):
            if abort_all or (rid_prefix and rid.startswith(rid_prefix)):
                self._end(self._by_rid[rid], reason)

    def stop_matched(self, rid: str) -> None:
        """The detokenizer has seen a stop string. It knows the match; the reason here is formal."""
        request = self._by_rid.get(rid)
        if request is not None:
            self._end(request, FinishReason(type="stop"))

    def reset_cache(self) -> None:
        """Forgets every cached prefix. Only while idle."""
        assert self.idle, f"cache reset with {len(self._by_rid)} requests in the engine"
        self._cache.radix.reset()

    def check(self) -> None:
        """Asserts that every slot and row is accounted for exactly once, and that of those who
        hold some at most one is neither running nor being computed: the half-filled prompt."""
        holders = [request for request in self._by_rid.values() if request.sequence is not None]
        between = [r.rid for r in holders if r.jobs_in_flight == 0 and r not in self._running]
        assert len(between) <= 1, f"{between} are half filled"
        waiting = self._admission.queued + len(self.grammars)
        assert len(self._by_rid) == len(holders) + waiting, (
            f"{len(self._by_rid)} requests, {len(holders)} hold slots and {waiting} wait"
        )
        holders += self._leaving
        self._cache.check()
        assert self._cache.num_open == len(holders), (
            f"{self._cache.num_open} open sequences, {len(holders)} requests hold one"
        )
        self._rows.check(in_use=len(holders))
        self._running.check()
        self._admission.check()

    def begin_prefill(self, admission: Admission) -> PrefillBatch | None:
        limits = self._limits
        assert len(self._prefilling) == int(admission.preempts), (
            f"{len(self._prefilling)} prefill batches in flight, preempts={admission.preempts}"
        )
        ask = Ask(
            tokens=min(admission.tokens or limits.prefill_tokens, limits.prefill_tokens),
            cut=limits.chunked and not admission.preempts,
            order=admission.order,
            beside=admission.preempts,
        )
        fills = self._admission.choose(ask, [*self._running.members, *self._completing()])
        if not fills:
            return None
        batch = PrefillBatch(fills, self._start((), fills))
        self._prefilling.append(batch)
        self._admission.filling_changed(self._filling())
        self._on_prefill(fills)
        return batch

    def finish_prefill(self, job: PrefillBatch) -> None:
        self._prefilling.remove(job)
        if job.cancelled:
            self._drop_fills(job.fills)
        else:
            self._take_scores((), job.fills, job.run)
            self._settle_fills(job.fills, iter(job.run.tokens()), joins_later=True)
            self._running.join(fill.request for fill in job.fills if _wants_step(fill))
        self._admission.prompts_completed()
        self._admission.filling_changed(self._filling())

    def begin_decode(
        self,
        steps_in_flight: int,
        fused_tokens: int,
        fused_order: Sequence[str] | None = None,
    ) -> DecodeBatch | None:
        assert not (fused_tokens and self._prefilling), "a fused step beside a prefill batch"
        if self._running.awaits_tokens:
            return None
        new_slots = self._extend_running(steps_in_flight)
        if new_slots is None:
            return None
        members = self._running.members
        fills: list[Fill] = []
        if fused_tokens:
            order = None if fused_order is None else tuple(fused_order)
            fills = self._admission.choose(Ask(fused_tokens, cut=True, order=order), members)
        if not members and not fills:
            return None
        run = self._start(members, fills, new_slots)
        self._send(self._first_tokens.step_launched())
        shape = self._running.launched()
        batch = DecodeBatch(members, shape, fills, run, self.num_layers)
        if fills:
            self._running.join(fill.request for fill in fills if _wants_step(fill))
            self._fused.append(batch)
            self._admission.filling_changed(self._filling())
            self._on_prefill(fills)
        if members:
            self._on_decode(members)
        return batch

    def finish_decode(self, job: DecodeBatch) -> None:
        tokens = iter(job.run.tokens())
        self._take_scores(job.members, job.fills, job.run)
        self._send(self._first_tokens.step_settled())
        now_s = self._clock()
        for request in job.members:
            token = next(tokens)
            request.jobs_in_flight -= 1
            request.computed += 1
            if request.finish is None:
                self._take_token(request, token, now_s)
            elif request.jobs_in_flight == 0:
                self._release(request)
        if job.fills:
            self._fused.remove(job)
            self._settle_fills(job.fills, tokens)
            self._admission.prompts_completed()
            self._admission.filling_changed(self._filling())

    def _refuse(self, request: Request, status_code: int, message: str) -> None:
        request.finish = FinishReason(type="abort", message=message, status_code=status_code)
        self._outbox.note(request)
        self._on_finish(request)

    def _completing(self) -> list[Request]:
        """Who will run once the prefill batches in flight are done."""
        fills = [fill for batch in self._prefilling for fill in batch.fills]
        return [fill.request for fill in fills if _wants_step(fill)]

    def _filling(self) -> list[Request]:
        """Whose prompts the launches in flight compute."""
        jobs: list[PrefillBatch | DecodeBatch] = [*self._prefilling, *self._fused]
        return list(dict.fromkeys(fill.request for job in jobs for fill in job.fills))

    def _extend_running(self, steps_in_flight: int) -> SlotIds | None:
        """A slot more for every running request; those that came last make room for the others.

        None if only the tokens of the steps in flight can tell who leaves of itself.
        """
        while True:
            members = self._running.members
            new_slots = self._cache.extend_each([sequence_of(request) for request in members])
            if new_slots is not None:
                return new_slots
            if steps_in_flight:
                return None
            self._retract(members[-1])

    def _start(
        self, members: Sequence[Request], fills: Sequence[Fill], new_slots: SlotIds | None = None
    ) -> Run:
        """new_slots: of the members' new tokens."""
        for request in members:
            request.launched_output += 1
            request.jobs_in_flight += 1
        for fill in fills:
            fill.request.launched_output += fill.samples
            fill.request.jobs_in_flight += 1
        return self._runner.start(self._batches.step(members, fills, new_slots))

    def _take_scores(self, members: Sequence[Request], fills: Sequence[Fill], run: Run) -> None:
        """Log-probabilities of the run's tokens, in front of the tokens themselves."""
        samples, prompts = run.scores()
        if samples:
            sampling = [*members, *[fill.request for fill in fills if fill.samples]]
            for place, scores in samples.items():
                request = sampling[place]
                if request.finish is None and request.logprobs is not None:
                    request.logprobs.take_output(scores)
        for fill, scores in zip([fill for fill in fills if fill.scored], prompts, strict=True):
            if fill.request.logprobs is not None:
                fill.request.logprobs.take_prompt(scores)

    def _settle_fills(
        self, fills: Sequence[Fill], tokens: Iterator[int], *, joins_later: bool = False
    ) -> None:
        """The parts are computed; `tokens` are those of the parts that sample. joins_later: their
        requests take part in a step that is not launched yet."""
        now_s = self._clock()
        for fill in fills:
            request = fill.request
            token = next(tokens) if fill.samples else None
            request.jobs_in_flight -= 1
            request.computed = fill.end
            if request.finish is not None:
                if request.jobs_in_flight == 0:
                    self._release(request)
            elif fill.completes_prompt:
                self._publish(request)
                if token is None:
                    self._end(request, FinishReason(type="length", length=0))
                else:
                    holds = joins_later and may_hold(request.slo, request.due_s, now_s)
                    self._take_token(request, token, now_s, hold=holds)

    def _drop_fills(self, fills: Sequence[Fill]) -> None:
        """The parts are not computed, for all their requests have finished."""
        for fill in fills:
            fill.request.jobs_in_flight -= 1
            if fill.request.jobs_in_flight == 0:
                self._release(fill.request)

    def _take_token(
        self, request: Request, token: int, now_s: float, *, hold: bool = False
    ) -> None:
        """hold: it is sent when the request's first step starts."""
        request.append(token)
        if hold and request.finish is None:
            self._first_tokens.hold(request)
            return
        request.pace.token(now_s)
        self._outbox.note(request)
        if request.finish is not None:
            self._leave(request)

    def _send(self, held: Sequence[Request]) -> None:
        """First tokens that have been kept back."""
        now_s = self._clock()
        for request in held:
            if request.finish is None:
                request.pace.token(now_s)
                self._outbox.note(request)

    def _end(self, request: Request, reason: FinishReason) -> None:
        request.finish = reason
        self._outbox.note(request)
        self._leave(request)

    def _leave(self, request: Request) -> None:
        """A finished request gives up its place at once, its memory when no job can touch it."""
        del self._by_rid[request.rid]
        if not self.grammars.forget(request):
            self._admission.forget(request)
        self._admission.filling_changed(self._filling())
        self._on_finish(request)
        if request.sequence is None:
            self._forget_penalties(request)
            return
        if request in self._running:
            self._running.remove(request)
        self._leaving.append(request)
        if request.jobs_in_flight == 0:
            self._release(request)
        else:
            # The client has its answer, and its next turn can arrive before that job is done.
            self._publish(request)

    def _publish(self, request: Request) -> None:
        """Shares what is computed.

        Launched work may still read the slots. Then what the tree holds beyond our shared part
        must stay as it is: adopting the tree's slots would free ours under that work.
        """
        sequence = sequence_of(request)
        computed = request.tokens()[: request.computed]
        if request.jobs_in_flight:
            held = self._cache.radix.peek_length(computed, request.namespace)
            if held > sequence.shared_len:
                return
        rebound = self._cache.publish(sequence, computed)
        if rebound:
            request.table_valid = min(request.table_valid, rebound.start)

    def _release(self, request: Request) -> None:
        assert request.jobs_in_flight == 0, f"{request.rid}: {request.jobs_in_flight} jobs left"
        self._leaving.remove(request)
        self._admission.release(request)
        self._forget_penalties(request)

    def _forget_penalties(self, request: Request) -> None:
        if request.sampling.penalises:
            self._runner.forget(request.wish)

    def _retract(self, request: Request) -> None:
        assert request.jobs_in_flight == 0, f"{request.rid}: retracted under a job"
        self._send(self._first_tokens.release())
        self._running.remove(request)
        self._admission.release(request)
        request.launched_output = len(request.output)
        request.retractions += 1
        self.retractions += 1
        self._admission.add(request, self._filling())


def _wants_step(fill: Fill) -> bool:
    return fill.completes_prompt and fill.request.wants_step
