"""Readings: what a thread of its own reads again and again, for those who must not wait for it."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Generic, Self, TypeVar

logger = logging.getLogger(__name__)

CLOSE_LIMIT_S = 5.0
KEPT = 512  # readings

T = TypeVar("T")


def _nothing(reading: object, now_s: float) -> None:
    return None


class Readings(Generic[T]):
    """The last KEPT readings of one thing, and their times (time.monotonic()).

    A read blocks its thread for as long as it likes, and nobody else: whoever asks is given what
    was read last.
    """

    def __init__(
        self,
        read: Callable[[], T],
        *,
        what: str,
        interval_s: float,
        on_reading: Callable[[T, float], None] = _nothing,
        close: Callable[[], None] = lambda: None,
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        """read: one that raises ends the readings. what: is read, for the log. on_reading: called
        by the thread with each and its time, such as ClockRatio.feed. close: called by the thread
        when it stops."""
        self._read = read
        self._what = what
        self._on_reading = on_reading
        self._interval_s = interval_s
        self._close = close
        self._now_s = now_s
        self._readings: deque[tuple[float, T]] = deque(maxlen=KEPT)
        self._stopping = threading.Event()
        self._first = threading.Event()
        self._thread = threading.Thread(target=self._run, name=what.replace(" ", "-"), daemon=True)
        self._thread.start()

    def last(self) -> T | None:
        """What was read last; None before the first reading and once reading has failed."""
        try:
            return self._readings[-1][1]
        except IndexError:
            return None

    def since(self, since_s: float) -> list[T]:
        """Those since then, oldest first; the last one if there is none."""
        recent = [reading for read_s, reading in self._readings.copy() if read_s >= since_s]
        if recent:
            return recent
        last = self.last()
        return [] if last is None else [last]

    def wait_first(self, timeout_s: float) -> bool:
        """Until there is a reading, or never will be one. False: not in time."""
        return self._first.wait(timeout_s)

    def close(self) -> None:
        """Stops the thread; may be called twice."""
        self._stopping.set()
        self._thread.join(CLOSE_LIMIT_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _run(self) -> None:
        try:
            while not self._stopping.is_set():
                reading = self._read()
                now_s = self._now_s()
                self._readings.append((now_s, reading))
                self._on_reading(reading, now_s)
                self._first.set()
                self._stopping.wait(self._interval_s)
        except Exception as error:
            # A reading that stands still misleads more than none.
            self._readings.clear()
            logger.warning("The %s cannot be read any more: %s", self._what, error)
        finally:
            self._first.set()
            self._close()
