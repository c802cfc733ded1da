"""What the calling thread had of the machine's processors."""

from __future__ import annotations

import time
from pathlib import Path

_SCHEDSTAT = Path("/proc/thread-self/schedstat")


def thread_times() -> dict[str, float | None]:
    """cpu_s: that it ran. waited_s: that it could have run while others had the processors; None
    where the kernel does not tell."""
    return {"cpu_s": time.thread_time(), "waited_s": _waited_s()}


def _waited_s() -> float | None:
    try:
        ran_ns, waited_ns, _ = _SCHEDSTAT.read_text().split()
    except (OSError, ValueError):
        return None
    # A kernel that does not count says 0 of both.
    return int(waited_ns) / 1e9 if int(ran_ns) else None
