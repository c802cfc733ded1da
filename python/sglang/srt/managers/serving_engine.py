"""ServingEngine: requests, memory and tokens, behind the protocol that the gang drives.

It owns all shared state of the scheduler process, on one thread. Who holds what:

    waiting    a queue entry, nothing on the device
    partial    at most one request whose prompt is being filled chunk by chunk: row and sequence
    running    row and sequence, one more slot a step
    finished   row and sequence until the last job that could touch them is done

A sequence's slots are its own or the prefix tree's; SequenceCache keeps the account.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from sglang.srt.managers.batch_builder import BatchBuilder, row_of, sequence_of
from sglang.srt.managers.jobs import DecodeBatch, Fill, PrefillBatch
from sglang.srt.managers.outbox import Outbox
from sglang.srt.mem_cache.sequence_cache import SequenceCache
from sglang.srt.mem_cache.slot_table import RowPool
from sglang.srt.messages import FinishReason, GenerateRequest
from sglang.srt.model_executor.model_runner import Runner
from sglang.srt.queue import WaitingQueue
from sglang.srt.requests import Request

# A request that may generate 100k tokens seldom does: this many count when room is estimated.
RESERVE_OUTPUT_TOKENS = 4096
# Share of the output still allowed that is expected to be used, before --schedule-conservativeness.
RESERVE_RATIO = 0.7


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """Sizes that do not change while the server runs; counts are tokens unless named otherwise.

    prefill_tokens: new tokens of one prefill batch; a longer prompt is cut into chunks if
    `chunked`, else it runs alone, whole. How many requests run at once is the number of rows.
    """

    context_length: int
    prefill_tokens: int
    chunked: bool
    prefill_max_requests: int | None = None
    max_queued: int | None = None
    conservativeness: float = 1.0
    schedule_policy: str = "fcfs"


class ServingEngine:
    """See the module. `random_seed` gives requests without a seed of their own one each."""

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
        on_prefill: Callable[[PrefillBatch], None] = lambda batch: None,
        on_decode: Callable[[DecodeBatch], None] = lambda batch: None,
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
        self._queue = WaitingQueue(limits.schedule_policy, self._peek)
        self._partial: Request | None = None
        self._prefilling: PrefillBatch | None = None
        self._running: list[Request] = []
        # Finished requests that launched work can still touch.
        self._leaving: list[Request] = []
        self._by_rid: dict[str, Request] = {}
        # Set when a prefill batch could not be formed; cleared when memory or the queue changes.
        self._admission_blocked = False
        self.retractions = 0

    @property
    def num_layers(self) -> int:
        return self._runner.num_layers

    @property
    def waiting(self) -> int:
        if self._admission_blocked:
            return 0
        return len(self._queue) + (self._partial is not None)

    @property
    def running(self) -> int:
        return sum(request.wants_step for request in self._running)

    @property
    def queued(self) -> int:
        """Requests that wait, whether or not they could start now."""
        return len(self._queue)

    @property
    def num_running(self) -> int:
        """Requests in prefill or decode."""
        return len(self._by_rid) - len(self._queue)

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
        elif max_queued is not None and len(self._queue) >= max_queued:
            self._refuse(request, 503, f"the queue is full (--max-queued-requests {max_queued})")
        else:
            self._by_rid[request.rid] = request
            self._queue.add(request)
            self._admission_blocked = False

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
        fills = self._choose_fills()
        if not fills:
            self._admission_blocked = True
            return None
        for fill in fills:
            fill.request.jobs_in_flight += 1
        batch = PrefillBatch(fills, self._runner.start(self._batches.prefill(fills)))
        self._prefilling = batch
        self._on_prefill(batch)
        return batch

    def finish_prefill(self, job: PrefillBatch) -> None:
        assert job is self._prefilling, "the job is not the batch in flight"
        self._prefilling = None
        cancelled = job.cancelled
        tokens = iter([] if cancelled else job.run.tokens())
        for fill in job.fills:
            request = fill.request
            request.jobs_in_flight -= 1
            if not cancelled:
                request.computed = fill.end
            token = next(tokens) if fill.samples and not cancelled else None
            if request.finish is not None:
                self._release(request)
            elif not fill.completes_prompt:
                self._partial = request
            else:
                self._join_decode(request, token)
        self._admission_blocked = False

    def begin_decode(self, steps_in_flight: int) -> DecodeBatch | None:
        members = [request for request in self._running if request.wants_step]
        while members and self._cache.extend_each([sequence_of(r) for r in members]) is None:
            if steps_in_flight:
                return None  # the tokens of those steps are needed before anyone can leave
            self._retract(members.pop())
        if not members:
            return None
        for request in members:
            request.launched_output += 1
            request.jobs_in_flight += 1
        run = self._runner.start(self._batches.decode(members))
        batch = DecodeBatch(members, run, self.num_layers)
        self._on_decode(batch)
        return batch

    def finish_decode(self, job: DecodeBatch) -> None:
        for request, token in zip(job.members, job.run.tokens(), strict=True):
            request.jobs_in_flight -= 1
            request.computed += 1
            if request.finish is None:
                self._take_token(request, token)
            elif request.jobs_in_flight == 0:
                self._release(request)

    def _peek(self, request: Request) -> int:
        return self._cache.radix.peek_length(request.tokens(), request.namespace)

    def _refuse(self, request: Request, status_code: int, message: str) -> None:
        request.finish = FinishReason(type="abort", message=message, status_code=status_code)
        self._outbox.note(request)

    def _choose_fills(self) -> list[Fill]:
        """The next prefill batch: the prompt that is half way first, then the queue in order.

        Stops at the first request that does not fit, so that a large one is not overtaken for
        ever by small ones.
        """
        limits = self._limits
        fills: list[Fill] = []
        budget = limits.prefill_tokens
        candidates = [self._partial] if self._partial else []
        for request in candidates + self._queue.in_order():
            if budget <= 0 or len(fills) == limits.prefill_max_requests:
                break
            if request.sequence is None and not self._open(request, budget, fills):
                break
            fill = self._fill(request, budget)
            if fill is None or not fill.completes_prompt:
                self._partial = request if fill is None else None
                fills += [fill] if fill else []
                break
            self._partial = None
            fills.append(fill)
            budget -= fill.end - fill.start
        return fills

    def _fill(self, request: Request, budget: int) -> Fill | None:
        """Slots for as much of the prompt as the budget and the memory allow; None for nothing."""
        sequence = sequence_of(request)
        start, total = sequence.length, request.num_tokens
        count = total - start
        if self._limits.chunked and count > budget:
            count = budget - (start + budget) % self._cache.allocator.page_size
        if count <= 0 or self._cache.extend(sequence, count) is None:
            return None
        return Fill(request, start, start + count, completes_prompt=start + count == total)

    def _open(self, request: Request, budget: int, fills: Sequence[Fill]) -> bool:
        """Gives a waiting request a row and its cached prefix, if all of it will fit."""
        if self._rows.available == 0:
            return False
        sequence = self._cache.open(
            request.tokens(), request.namespace, reuse_limit=request.num_tokens - 1
        )
        new = request.num_tokens - sequence.length
        fits_batch = self._limits.chunked or new <= budget or not fills
        others = self._running + [fill.request for fill in fills]
        promised = sum(self._expected_output(other) for other in others)
        need = new + self._expected_output(request) + promised
        if not fits_batch or need > self._cache.available_tokens:
            self._cache.discard(sequence)
            return False
        self._queue.remove(request)
        request.sequence = sequence
        request.row = self._rows.alloc()
        request.computed = sequence.length
        if not request.first_prefill_started:
            request.first_prefill_started = True
            request.cached_tokens = sequence.length
        return True

    def _expected_output(self, request: Request) -> int:
        ratio = min(1.0, RESERVE_RATIO * self._limits.conservativeness)
        remaining = request.max_new_tokens - len(request.output)
        return int(min(remaining, RESERVE_OUTPUT_TOKENS) * ratio)

    def _join_decode(self, request: Request, token: int | None) -> None:
        """The prompt is filled: others may share it from now on, and decode goes on with it."""
        rebound = self._cache.publish(sequence_of(request), request.tokens())
        if rebound:
            request.table_valid = min(request.table_valid, rebound.start)
        self._running.append(request)
        if token is None:
            self._end(request, FinishReason(type="length", length=0))
        else:
            self._take_token(request, token)

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
        if request.sequence is None:
            self._queue.remove(request)
            self._admission_blocked = False
            return
        if request is self._partial:
            self._partial = None
        if request in self._running:
            self._running.remove(request)
        self._leaving.append(request)
        if request.jobs_in_flight == 0:
            self._release(request)
        else:
            self._publish_early(request)

    def _publish_early(self, request: Request) -> None:
        """Shares what is computed although a launched step may still read the slots.

        The client has its answer, and its next turn can arrive before that step is done. What the
        tree holds beyond our shared part must stay as it is till then: adopting the tree's slots
        would free ours under the step.
        """
        sequence = sequence_of(request)
        computed = request.tokens()[: request.computed]
        held = self._cache.radix.peek_length(computed, request.namespace)
        if held <= sequence.shared_len:
            self._cache.publish(sequence, computed)

    def _release(self, request: Request) -> None:
        assert request.jobs_in_flight == 0, f"{request.rid}: {request.jobs_in_flight} jobs left"
        self._leaving.remove(request)
        self._give_back(request)
        self._admission_blocked = False

    def _give_back(self, request: Request) -> None:
        """Computed tokens go to the prefix tree, other slots to the pool; the row is free."""
        self._cache.close(sequence_of(request), request.tokens()[: request.computed])
        self._rows.free(row_of(request))
        request.sequence = request.row = None
        request.computed = request.table_valid = 0

    def _retract(self, request: Request) -> None:
        assert request.jobs_in_flight == 0, f"{request.rid}: retracted under a job"
        self._running.remove(request)
        self._give_back(request)
        request.launched_output = len(request.output)
        request.retractions += 1
        self.retractions += 1
        self._queue.add(request)
        self._admission_blocked = False
