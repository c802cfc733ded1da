"""Processor time of this server's processes."""

from __future__ import annotations

import psutil

_OWN = "tokenizer"  # SGLang's name for the process that serves HTTP
_TITLE = "sglang::"


def cpu_seconds() -> dict[str, float]:
    """User and system time since each began, by the part it plays: that of the process title."""
    own = psutil.Process()
    seconds = {_OWN: _used(own)}
    for child in own.children():
        try:
            title = " ".join(child.cmdline())
            if title.startswith(_TITLE):
                seconds[title.removeprefix(_TITLE).split()[0]] = _used(child)
        except psutil.Error:  # it has just ended
            continue
    return seconds


def _used(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)
