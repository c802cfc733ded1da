"""Admission: who waits, and the row, cached prefix and slots with which a prompt is filled.

At most one prompt is half filled at a time, and it goes first: two of them could wait for each
other's memory for ever.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sglang.srt.managers.batch_builder import row_of, sequence_of
from sglang.srt.managers.jobs import Fill
from sglang.srt.mem_cache.sequence_cache import SequenceCache
from sglang.srt.mem_cache.slot_table import RowPool
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


class Admission:
    """Requests enter with `add`, start in `choose`, and give back what they hold in `release`."""

    def __init__(self, cache: SequenceCache, rows: RowPool, limits: EngineLimits) -> None:
        self._cache = cache
        self._rows = rows
        self._max_requests = limits.prefill_max_requests
        self._reserve_ratio = min(1.0, RESERVE_RATIO * limits.conservativeness)
        self._queue = WaitingQueue(limits.schedule_policy, self._cached_prefix)
        # The request of whose prompt only the beginning has been launched.
        self._partial: Request | None = None
        # Nothing fitted; until memory or the queue changes it is no use to look again.
        self._blocked = False

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

    def add(self, request: Request) -> None:
        """The request waits from now on."""
        self._queue.add(request)
        self._blocked = False

    def forget(self, request: Request) -> None:
        """The request has ended: it does not wait any more, nor is its prompt filled further."""
        if request.sequence is None:
            self._queue.remove(request)
            self._blocked = False
        elif request is self._partial:
            self._partial = None

    def reconsider(self) -> None:
        """Requests may need less memory than when nothing fitted."""
        self._blocked = False

    def choose(self, budget: int, running: Sequence[Request], *, cut: bool) -> list[Fill]:
        """Takes slots for up to `budget` new prompt tokens: the half-filled prompt, then the queue.

        cut: a prompt longer than what is left of the budget is cut there; else it waits for a
        launch of its own. `running` requests are left the room that they are expected to need.
        Stops at the first request that does not fit, so that a large one is not overtaken for
        ever by small ones.
        """
        if self._blocked:
            return []
        fills: list[Fill] = []
        if self._partial is not None:
            budget -= self._fill(self._partial, budget, cut, fills)
        if self._partial is None and budget > 0 and len(self._queue):
            growing = [*running, *(fill.request for fill in fills)]
            promised = sum(map(self._expected_output, growing))
            for request in self._queue.in_order():
                if budget <= 0 or len(fills) == self._max_requests:
                    break
                longest_new = None if cut or not fills else budget
                if not self._open(request, promised, longest_new):
                    break
                budget -= self._fill(request, budget, cut, fills)
                promised += self._expected_output(request)
        self._blocked = not fills
        return fills

    def release(self, request: Request) -> None:
        """Computed tokens go to the prefix tree, other slots to the pool; the row is free."""
        self._cache.close(sequence_of(request), request.tokens()[: request.computed])
        self._rows.free(row_of(request))
        request.sequence = request.row = None
        request.computed = request.table_valid = 0
        self._blocked = False

    def _fill(self, request: Request, budget: int, cut: bool, fills: list[Fill]) -> int:
        """Adds as much of the prompt as budget and memory allow; returns the number of tokens."""
        assert self._partial in (None, request), "two prompts are half filled"
        sequence = sequence_of(request)
        start, total = sequence.length, request.num_tokens
        end = min(total, start + budget) if cut else total
        self._partial = request
        if self._cache.extend(sequence, end - start) is None:
            return 0
        if end == total:
            self._partial = None
        fills.append(Fill(request, start, end, completes_prompt=end == total))
        return end - start

    def _open(self, request: Request, promised: int, longest_new: int | None) -> bool:
        """Gives a waiting request a row and its cached prefix, if all of it will fit.

        promised: tokens expected of running requests. longest_new: new tokens at most, if limited.
        """
        if self._rows.available == 0:
            return False
        sequence = self._cache.open(
            request.tokens(), request.namespace, reuse_limit=request.num_tokens - 1
        )
        new = request.num_tokens - sequence.length
        need = new + self._expected_output(request) + promised
        fits_launch = longest_new is None or new <= longest_new
        if not fits_launch or need > self._cache.available_tokens:
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
        """Of the tokens that no launch has taken slots for yet."""
        remaining = request.max_new_tokens - request.launched_output
        return int(min(remaining, RESERVE_OUTPUT_TOKENS) * self._reserve_ratio)

    def _cached_prefix(self, request: Request) -> int:
        return self._cache.radix.peek_length(request.tokens(), request.namespace)
