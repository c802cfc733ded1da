"""ClockRatio: how much slower work gets because the device has lowered its clock.

A device at its power limit lowers the clock of its SMs, and work bound by arithmetic slows in
proportion. Pure: somebody else reads the clock and hands the readings in.

What runs beside other work was also measured beside it, at the lower clock: most of the slowdown
that a guard's cell holds *is* the clock. So a time is scaled by (clock when the cell was last
refined) / (clock now) and never by a solo profile's clock, which would count the same loss twice.
"""

from __future__ import annotations

import math
from typing import Protocol

MAX_FACTOR = 1.5
STALE_S = 1.0


class ClockReader(Protocol):
    """Reads the SM clock of a device."""

    def read_mhz(self) -> float | None:
        """None if it cannot be read now, or ever."""
        ...


class ClockRatio:
    """A smoothed SM clock.

    half_life_s: after so long an older reading counts half. Times are of any one clock that never
    goes back.
    """

    def __init__(self, half_life_s: float = 0.25) -> None:
        if not half_life_s > 0:
            raise ValueError(f"half_life_s={half_life_s} must be positive")
        self._half_life_s = half_life_s
        self._mhz: float | None = None
        self._read_s = -math.inf

    def feed(self, mhz: float | None, now_s: float) -> None:
        """A reading taken at now_s. None, and one older than the last, is left out; after a gap
        of more than STALE_S the smoothing starts anew."""
        if mhz is None or not mhz > 0 or now_s < self._read_s:
            return
        known = self.at(now_s)
        if known is None:
            self._mhz = mhz
        else:
            kept = 0.5 ** ((now_s - self._read_s) / self._half_life_s)
            self._mhz = mhz + kept * (known - mhz)
        self._read_s = now_s

    def at(self, now_s: float) -> float | None:
        """The smoothed clock; None without a reading in the last STALE_S seconds."""
        return self._mhz if now_s - self._read_s <= STALE_S else None


def slowdown(reference_mhz: float | None, now_mhz: float | None) -> float:
    """The factor on work that was timed at reference_mhz, from 1 to MAX_FACTOR; 1 if either is
    not known. A clock that has risen promises nothing: what is bound by memory gains little."""
    if reference_mhz is None or now_mhz is None or now_mhz >= reference_mhz:
        return 1.0
    return min(reference_mhz / now_mhz, MAX_FACTOR)
