"""GrammarCompiler: grammars are compiled beside the engine thread, once each, and kept.

All state is the engine thread's. A worker is a thread that compiles one grammar, leaves the
outcome in a queue and rings a bell. A compilation cannot be stopped: when it takes too long, those
who wait are told, its worker is given up, and the next grammar gets a new one. What it finds all
the same is kept. Only so many may be given up at once; then no further grammar is taken.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from sglang.srt.constrained.grammar import (
    CompiledGrammar,
    Grammar,
    GrammarBackend,
    GrammarError,
    NoWorker,
)
from sglang.srt.errors import SglangError

logger = logging.getLogger(__name__)

# Compilation takes processors that lanes and the engine thread want as well.
WORKERS = 2
MAX_GIVEN_UP = 4
# Far above what schemas of real programs take (milliseconds, a second for huge ones), and below
# the patience of clients: one that knows soon can send a simpler schema.
LIMIT_S = 30.0
# Of a tokenizer from a disk; a library takes a few seconds.
LOAD_LIMIT_S = 120.0
CACHE_BYTES = 256 << 20

Outcome = CompiledGrammar | GrammarError
Spawn = Callable[[Callable[[], None]], None]
T = TypeVar("T")


@dataclass(slots=True)
class CompilerCounts:
    """Since the start. failed: refused by the library; timed_out ones are not among them."""

    asked: int = 0
    cache_hits: int = 0
    compiled: int = 0
    failed: int = 0
    timed_out: int = 0
    compile_s: float = 0.0


@dataclass(slots=True)
class _Report:
    grammar: Grammar
    outcome: Outcome
    took_s: float


def daemon_thread(work: Callable[[], None]) -> None:
    """A daemon, so that what never ends does not keep the process."""
    threading.Thread(target=work, name="grammar", daemon=True).start()


class GrammarCompiler:
    """load: makes the backend, in a worker, before the first grammar is compiled; it may raise an
    SglangError, which every grammar is then refused with. spawn: runs work in a thread of its own.
    """

    def __init__(
        self,
        load: Callable[[], GrammarBackend],
        *,
        workers: int = WORKERS,
        limit_s: float = LIMIT_S,
        cache_bytes: int = CACHE_BYTES,
        clock: Callable[[], float] = time.monotonic,
        spawn: Spawn = daemon_thread,
    ) -> None:
        self._load = load
        self._workers = workers
        self._limit_s = limit_s
        self._clock = clock
        self._spawn = spawn
        self.counts = CompilerCounts()
        self._backend: GrammarBackend | None = None
        self._loading_since_s: float | None = None
        self._load_error: GrammarError | None = None
        self._cache = _Cache(cache_bytes)
        self._asked: deque[Grammar] = deque()
        self._started_s: dict[Grammar, float] = {}  # being compiled
        self._given_up: set[Grammar] = set()
        self._loaded: queue.SimpleQueue[GrammarBackend | GrammarError] = queue.SimpleQueue()
        self._reports: queue.SimpleQueue[_Report] = queue.SimpleQueue()
        self._bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    @property
    def backend(self) -> GrammarBackend:
        """Once something is compiled."""
        assert self._backend is not None, "no grammar backend is loaded"
        return self._backend

    def load_now(self) -> None:
        """At start, so that the first grammar does not wait for it. Raises what `load` raises."""
        self._backend = self._load()

    @property
    def busy(self) -> bool:
        """Whether `poll` may have something to say, now or later."""
        at_work = self._asked or self._started_s or self._given_up
        return bool(at_work) or self._loading_since_s is not None

    def fileno(self) -> int:
        """Readable when there is something for `poll`."""
        return self._bell

    def close(self) -> None:
        os.close(self._bell)

    def ask(self, grammar: Grammar) -> Outcome | None:
        """What is known of it; None: `poll` will say."""
        self.counts.asked += 1
        known = self._load_error or self._cache.get(grammar)
        if known is not None:
            self.counts.cache_hits += 1
            return known
        if grammar in self._started_s or grammar in self._asked:
            return None
        if grammar in self._given_up:
            return self._too_slow()
        if len(self._given_up) >= MAX_GIVEN_UP:
            return self._no_worker()
        self._asked.append(grammar)
        self._start()
        return None

    def forget(self, grammar: Grammar) -> None:
        """Nobody waits for it any more; what is being compiled already is still kept."""
        if grammar in self._asked:
            self._asked.remove(grammar)

    def poll(self) -> dict[Grammar, Outcome]:
        """What has become known since the last call; never waits."""
        self._silence_bell()
        outcomes: dict[Grammar, Outcome] = {}
        for loaded in _drain(self._loaded):
            self._loading_since_s = None
            if isinstance(loaded, GrammarError):
                self._load_error = loaded
                outcomes |= dict.fromkeys(self._asked, loaded)
                self._asked.clear()
            else:
                self._backend = loaded
        for report in _drain(self._reports):
            self._take(report, outcomes)
        self._give_up(outcomes)
        self._start()
        return outcomes

    def _take(self, report: _Report, outcomes: dict[Grammar, Outcome]) -> None:
        grammar, outcome = report.grammar, report.outcome
        self.counts.compile_s += report.took_s
        if isinstance(outcome, GrammarError):
            self.counts.failed += 1
        else:
            self.counts.compiled += 1
        self._cache.put(grammar, outcome)
        if grammar in self._given_up:
            self._given_up.remove(grammar)
        else:
            del self._started_s[grammar]
            outcomes[grammar] = outcome

    def _give_up(self, outcomes: dict[Grammar, Outcome]) -> None:
        now_s = self._clock()
        loading_since_s = self._loading_since_s
        if loading_since_s is not None and now_s - loading_since_s >= LOAD_LIMIT_S:
            late = GrammarError(f"the grammar backend is not loaded after {LOAD_LIMIT_S:g} s")
            outcomes |= dict.fromkeys(self._asked, late)
            self._asked.clear()
        for grammar, started_s in list(self._started_s.items()):
            if now_s - started_s < self._limit_s:
                break  # the others have begun later
            del self._started_s[grammar]
            self._given_up.add(grammar)
            self.counts.timed_out += 1
            outcomes[grammar] = self._too_slow()
        if len(self._given_up) >= MAX_GIVEN_UP:
            outcomes |= dict.fromkeys(self._asked, self._no_worker())
            self._asked.clear()

    def _no_worker(self) -> GrammarError:
        return NoWorker(
            f"{len(self._given_up)} grammars are taking too long to compile, no further one is "
            "taken until one of them is done"
        )

    def _too_slow(self) -> GrammarError:
        return GrammarError(f"could not be compiled within {self._limit_s:g} s: it is too complex")

    def _start(self) -> None:
        """As many as there are workers for."""
        backend = self._backend
        if backend is None:
            if self._asked and self._loading_since_s is None:
                self._loading_since_s = self._clock()
                self._spawn(self._load_for_us)
            return
        while self._asked and len(self._started_s) < self._workers:
            grammar = self._asked.popleft()
            self._started_s[grammar] = self._clock()
            self._spawn(lambda grammar=grammar: self._compile(backend, grammar))  # type: ignore[misc]

    def _load_for_us(self) -> None:
        """In a worker."""
        try:
            self._loaded.put(self._load())
        except Exception as error:
            if not isinstance(error, SglangError):
                logger.exception("The grammar backend could not be loaded")
            self._loaded.put(GrammarError(str(error)))
        self._ring()

    def _compile(self, backend: GrammarBackend, grammar: Grammar) -> None:
        """In a worker."""
        started_s = self._clock()
        outcome: Outcome
        try:
            outcome = backend.compile(grammar)
        except GrammarError as error:
            outcome = error
        except Exception as error:
            logger.exception("A grammar of kind %s could not be compiled", grammar.kind)
            outcome = GrammarError(f"{type(error).__name__}: {error}")
        self._reports.put(_Report(grammar, outcome, self._clock() - started_s))
        self._ring()

    def _ring(self) -> None:
        os.eventfd_write(self._bell, 1)

    def _silence_bell(self) -> None:
        try:
            os.eventfd_read(self._bell)
        except BlockingIOError:
            return


class _Cache:
    """Outcomes by grammar, the least recently used leave first."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._bytes = 0
        self._outcomes: OrderedDict[Grammar, tuple[Outcome, int]] = OrderedDict()

    def get(self, grammar: Grammar) -> Outcome | None:
        entry = self._outcomes.get(grammar)
        if entry is None:
            return None
        self._outcomes.move_to_end(grammar)
        return entry[0]

    def put(self, grammar: Grammar, outcome: Outcome) -> None:
        size = 4 * len(grammar.text)
        if not isinstance(outcome, GrammarError):
            size += outcome.size_bytes
        if grammar in self._outcomes or size > self._limit_bytes:
            return
        self._outcomes[grammar] = outcome, size
        self._bytes += size
        while self._bytes > self._limit_bytes:
            _, (_, freed) = self._outcomes.popitem(last=False)
            self._bytes -= freed


def _drain(source: queue.SimpleQueue[T]) -> list[T]:
    return [source.get_nowait() for _ in range(source.qsize())]
