"""WorkThread: runs what it is given on a thread of its own, one piece behind the other."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

from drift_scheduler.lane import LaneTimeout

START_LIMIT_S = 30.0


def _nothing() -> None:
    return None


class WorkThread:
    """prepare: is called on the thread before anything else. Raises LaneTimeout where that takes
    longer than START_LIMIT_S."""

    def __init__(self, name: str, prepare: Callable[[], None] = _nothing) -> None:
        self._prepare = prepare
        self._pieces: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._prepared = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()
        if not self._prepared.wait(START_LIMIT_S):
            raise LaneTimeout(f"thread {name} did not start")

    def put(self, piece: Callable[[], None]) -> None:
        """`piece` must not raise: nobody would hear of it."""
        self._pieces.put(piece)

    def close(self, timeout_s: float) -> None:
        """Ends the thread behind all pieces. Raises LaneTimeout if they take longer."""
        self._pieces.put(None)
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            raise LaneTimeout(f"thread {self._thread.name} is still at work")

    def _run(self) -> None:
        self._prepare()
        self._prepared.set()
        while (piece := self._pieces.get()) is not None:
            piece()
            del piece  # and what it holds, while there is nothing to do
