"""HostDelay: what the host adds to the time between two tokens, learnt from what it added lately.

A finished step is noticed after some launch or other turn of the loop, and now and then after
something else had the processor. Steps planned to end exactly at the deadline would be late by
that.
"""

from __future__ import annotations

OVER = 0.003
"""So many of the steps are delayed by more than the allowance. Requests are judged by the 99th
percentile of their own gaps, one by one: with as many as one step in a hundred delayed, many of
them would have more than that, for delays come in clusters."""
START_S = 1.5e-3
# What the processes between the engine and the client take is not seen here.
LEAST_S = 1e-3
MOST_S = 10e-3
RISE_S = 0.5e-3
_FALL_S = RISE_S * OVER / (1 - OVER)


class HostDelay:
    """allowance_s rises with each longer delay and falls a little with each shorter one; the two
    balance at OVER, whatever delays are distributed like (as the guard's margins do)."""

    def __init__(self) -> None:
        self.allowance_s = START_S

    def observe(self, delay_s: float) -> None:
        """A step's tokens came so much later behind those of the step before than the device
        took. Negative after a delayed one."""
        if delay_s > self.allowance_s:
            self.allowance_s = min(MOST_S, self.allowance_s + RISE_S)
        else:
            self.allowance_s = max(LEAST_S, self.allowance_s - _FALL_S)
