"""FirstTokens: first tokens that are sent when the decode step starts which their requests join.

A request whose prefill ends in the middle of a decode step joins a later one. Sent at once, its
first token would be followed by a gap of nearly two steps, or three where the next step is launched
already. Sent when its first step starts, it is followed by one.
"""

from __future__ import annotations

import math
from collections import deque
from typing import Generic, TypeVar

from drift_scheduler.slo import Slo

R = TypeVar("R")
LONGEST_STEPS = 2


def may_hold(slo: Slo, due_s: float, now_s: float) -> bool:
    """Whether a first token, due at due_s, may be kept back.

    Not if that could make it late, nor for a request that asks nothing of gaps.
    """
    return math.isfinite(slo.tbt_s) and not now_s < due_s < now_s + LONGEST_STEPS * slo.tbt_s


class FirstTokens(Generic[R]):
    """Whose token is held, and until which step has settled. Steps settle in order of launch."""

    def __init__(self) -> None:
        self._joining: list[R] = []
        # Of launched steps: (how many steps were launched before, who joins with it).
        self._starting: deque[tuple[int, list[R]]] = deque()
        self._launched = 0
        self._settled = 0

    def hold(self, request: R) -> None:
        """Its step is not launched yet."""
        self._joining.append(request)

    def step_launched(self) -> list[R]:
        """A step of all who have joined is. Returns those whose token is to be sent now."""
        if self._joining:
            self._starting.append((self._launched, self._joining))
            self._joining = []
        self._launched += 1
        return self._started()

    def step_settled(self) -> list[R]:
        """The first launched step that has not settled yet has. Returns whose token to send."""
        self._settled += 1
        return self._started()

    def release(self) -> list[R]:
        """Those whose step is not launched: it may not come soon."""
        released, self._joining = self._joining, []
        return released

    def _started(self) -> list[R]:
        started: list[R] = []
        while self._starting and self._starting[0][0] <= self._settled:
            started += self._starting.popleft()[1]
        return started
