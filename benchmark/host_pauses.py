"""Whether the machine itself stands still at times, as seen by a process that has nothing to do.

A server whose tokens come late may be at fault, or its host: another tenant's work, a limit on
processor time, an interrupt that takes long. This process asks for short sleeps and notes how much
longer they were. A processor that its hypervisor gives to somebody else holds up only who runs on
it; so the time that was stolen from all processors, by the kernel's count, is noted too. What holds
up only those who talk to the GPU's driver this process does not see.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

SLEEP_S = 1e-3
# A sleep that is later than this is a pause: schedulers and timers alone are not.
PAUSE_S = 5e-3
ANSWER_LIMIT_S = 10.0
# The place of stolen time among the words of the first line of /proc/stat; see proc(5).
_STEAL = 8


@dataclass(slots=True)
class Pauses:
    """Sleeps that took so much longer than asked for, in seconds each. stolen_s: meanwhile, from
    all processors together; None if the kernel does not count it."""

    late_s: list[float] = field(default_factory=list)
    stolen_s: float | None = None

    def to_json(self) -> dict[str, float | None]:
        """over_5_ms: how many there were; longest_ms and total_ms: of those."""
        return {
            f"over_{PAUSE_S * 1e3:.0f}_ms": len(self.late_s),
            "longest_ms": max(self.late_s, default=0.0) * 1e3,
            "total_ms": sum(self.late_s) * 1e3,
            "stolen_ms": None if self.stolen_s is None else self.stolen_s * 1e3,
        }


def stolen_s(stat: Path = Path("/proc/stat")) -> float | None:
    """Since the machine started, from all its processors together; None if that is not counted."""
    try:
        first_line = stat.read_text(encoding="ascii").partition("\n")[0]
        return int(first_line.split()[_STEAL]) / os.sysconf("SC_CLK_TCK")
    except (OSError, IndexError):
        return None


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
        before_s = stolen_s()
        while True:
            pauses = sleep_and_look(pipe.poll)
            pipe.recv()
            now_s = stolen_s()
            if now_s is not None and before_s is not None:
                pauses.stolen_s = now_s - before_s
            before_s = now_s
            pipe.send(pauses)
    except (EOFError, OSError, KeyboardInterrupt):
        return
