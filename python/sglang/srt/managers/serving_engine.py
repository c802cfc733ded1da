"""ServingEngine: requests, memory and tokens, behind the protocol that the gang drives.

It owns all shared state of the scheduler process, on one thread. Who holds what:

    waiting    a queue entry, nothing on the device
    filling    row and sequence; its prompt is being computed, at once or chunk by chunk
    running    row and sequence, one more slot a step, until its last step is launched
    finished   row and sequence until the last job that could touch them is done

A prompt is filled by a prefill batch, which joins decode when the host has seen it finish, or by
fused steps: there the next step is launched before the host has seen the last one, so a request
is running as soon as the step that completes its prompt is launched.

A sequence's slots are its own or the prefix tree's; SequenceCache keeps the account.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from sglang.srt.managers.admission import Admission, EngineLimits
from sglang.srt.managers.batch_builder import BatchBuilder, sequence_of
from sglang.srt.managers.jobs import DecodeBatch, Fill, PrefillBatch
from sglang.srt.managers.outbox import Outbox
from sglang.srt.mem_cache.sequence_cache import SequenceCache
from sglang.srt.mem_cache.slot_allocator import SlotIds
from sglang.srt.mem_cache.slot_table import RowPool
from sglang.srt.messages import FinishReason, GenerateRequest
from sglang.srt.model_executor.model_runner import Run, Runner
from sglang.srt.requests import Request


class ServingEngine:
    """See the module. `random_seed` gives requests without a seed of their own one each.

    on_prefill sees the prompts of every launch that fills some, on_decode the members of every
    step that has some, both as the launch begins.
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
        on_prefill: Callable[[Sequence[Fill]], None] = lambda fills: None,
        on_decode: Callable[[Sequence[Request]], None] = lambda members: None,
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

        self._batches = BatchBuilder(limits.context_length)
        self._admission = Admission(cache, rows, limits)
        self._prefilling: PrefillBatch | None = None
        # Requests that want another step; a new list each step, since batches keep the old ones.
        self._running: list[Request] = []
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
    def running(self) -> int:
        return len(self._running)

    @property
    def queued(self) -> int:
        """Requests that wait, whether or not they could start now."""
        return self._admission.queued

    @property
    def num_running(self) -> int:
        """Requests in prefill or decode."""
        return len(self._by_rid) - self.queued

    @property
    def idle(self) -> bool:
        """No request is anywhere in the engine."""
        return not self._by_rid and not self._leaving

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
            self._admission.add(request)

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
        """Asserts that every slot and row is accounted for exactly once."""
        holders = [request for request in self._by_rid.values() if request.sequence is not None]
        holders += self._leaving
        self._cache.check()
        assert self._cache.num_open == len(holders), (
            f"{self._cache.num_open} open sequences, {len(holders)} requests hold one"
        )
        self._rows.check(in_use=len(holders))

    def begin_prefill(self) -> PrefillBatch | None:
        assert self._prefilling is None, "one prefill batch at a time"
        limits = self._limits
        fills = self._admission.choose(limits.prefill_tokens, self._running, cut=limits.chunked)
        if not fills:
            return None
        self._prefilling = PrefillBatch(fills, self._start((), fills))
        self._on_prefill(fills)
        return self._prefilling

    def finish_prefill(self, job: PrefillBatch) -> None:
        assert job is self._prefilling, "the job is not the batch in flight"
        self._prefilling = None
        if job.cancelled:
            self._drop_fills(job.fills)
        else:
            self._settle_fills(job.fills, iter(job.run.tokens()))
            self._running += [fill.request for fill in job.fills if _wants_step(fill)]

    def begin_decode(self, steps_in_flight: int, fused_tokens: int) -> DecodeBatch | None:
        assert not (fused_tokens and self._prefilling), "a fused step beside a prefill batch"
        new_slots = self._extend_running(steps_in_flight)
        if new_slots is None:
            return None
        members = self._running
        fills = self._admission.choose(fused_tokens, members, cut=True) if fused_tokens else []
        if not members and not fills:
            return None
        batch = DecodeBatch(members, fills, self._start(members, fills, new_slots), self.num_layers)
        self._running = [
            request
            for request in members
            if request.launched_output < request.max_new_tokens and request.finish is None
        ]
        if fills:
            self._running += [fill.request for fill in fills if _wants_step(fill)]
            self._on_prefill(fills)
        if members:
            self._on_decode(members)
        return batch

    def finish_decode(self, job: DecodeBatch) -> None:
        tokens = iter(job.run.tokens())
        for request in job.members:
            token = next(tokens)
            request.jobs_in_flight -= 1
            request.computed += 1
            if request.finish is None:
                self._take_token(request, token)
            elif request.jobs_in_flight == 0:
                self._release(request)
        if job.fills:
            self._settle_fills(job.fills, tokens)
            self._admission.reconsider()  # what is shared now may be what others lacked room for

    def _refuse(self, request: Request, status_code: int, message: str) -> None:
        request.finish = FinishReason(type="abort", message=message, status_code=status_code)
        self._outbox.note(request)

    def _extend_running(self, steps_in_flight: int) -> SlotIds | None:
        """A slot more for every running request; those that came last make room for the others.

        None if only the tokens of the steps in flight can tell who leaves of itself.
        """
        while True:
            new_slots = self._cache.extend_each([sequence_of(r) for r in self._running])
            if new_slots is not None:
                return new_slots
            if steps_in_flight:
                return None
            self._retract(self._running.pop())

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

    def _settle_fills(self, fills: Sequence[Fill], tokens: Iterator[int]) -> None:
        """The parts are computed; `tokens` are those of the parts that sample."""
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
                    self._take_token(request, token)

    def _drop_fills(self, fills: Sequence[Fill]) -> None:
        """The parts are not computed, for all their requests have finished."""
        for fill in fills:
            fill.request.jobs_in_flight -= 1
            if fill.request.jobs_in_flight == 0:
                self._release(fill.request)

    def _take_token(self, request: Request, token: int) -> None:
        request.append(token)
        self._outbox.note(request)
        if request.finish is not None:
            self._leave(request)

    def _end(self, request: Request, reason: FinishReason) -> None:
        request.finish = reason
        self._outbox.note(request)
        self._leave(request)

    def _leave(self, request: Request) -> None:
        """A finished request gives up its place at once, its memory when no job can touch it."""
        del self._by_rid[request.rid]
        self._admission.forget(request)
        if request.sequence is None:
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

    def _retract(self, request: Request) -> None:
        assert request.jobs_in_flight == 0, f"{request.rid}: retracted under a job"
        self._admission.release(request)
        request.launched_output = len(request.output)
        request.retractions += 1
        self.retractions += 1
        self._admission.add(request)


def _wants_step(fill: Fill) -> bool:
    return fill.completes_prompt and fill.request.wants_step
