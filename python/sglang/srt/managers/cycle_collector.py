"""CycleCollector: Python's garbage collector, at times when nobody waits for a token.

A full collection walks every object that the process keeps. That may take tens of milliseconds,
and left to itself it comes in the middle of a decode step. Almost all garbage goes without it, by
its reference count; what is left are cycles, as of exceptions and their frames, and they can wait.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# The engine has been idle for so long that the next request is not expected at once.
IDLE_S = 1.0
# Under load without a pause: a rare hiccup is better than memory that only grows.
LONGEST_S = 600.0


@contextmanager
def undisturbed() -> Iterator[None]:
    """Meanwhile nothing is collected but on demand, and never what is there already: model and
    tables live as long as the process."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


class CycleCollector:
    """Told by the loop whether there is work; collects once for each time that there was some."""

    def __init__(
        self,
        *,
        collect: Callable[[], object] = gc.collect,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._collect = collect
        self._clock = clock
        self._last_s = clock()
        self._idle_since_s: float | None = None
        self._owed = False

    def idle(self) -> bool:
        """Nothing is in flight. Returns whether it has collected: what else takes long and can wait
        is best done now."""
        now_s = self._clock()
        if self._idle_since_s is None:
            self._idle_since_s = now_s
        if not self._owed or now_s - self._idle_since_s < IDLE_S:
            return False
        self._run(now_s)
        return True

    def busy(self) -> None:
        """Something is in flight, and nothing else to do."""
        self._idle_since_s = None
        self._owed = True
        now_s = self._clock()
        if now_s - self._last_s >= LONGEST_S:
            self._run(now_s)

    def _run(self, now_s: float) -> None:
        self._collect()
        self._last_s = now_s
        self._owed = False
