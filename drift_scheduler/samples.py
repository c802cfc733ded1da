"""Samples of the queue: how much waits and how near the next deadline is."""

from __future__ import annotations

import math
from dataclasses import dataclass

from drift_scheduler.clock import ClockReader
from drift_scheduler.partition import Partition
from drift_scheduler.view import LoadView

# Often enough to see a queue move within a decode step, seldom enough to cost nothing.
SAMPLE_INTERVAL_S = 0.005


@dataclass(frozen=True, slots=True)
class QueueSample:
    """The load at one moment.

    waiting_prompts, waiting_tokens, running: as in LoadView. token_slack_s: until the first of
    the running requests is due its next token; first_token_slack_s: until the first of the
    prompts, waiting or in a prefill batch, is due its first one. Negative when late, infinity
    when nothing is due. partition: of the last launch. repartitions: since the start, launches on
    another partition than the launch before. sm_clock_mhz: None if it is not known.
    """

    time_s: float
    waiting_prompts: int
    waiting_tokens: int
    running: int
    token_slack_s: float
    first_token_slack_s: float
    partition: Partition
    repartitions: int = 0
    sm_clock_mhz: float | None = None


class QueueSampler:
    """Looks at every turn; gives a sample when the last one is old enough."""

    def __init__(
        self, interval_s: float = SAMPLE_INTERVAL_S, sm_clock: ClockReader | None = None
    ) -> None:
        self._interval_s = interval_s
        self._sm_clock = sm_clock
        self._next_s = -math.inf
        # When `running` was last seen to rise from nothing.
        self._running_since_s: float | None = None

    def look(
        self,
        view: LoadView,
        partition: Partition,
        repartitions: int,
        now_s: float,
        decode_ended_s: float,
    ) -> QueueSample | None:
        """decode_ended_s: when the last settled decode step ended."""
        if not view.running:
            self._running_since_s = None
        elif self._running_since_s is None:
            self._running_since_s = now_s
        if now_s < self._next_s:
            return None
        self._next_s = now_s + self._interval_s
        return QueueSample(
            now_s,
            view.waiting,
            view.waiting_tokens,
            view.running,
            self._token_due_s(view, decode_ended_s) - now_s,
            _first_token_due_s(view) - now_s,
            partition,
            repartitions,
            None if self._sm_clock is None else self._sm_clock.read_mhz(),
        )

    def _token_due_s(self, view: LoadView, decode_ended_s: float) -> float:
        if self._running_since_s is None:
            return math.inf
        # A step that ended before anybody ran who runs now gave none of them a token.
        last_token_s = max(decode_ended_s, self._running_since_s)
        return min(last_token_s + view.tbt_s, view.joined_due_s)


def _first_token_due_s(view: LoadView) -> float:
    waiting = view.backlog.first_due(-math.inf, 1)
    due_s = waiting[0].due_s if waiting else math.inf
    for batch in (view.prefill, view.parked):
        if batch is not None:
            due_s = min(due_s, batch.due_s)
    return due_s
