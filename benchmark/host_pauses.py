"""Whether the machine itself stands still at times, as seen by a process that has nothing to do.

A server whose tokens come late may be at fault, or its host: another tenant's work, a limit on
processor time, an interrupt that takes long. This process asks for short sleeps and notes how much
longer they were. What holds up only those who talk to the GPU's driver it does not see.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

SLEEP_S = 1e-3
# A sleep that is later than this is a pause: schedulers and timers alone are not.
PAUSE_S = 5e-3
ANSWER_LIMIT_S = 10.0


@dataclass(slots=True)
class Pauses:
    """Sleeps that took so much longer than asked for, in seconds each."""

    late_s: list[float] = field(default_factory=list)

    def to_json(self) -> dict[str, float]:
        """over_5_ms: how many there were; longest_ms and total_ms: of those."""
        return {
            f"over_{PAUSE_S * 1e3:.0f}_ms": len(self.late_s),
            "longest_ms": max(self.late_s, default=0.0) * 1e3,
            "total_ms": sum(self.late_s) * 1e3,
        }


def sleep_and_look(
    asked: Callable[[], bool],
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> Pauses:
    """Sleeps again and again until it is asked for what it saw."""
    pauses = Pauses()
    before_s = clock()
    while not asked():
        sleep(SLEEP_S)
        now_s = clock()
        late_s = now_s - before_s - SLEEP_S
        if late_s > PAUSE_S:
            pauses.late_s.append(late_s)
        before_s = now_s
    return pauses


class HostWatch:
    """The process, from construction to close()."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=_answer, args=(theirs,), name="host-watch", daemon=True
        )
        self._process.start()
        theirs.close()
        self.take()  # once it runs, its start is no pause

    def take(self) -> Pauses | None:
        """Since it was last asked; None if it does not answer any more."""
        try:
            self._pipe.send(True)
            return self._pipe.recv() if self._pipe.poll(ANSWER_LIMIT_S) else None
        except (EOFError, OSError):
            return None

    def close(self) -> None:
        """May be called twice."""
        self._pipe.close()
        self._process.join(ANSWER_LIMIT_S)
        if self._process.is_alive():
            self._process.kill()


def _answer(pipe: Connection[Any, Any]) -> None:
    try:
        while True:
            pauses = sleep_and_look(pipe.poll)
            pipe.recv()
            pipe.send(pauses)
    except (EOFError, OSError, KeyboardInterrupt):
        return
