"""PromptAdmission: who waits, and the row, cached prefix and slots with which a prompt is filled.

At most one prompt is half filled at a time: two of them could wait for each other's memory for
ever. In the queue's own order it goes first. In an order that is given, others may go in front of
it, but only whole, and only if the pool keeps room for the rest of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from drift_scheduler.backlog import Backlog
from sglang.srt.managers.batch_builder import row_of, sequence_of
from sglang.srt.managers.jobs import Fill
from sglang.srt.managers.prompt_backlog import PromptBacklog
from sglang.srt.mem_cache.sequence_cache import CachedSequence, SequenceCache
from sglang.srt.mem_cache.slot_table import RowPool
from sglang.srt.queue import WaitingQueue
from sglang.srt.requests import Request

# A request that may generate 100k tokens seldom does: this many count when room is estimated.
RESERVE_OUTPUT_TOKENS = 4096
# Share of the output still allowed that is expected to be used, before --schedule-conservativeness.
RESERVE_RATIO = 0.7
# So many times in a row prompts named behind one that does not fit may go in front of it.
MAX_TIMES_OVERTAKEN = 4
# So many prompts of an order that do not fit are looked at for a launch; each one costs a walk
# through the prefix tree.
MAX_PASSED_OVER = 8


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """Sizes that do not change while the server runs; counts are tokens unless named otherwise.

    prefill_tokens: new tokens of one prefill batch; a longer prompt is cut into chunks if
    `chunked`, else it runs alone, whole. prefill_max_requests: prompts of one launch.
    How many requests run at once is the number of rows.
    """

    context_length: int
    prefill_tokens: int
    chunked: bool
    prefill_max_requests: int | None = None
    max_queued: int | None = None
    conservativeness: float = 1.0
    schedule_policy: str = "fcfs"


@dataclass(frozen=True, slots=True)
class Ask:
    """What a launch has room for: new prompt tokens at most, and whose.

    cut: a prompt longer than what is left of the tokens is cut there; else it waits for a launch
    of its own. order: rids, the first ones first, others stay; None: the half-filled prompt, then
    the queue in its own order. beside: the launch overtakes a batch in flight, so that prompts
    are neither cut nor longer than the tokens, and the half-filled one stays where it is.
    """

    tokens: int
    cut: bool
    order: tuple[str, ...] | None = None
    beside: bool = False


@dataclass(slots=True)
class _Launch:
    """A launch on its way. tokens: left of it. promised: expected of those that will grow, None
    until somebody has to know."""

    ask: Ask
    growing: Iterable[Request]
    tokens: int
    fills: list[Fill] = field(default_factory=list)
    promised: int | None = None


class PromptAdmission:
    """Requests enter with `add`, start in `choose`, and give back what they hold in `release`."""

    def __init__(self, cache: SequenceCache, rows: RowPool, limits: EngineLimits) -> None:
        self._cache = cache
        self._rows = rows
        self._max_requests = limits.prefill_max_requests
        self._reserve_ratio = min(1.0, RESERVE_RATIO * limits.conservativeness)
        self._queue = WaitingQueue(limits.schedule_policy, self._cached_prefix)
        self._prompts = PromptBacklog(cache.radix)
        # The request of whose prompt only the beginning has been launched.
        self._partial: Request | None = None
        # What nothing fitted; until memory or the queue changes it is no use to look again.
        self._futile: Ask | None = None

    @property
    def backlog(self) -> Backlog:
        """The waiting prompts and the rest of the half-filled one."""
        return self._prompts.backlog

    @property
    def queued(self) -> int:
        """Requests that wait, whether or not they could start now."""
        return len(self._queue)

    @property
    def waiting(self) -> int:
        """Prompts that could start or go on."""
        return 0 if self._blocked else len(self._queue) + (self._partial is not None)

    @property
    def waiting_tokens(self) -> int:
        """Their tokens that no launch has taken yet, prefixes that may be cached counted too."""
        if self._blocked:
            return 0
        partial = self._partial
        left = 0 if partial is None else partial.num_tokens - sequence_of(partial).length
        return self._queue.tokens + left

    @property
    def _blocked(self) -> bool:
        """Nothing fits, whatever may be asked. Where an order was asked for, another may do."""
        futile = self._futile
        return futile is not None and futile.order is None and not futile.beside

    def add(self, request: Request, filling: Sequence[Request] = ()) -> None:
        """The request waits from now on. filling: prompts that batches in flight are computing."""
        self._queue.add(request)
        self._prompts.add(request)
        self._prompts.defer_arrival(request, self._with_partial(filling))
        self._futile = None

    def forget(self, request: Request) -> None:
        """The request has ended: it does not wait any more, nor is its prompt filled further."""
        if request.sequence is None:
            self._queue.remove(request)
            self._prompts.remove(request)
        elif request is self._partial:
            self._partial = None
            self._prompts.remove(request)
        else:
            return
        self._futile = None

    def filling_changed(self, filling: Sequence[Request]) -> None:
        """Batches in flight now compute these prompts: others may wait for them, or no longer."""
        self._prompts.defer_behind(self._with_partial(filling))

    def prompts_completed(self) -> None:
        """The prefix tree has grown, so that requests may need less than when nothing fitted."""
        self._prompts.refresh_cached()
        self._futile = None

    def choose(self, ask: Ask, growing: Iterable[Request]) -> list[Fill]:
        """Takes slots for prompts of a launch; `growing` requests keep the room that they are
        expected to need.

        In the queue's own order it stops at the first prompt that does not fit, so that a large
        one is not overtaken for ever by small ones. In a given order smaller ones may go in front
        of it, MAX_TIMES_OVERTAKEN times in a row, and of at most MAX_PASSED_OVER such prompts.
        """
        if self._blocked or ask == self._futile or not self.waiting:
            return []
        launch = _Launch(ask, growing, ask.tokens)
        if ask.order is None:
            self._take_by_queue(launch)
        else:
            self._take_by_order(launch, ask.order)
        self._futile = None if launch.fills else ask
        return launch.fills

    def release(self, request: Request) -> None:
        """Computed tokens go to the prefix tree, other slots to the pool; the row is free."""
        self._cache.close(sequence_of(request), request.tokens()[: request.computed])
        self._rows.free(row_of(request))
        request.sequence = request.row = None
        request.computed = request.table_valid = 0
        self._futile = None

    def check(self) -> None:
        """Asserts that the backlog is what the queue and the half-filled prompt say."""
        self._prompts.check(self._queue, self._partial)

    def _take_by_queue(self, launch: _Launch) -> None:
        partial = self._partial
        if partial is not None and not launch.ask.beside:
            self._go_on(partial, launch)
            if self._partial is not None:
                return
        for request in self._queue.in_order():
            if self._is_full(launch) or not self._start(request, launch):
                return

    def _take_by_order(self, launch: _Launch, order: Sequence[str]) -> None:
        passed_over: list[Request] = []
        overtaken: set[str] = set()
        blocked = False
        for key in order:
            if self._is_full(launch):
                return
            partial = self._partial
            if partial is not None and key == partial.rid:
                if not launch.ask.beside:
                    self._go_on(partial, launch)
                continue
            request = self._queue.get(key)
            if request is None or blocked:
                continue
            if not self._start(request, launch):
                passed_over.append(request)
                blocked = (
                    request.times_overtaken >= MAX_TIMES_OVERTAKEN
                    or len(passed_over) == MAX_PASSED_OVER
                )
                continue
            for other in passed_over:
                if other.rid not in overtaken:
                    overtaken.add(other.rid)
                    other.times_overtaken += 1

    def _is_full(self, launch: _Launch) -> bool:
        return launch.tokens <= 0 or len(launch.fills) == self._max_requests

    def _go_on(self, partial: Request, launch: _Launch) -> None:
        """The half-filled prompt, as far as tokens and memory allow."""
        left = partial.num_tokens - sequence_of(partial).length
        if left > launch.tokens and not launch.ask.cut and launch.fills:
            return
        self._fill(partial, launch)

    def _start(self, request: Request, launch: _Launch) -> bool:
        """A waiting prompt begins, whole or, if none is half filled, as far as tokens allow."""
        if not self._open(request, launch):
            return False
        request.times_overtaken = 0
        self._fill(request, launch)
        return True

    def _fill(self, request: Request, launch: _Launch) -> None:
        """Adds as much of the prompt as tokens and memory allow."""
        sequence = sequence_of(request)
        start, total = sequence.length, request.num_tokens
        end = min(total, start + launch.tokens) if launch.ask.cut else total
        fits = self._cache.extend(sequence, end - start) is not None
        if fits:
            fill = Fill(request, start, end, completes_prompt=end == total)
            if request.logprobs is not None:
                fill.scored = request.logprobs.launch(start, end)
            launch.fills.append(fill)
            launch.tokens -= end - start
        if fits and end == total:
            if launch.promised is not None:
                launch.promised += self._expected_output(request)
            self._prompts.remove(request)
            if request is self._partial:
                self._partial = None
            return
        assert self._partial in (None, request), "two prompts are half filled"
        assert not launch.ask.beside, "a prompt is cut in a batch that overtakes another"
        self._partial = request
        self._prompts.begin(request)

    def _open(self, request: Request, launch: _Launch) -> bool:
        """Gives a waiting request a row and its cached prefix, if all of it will fit.

        Where it could not become the half-filled prompt it must fit at once: in what is left of
        the launch, and in pages.
        """
        if self._rows.available == 0:
            return False
        sequence = self._cache.open(
            request.tokens(), request.namespace, reuse_limit=request.reuse_limit
        )
        new = request.num_tokens - sequence.length
        must_be_whole = launch.ask.beside or self._partial is not None
        runs_alone = not launch.fills and not must_be_whole
        may_be_longer = runs_alone or (launch.ask.cut and not must_be_whole)
        slots = self._whole_pages(sequence, new) if must_be_whole else new
        need = slots + self._expected_output(request)
        need += self._promised(launch) + self._kept_for_partial()
        if (new > launch.tokens and not may_be_longer) or need > self._cache.available_tokens:
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

    def _promised(self, launch: _Launch) -> int:
        """Room expected of running requests and of prompts that the launch completes."""
        if launch.promised is None:
            completed = [fill.request for fill in launch.fills if fill.completes_prompt]
            launch.promised = sum(map(self._expected_output, [*launch.growing, *completed]))
        return launch.promised

    def _kept_for_partial(self) -> int:
        """Slots without which the half-filled prompt might never go on."""
        partial = self._partial
        if partial is None:
            return 0
        sequence = sequence_of(partial)
        left = partial.num_tokens - sequence.length
        return self._whole_pages(sequence, left) + self._expected_output(partial)

    def _whole_pages(self, sequence: CachedSequence, count: int) -> int:
        """Slots of the pages that `count` more tokens open."""
        allocator = self._cache.allocator
        return allocator.pages_needed(sequence.length, count) * allocator.page_size

    def _expected_output(self, request: Request) -> int:
        """Of the tokens that no launch has taken slots for yet."""
        remaining = request.max_new_tokens - request.launched_output
        return int(min(remaining, RESERVE_OUTPUT_TOKENS) * self._reserve_ratio)

    def _cached_prefix(self, request: Request) -> int:
        return self._cache.radix.peek_length(
            request.tokens(), request.namespace, limit=request.reuse_limit
        )

    def _with_partial(self, filling: Sequence[Request]) -> list[Request]:
        partial = self._partial
        if partial is None or partial in filling:
            return [*filling]
        return [*filling, partial]
