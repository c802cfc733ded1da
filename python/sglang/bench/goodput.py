"""Service level objectives, and which requests met them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sglang.bench.records import RequestRecord

OBJECTIVE_NAMES = ("ttft", "tpot", "e2el", "itl_p99", "ttft_per_token")


@dataclass(frozen=True, slots=True)
class Objectives:
    """Upper bounds in milliseconds; None asks for nothing.

    ttft, tpot, e2el are SGLang's. Two are additions: itl_p99 bounds the 99th percentile of one
    request's chunk gaps, and ttft_per_token makes the first token's deadline grow with the work:
    max(ttft, ttft_per_token x prompt tokens that were not cached).
    """

    ttft_ms: float | None = None
    tpot_ms: float | None = None
    e2el_ms: float | None = None
    itl_p99_ms: float | None = None
    ttft_per_token_ms: float | None = None

    def as_json(self) -> dict[str, float]:
        """The bounds that were set, under the names of --goodput."""
        bounds = {name: getattr(self, f"{name}_ms") for name in OBJECTIVE_NAMES}
        return {name: bound for name, bound in bounds.items() if bound is not None}

    def ttft_deadline_ms(self, uncached_tokens: int) -> float | None:
        if self.ttft_per_token_ms is None:
            return self.ttft_ms
        return max(self.ttft_ms or 0.0, self.ttft_per_token_ms * uncached_tokens)


@dataclass(frozen=True, slots=True)
class Goodput:
    """request_goodput: good requests per second. Attainments are fractions of all requests, a
    failed one being a miss. Both TTFT bounds appear as the one deadline "ttft"."""

    objectives: Objectives
    request_goodput: float
    attainment: float
    attainment_by_metric: dict[str, float]


def evaluate(
    records: Sequence[RequestRecord], objectives: Objectives, duration_s: float
) -> Goodput:
    """A request is good when it succeeded and met every objective. Needs duration_s > 0."""
    verdicts = [_verdicts(record, objectives) for record in records]
    names = [
        name
        for name, asked in (
            ("ttft", objectives.ttft_deadline_ms(0)),
            ("tpot", objectives.tpot_ms),
            ("e2el", objectives.e2el_ms),
            ("itl_p99", objectives.itl_p99_ms),
        )
        if asked is not None
    ]
    total = len(records)
    good = sum(verdict is not None and all(verdict.values()) for verdict in verdicts)
    met = {name: sum(v is not None and v[name] for v in verdicts) for name in names}
    return Goodput(
        objectives=objectives,
        request_goodput=good / duration_s,
        attainment=good / total if total else 0.0,
        attainment_by_metric={name: met[name] / total if total else 0.0 for name in names},
    )


def request_gap_p99_ms(record: RequestRecord) -> float:
    """99th percentile of the request's chunk gaps; 0 for an answer of one chunk."""
    gaps_s = record.answer.chunk_gaps_s
    return float(np.percentile(gaps_s, 99)) * 1e3 if gaps_s else 0.0


def _verdicts(record: RequestRecord, objectives: Objectives) -> dict[str, bool] | None:
    """Objective name -> met, for a request that succeeded; else None."""
    if not record.ok:
        return None
    answer = record.answer
    uncached_tokens = max(0, record.prompt_tokens - (answer.cached_tokens or 0))
    tpot_s = record.tpot_s
    measured_ms = {
        "ttft": (answer.ttft_s * 1e3, objectives.ttft_deadline_ms(uncached_tokens)),
        "tpot": (0.0 if tpot_s is None else tpot_s * 1e3, objectives.tpot_ms),
        "e2el": (answer.latency_s * 1e3, objectives.e2el_ms),
        "itl_p99": (request_gap_p99_ms(record), objectives.itl_p99_ms),
    }
    return {
        name: value_ms <= bound_ms
        for name, (value_ms, bound_ms) in measured_ms.items()
        if bound_ms is not None
    }
