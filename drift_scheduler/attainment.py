"""Attainment: which requests had their tokens in time, and how many a second.

A request counts when it has finished, that is, when it has had its last token:

    met_ttft   its first token came within slo.ttft_limit_s(uncached tokens) of its arrival
    met_tbt    the 99th percentile of the gaps between its tokens is at most slo.tbt_s,
               interpolated linearly as numpy.percentile does
    met        both
    shed       refused for want of room or of time; never among the finished

What an SLO leaves open is met, so a request that asks for nothing has met it, and so has one that
ends before there was anything to be late: no token, or no gap. Not counted at all are requests that
their client aborts, and the server's own, such as health checks, whose class has no name.
attainment = met / finished; goodput = met / seconds.
"""

from __future__ import annotations

import math
from typing import Any

from drift_scheduler.slo import Slo

WINDOW_S = 60
_PERCENTILE = 0.99
_NO_SLO = Slo()


class Pace:
    """When the tokens of one request come, as far as it takes to judge them in the end.

    tbt_s: the gap that its SLO allows. Since that is known beforehand, no gap need be kept: the
    percentile lies between two neighbours in the order of the gaps, and unless both are on the
    same side of the limit, they are the longest gap within it and the shortest one beyond it.
    """

    __slots__ = (
        "_beyond",
        "_longest_within_s",
        "_shortest_beyond_s",
        "_tbt_s",
        "arrival_s",
        "first_s",
        "last_s",
        "tokens",
    )

    def __init__(self, arrival_s: float, tbt_s: float) -> None:
        self.arrival_s = arrival_s
        self.first_s = arrival_s
        self.last_s = arrival_s
        self.tokens = 0
        self._tbt_s = tbt_s
        self._beyond = 0  # gaps longer than tbt_s
        self._longest_within_s = 0.0
        self._shortest_beyond_s = math.inf

    def token(self, now_s: float) -> None:
        """The next token is there."""
        if self.tokens == 0:
            self.first_s = now_s
        else:
            gap_s = now_s - self.last_s
            if gap_s > self._tbt_s:
                self._beyond += 1
                if gap_s < self._shortest_beyond_s:
                    self._shortest_beyond_s = gap_s
            elif gap_s > self._longest_within_s:
                self._longest_within_s = gap_s
        self.last_s = now_s
        self.tokens += 1

    @property
    def ttft_s(self) -> float:
        """0 as long as there is no token."""
        return self.first_s - self.arrival_s

    @property
    def kept_tbt(self) -> bool:
        """Whether the 99th percentile of the gaps so far is within tbt_s."""
        if self._beyond == 0:
            return True
        gaps = self.tokens - 1
        within = gaps - self._beyond
        position = _PERCENTILE * (gaps - 1)
        below = math.floor(position)
        share = position - below
        if below >= within:
            return False
        if below + 1 < within or share == 0:
            return True
        reach_s = self._shortest_beyond_s - self._longest_within_s
        # Two forms of the same sum, as in NumPy, so that rounding is the same too.
        if share < 0.5:
            return self._longest_within_s + reach_s * share <= self._tbt_s
        return self._shortest_beyond_s - reach_s * (1 - share) <= self._tbt_s


class Attainment:
    """Counts of all requests and of each service class, since the start and of late.

    "Of late" are the last WINDOW_S seconds: a bucket for each whole second since `start_s`, the one
    that runs now included. Rates divide by the time that the counts cover, by a second at least.
    """

    def __init__(self, start_s: float) -> None:
        self._start_s = start_s
        self._all = _Tally()
        self._classes: dict[str, _Tally] = {}
        self.any_slo = False
        """Whether any request so far asked for anything."""

    def finish(self, pace: Pace, slo: Slo, uncached_tokens: int, class_name: str) -> None:
        """A request has finished; it counts at the time of its last token.

        pace: made with slo.tbt_s. uncached_tokens: of its prompt, when it was first taken up.
        """
        if not class_name:
            return
        met_ttft = pace.ttft_s <= slo.ttft_limit_s(uncached_tokens)
        met_tbt = pace.kept_tbt
        second = int(pace.last_s - self._start_s)
        for tally in (self._all, self._class(class_name)):
            tally.finish(second, met_ttft, met_tbt)
        self.any_slo = self.any_slo or slo != _NO_SLO

    def shed(self, class_name: str) -> None:
        """A request was refused: it found no room, or could not have had its tokens in time."""
        if not class_name:
            return
        for tally in (self._all, self._class(class_name)):
            tally.shed += 1

    def snapshot(self, now_s: float) -> dict[str, Any]:
        """Counts and rates as plain values.

        finished, met_ttft, met_tbt, met, shed     requests since the start
        attainment                                 0..1; None while nothing has finished
        goodput_rps                                requests a second that met their SLO
        window                                     {finished, met, attainment, goodput_rps} of late
        classes                                    {name: all of the above}
        """
        elapsed_s = max(0.0, now_s - self._start_s)
        return {
            **self._all.snapshot(elapsed_s),
            "classes": {name: t.snapshot(elapsed_s) for name, t in self._classes.items()},
        }

    def _class(self, name: str) -> _Tally:
        if name not in self._classes:
            self._classes[name] = _Tally()
        return self._classes[name]


class _Tally:
    """Seconds count from the start."""

    def __init__(self) -> None:
        self.met_ttft = 0
        self.met_tbt = 0
        self.shed = 0
        self._finished = 0
        self._met = 0
        # Ring of the window: second s has its counts in bucket s % WINDOW_S.
        self._second_of = [-1] * WINDOW_S
        self._finished_in = [0] * WINDOW_S
        self._met_in = [0] * WINDOW_S

    def finish(self, second: int, met_ttft: bool, met_tbt: bool) -> None:
        met = met_ttft and met_tbt
        self.met_ttft += met_ttft
        self.met_tbt += met_tbt
        self._finished += 1
        self._met += met
        bucket = second % WINDOW_S
        if second < self._second_of[bucket]:  # its second has left the window
            return
        if second > self._second_of[bucket]:
            self._second_of[bucket] = second
            self._finished_in[bucket] = self._met_in[bucket] = 0
        self._finished_in[bucket] += 1
        self._met_in[bucket] += met

    def snapshot(self, elapsed_s: float) -> dict[str, Any]:
        first = max(0, int(elapsed_s) - (WINDOW_S - 1))
        recent = [i for i, second in enumerate(self._second_of) if second >= first]
        return {
            **_rates(self._finished, self._met, elapsed_s),
            "met_ttft": self.met_ttft,
            "met_tbt": self.met_tbt,
            "shed": self.shed,
            "window": _rates(
                sum(self._finished_in[i] for i in recent),
                sum(self._met_in[i] for i in recent),
                elapsed_s - first,
            ),
        }


def _rates(finished: int, met: int, seconds: float) -> dict[str, Any]:
    return {
        "finished": finished,
        "met": met,
        "attainment": met / finished if finished else None,
        "goodput_rps": met / max(seconds, 1.0),
    }
