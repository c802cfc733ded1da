"""What came of a simulation: a ledger that is filled as it runs, and its summary."""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from drift_scheduler.attainment import Attainment
from drift_scheduler.simulation.request import SimRequest

# All requests of a simulation are of one service class.
_CLASS = "all"


@dataclass(frozen=True, slots=True)
class Summary:
    """Of all requests offered. Shares are 0..1.

    attainment: requests that met their SLO, as Attainment defines it, of all offered; those shed,
    refused or unfinished have missed it. goodput_rps: the same a second, from the start to the last
    token, or to the end of a simulation that was not to wait for it.
    ttft: of finished requests; tbt: of all gaps between two tokens of one request. NaN where there
    was none. cached_share: of the prompt tokens of finished requests. The busy
    shares are means over replicas; both_busy counts in the two others too, fused_busy in decode's.
    retractions: requests that gave up their memory while decoding, and were filled again later.
    """

    replicas: int
    offered: int
    finished: int
    shed: int
    refused: int
    unfinished: int
    duration_s: float
    attainment: float
    met_ttft: float
    met_tbt: float
    goodput_rps: float
    ttft_p50_ms: float
    ttft_p99_ms: float
    tbt_p50_ms: float
    tbt_p99_ms: float
    output_tokens: int
    cached_share: float
    prefill_busy: float
    decode_busy: float
    both_busy: float
    fused_busy: float
    preemptions: int
    retractions: int


@dataclass(frozen=True, slots=True)
class Work:
    """What replicas did: seconds summed over them, and counts."""

    prefill_s: float
    decode_s: float
    both_s: float
    fused_s: float
    preemptions: int
    retractions: int


class Ledger:
    """Listens to the engines of all replicas."""

    def __init__(self) -> None:
        self.ended = 0
        """Requests that are done, one way or another."""
        self.last_end_s = 0.0
        self._refused = 0
        self._attainment = Attainment(0.0)
        self._ttfts_s = array("d")
        # Four bytes a token: there may be hundreds of millions.
        self._gaps_s = array("f")
        self.token_gap = self._gaps_s.append
        self._input_tokens = 0
        self._output_tokens = 0
        self._cached_tokens = 0

    def finished(self, request: SimRequest) -> None:
        pace = request.seen
        self.ended += 1
        self.last_end_s = max(self.last_end_s, pace.last_s)
        self._attainment.finish(pace, request.slo, request.uncached_tokens, _CLASS)
        self._ttfts_s.append(pace.ttft_s)
        self._input_tokens += request.input_tokens
        self._output_tokens += pace.tokens
        self._cached_tokens += request.input_tokens - request.uncached_tokens

    def shed(self, request: SimRequest) -> None:
        self.ended += 1
        self._attainment.shed(_CLASS)

    def refused(self, request: SimRequest) -> None:
        self.ended += 1
        self._refused += 1

    def summary(self, replicas: int, work: Work, offered: int, duration_s: float) -> Summary:
        """Of so many requests and seconds."""
        counts = self._attainment.snapshot(duration_s)
        ttft_p50_ms, ttft_p99_ms = _percentiles_ms(self._ttfts_s)
        tbt_p50_ms, tbt_p99_ms = _percentiles_ms(self._gaps_s)
        return Summary(
            replicas=replicas,
            offered=offered,
            finished=counts["finished"],
            shed=counts["shed"],
            refused=self._refused,
            unfinished=offered - self.ended,
            duration_s=duration_s,
            attainment=_share(counts["met"], offered),
            met_ttft=_share(counts["met_ttft"], offered),
            met_tbt=_share(counts["met_tbt"], offered),
            goodput_rps=_share(counts["met"], duration_s),
            ttft_p50_ms=ttft_p50_ms,
            ttft_p99_ms=ttft_p99_ms,
            tbt_p50_ms=tbt_p50_ms,
            tbt_p99_ms=tbt_p99_ms,
            output_tokens=self._output_tokens,
            cached_share=_share(self._cached_tokens, self._input_tokens),
            prefill_busy=_share(work.prefill_s, duration_s * replicas),
            decode_busy=_share(work.decode_s, duration_s * replicas),
            both_busy=_share(work.both_s, duration_s * replicas),
            fused_busy=_share(work.fused_s, duration_s * replicas),
            preemptions=work.preemptions,
            retractions=work.retractions,
        )


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _percentiles_ms(samples_s: Sequence[float]) -> tuple[float, float]:
    """The 50th and the 99th, linearly interpolated."""
    if not samples_s:
        return math.nan, math.nan
    p50, p99 = np.percentile(np.asarray(samples_s, dtype=np.float64), (50, 99)) * 1e3
    return float(p50), float(p99)
