"""Watchdog: a server that makes no progress says where it hangs and ends.

It runs on a thread of its own, so that it also sees the engine thread blocked in a call.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import sys
import threading
import time
from collections.abc import Callable

logger = logging.getLogger(__name__)


class Watchdog:
    """Calls `on_timeout` once when `beat` has not been called for `timeout_s`.

    The default prints every thread's stack and leaves the process with exit code 1; the parent
    then takes the server down.
    """

    def __init__(
        self,
        timeout_s: float,
        on_timeout: Callable[[float], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.timeout_s = timeout_s
        self._on_timeout = on_timeout or _dump_and_exit
        self._clock = clock
        self._last_beat_s = clock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def beat(self) -> None:
        self._last_beat_s = self._clock()

    def check(self) -> bool:
        """One look. True if the limit has passed and `on_timeout` was called."""
        silent_s = self._clock() - self._last_beat_s
        if silent_s < self.timeout_s:
            return False
        self._on_timeout(silent_s)
        return True

    def start(self) -> None:
        self.beat()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(min(1.0, self.timeout_s / 4)):
            if self.check():
                return


def _dump_and_exit(silent_s: float) -> None:
    logger.critical("no progress for %.0f s (--watchdog-timeout); stacks of all threads:", silent_s)
    faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
    os._exit(1)
