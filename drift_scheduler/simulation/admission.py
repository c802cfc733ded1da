"""SimAdmission: which waiting prompts a launch takes up, and the memory they are filled into.

The rules are the serving engine's. At most one prompt is half filled at a time, for two could wait
for each other's memory for ever. Without a given order it goes first, and then the queue up to
the first prompt that does not fit, so that a large one is not overtaken for ever. In a given
order others may go in front of the half-filled one, but only whole, and smaller ones in front of
one that does not fit, but only some times in a row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from drift_scheduler.backlog import Backlog
from drift_scheduler.simulation.kv_pool import KvPool
from drift_scheduler.simulation.request import Fill, SimRequest
from drift_scheduler.simulation.waiting import Waiting

# As in the serving engine: the share of the answer still to come that is kept free, how much of a
# very long one counts, and how often in a row smaller prompts go in front of a larger one.
RESERVE_RATIO = 0.7
RESERVE_OUTPUT_TOKENS = 4096
MAX_TIMES_OVERTAKEN = 4

# Prompts of one launch at most, where the order is left to the queue.
_LOOK_AHEAD = 256


@dataclass(frozen=True, slots=True)
class Ask:
    """What a launch has room for: new prompt tokens at most, and whose; see dispatcher.Admission.

    beside: the launch overtakes a batch in flight, so no prompt is cut.
    """

    tokens: int
    order: tuple[str, ...] | None = None
    beside: bool = False


@dataclass(slots=True)
class _Launch:
    """tokens: left of it. promised: room expected of those that grow, None until asked."""

    ask: Ask
    tokens: int
    fills: list[Fill] = field(default_factory=list)
    promised: int | None = None


def expected_output(tokens_to_come: int) -> int:
    """Of an answer: the part that room is kept for."""
    return int(min(tokens_to_come, RESERVE_OUTPUT_TOKENS) * RESERVE_RATIO)


class SimAdmission:
    """Requests enter with `add` and leave with `shed`, or in the fills of `choose`.

    rows: requests that hold memory at once. expected_growth: room that running requests and
    prompts in flight are expected to need.
    """

    def __init__(self, pool: KvPool, rows: int, expected_growth: Callable[[], int]) -> None:
        self._pool = pool
        self._rows = rows
        self._expected_growth = expected_growth
        self._waiting = Waiting(pool)
        self.backlog: Backlog = self._waiting.backlog
        self._partial: SimRequest | None = None
        # What nothing fitted; until memory or the queue changes it is no use to look again.
        self._futile: Ask | None = None

    @property
    def queued(self) -> int:
        """Requests that wait and hold nothing."""
        return len(self._waiting)

    @property
    def partial(self) -> SimRequest | None:
        """The request of whose prompt only the beginning has been launched."""
        return self._partial

    @property
    def blocked(self) -> bool:
        """Nothing fits, whatever may be asked. Where an order was asked for, another may do."""
        futile = self._futile
        return futile is not None and futile.order is None and not futile.beside

    def add(self, request: SimRequest) -> None:
        self._waiting.add(request)
        self._futile = None

    def shed(self, key: str) -> SimRequest | None:
        """Takes out a prompt that holds nothing and has not had a token; None if it is not so."""
        request = self._waiting.get(key)
        if request is None or request.pace.tokens:
            return None
        self._waiting.remove(request)
        self._futile = None
        return request

    def memory_freed(self) -> None:
        self._rows += 1
        self._futile = None

    def published(self, blocks: Iterable[int]) -> None:
        """What a prompt lacked when it was taken up is cached now."""
        self._waiting.come(blocks)
        self._futile = None

    def choose(self, ask: Ask) -> list[Fill]:
        """Takes memory for the prompts of a launch."""
        if self.blocked or ask == self._futile or not self.backlog:
            return []
        launch = _Launch(ask, ask.tokens)
        if ask.order is None:
            self._take_by_queue(launch)
        else:
            self._take_by_order(launch, ask.order)
        self._futile = None if launch.fills else ask
        return launch.fills

    def _take_by_queue(self, launch: _Launch) -> None:
        if self._partial is not None and not launch.ask.beside:
            self._fill(self._partial, launch)
            if self._partial is not None:
                return
        for prompt in self.backlog.oldest(_LOOK_AHEAD):
            request = self._waiting.get(prompt.key)
            if request is None:
                continue
            if launch.tokens <= 0 or not self._start(request, launch):
                return

    def _take_by_order(self, launch: _Launch, order: Sequence[str]) -> None:
        passed_over: dict[SimRequest, None] = {}
        blocked = False
        for key in order:
            if launch.tokens <= 0:
                return
            if self._partial is not None and key == self._partial.key:
                if not launch.ask.beside:
                    self._fill(self._partial, launch)
                continue
            request = self._waiting.get(key)
            if request is None or blocked:
                continue
            if self._start(request, launch):
                for other in passed_over:
                    other.times_overtaken += 1
                passed_over.clear()
            else:
                passed_over[request] = None
                blocked = request.times_overtaken >= MAX_TIMES_OVERTAKEN

    def _start(self, request: SimRequest, launch: _Launch) -> bool:
        """A waiting prompt begins, whole or, if none is half filled, as far as tokens allow."""
        found = self._waiting.look_up(request)
        if not self._open(request, found, launch):
            return False
        request.times_overtaken = 0
        self._fill(request, launch)
        return True

    def _open(self, request: SimRequest, found: int, launch: _Launch) -> bool:
        """Takes a place and the cached prefix for it, if all of it will fit."""
        blocks, cached = request.blocks[:found], found * self._pool.block_tokens
        new = request.prompt_tokens - cached
        must_be_whole = launch.ask.beside or self._partial is not None
        if self._rows == 0 or (must_be_whole and new > launch.tokens):
            return False
        need = new + expected_output(request.steps + 1)
        need += self._promised(launch) + self._kept_for_partial()
        if need > self._pool.available_beside(blocks):
            return False
        self._rows -= 1
        self._waiting.remove(request)
        self._pool.read(blocks)
        request.filled, request.read_blocks = cached, found
        if request.cached_tokens is None:
            request.cached_tokens = cached
        self._waiting.coming(request.blocks[found:])
        return True

    def _fill(self, request: SimRequest, launch: _Launch) -> None:
        """Adds as much of the prompt as tokens and memory allow."""
        start, total = request.filled, request.prompt_tokens
        end = min(total, start + launch.tokens)
        if not self._pool.take(end - start):
            assert request is self._partial, "what was opened fits"
            return
        launch.fills.append(Fill(request, start, end, completes_prompt=end == total))
        launch.tokens -= end - start
        request.filled = end
        if end < total:
            self._partial = request
            self._waiting.begin(request)
            return
        if request is self._partial:
            self._partial = None
            self._waiting.complete(request)
        if launch.promised is not None:
            launch.promised += expected_output(request.steps + 1)

    def _promised(self, launch: _Launch) -> int:
        if launch.promised is None:
            completed = [fill.request for fill in launch.fills if fill.completes_prompt]
            launch.promised = self._expected_growth()
            launch.promised += sum(expected_output(request.steps + 1) for request in completed)
        return launch.promised

    def _kept_for_partial(self) -> int:
        """Without which the half-filled prompt might never go on."""
        partial = self._partial
        if partial is None:
            return 0
        return partial.prompt_tokens - partial.filled + expected_output(partial.steps + 1)
