"""From records to the numbers of a run: pure functions, no clock."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sglang.bench.records import RequestRecord


@dataclass(frozen=True, slots=True)
class Distribution:
    """Milliseconds; percentiles are linearly interpolated. All zero without samples."""

    mean: float = 0.0
    median: float = 0.0
    std: float = 0.0
    p90: float = 0.0
    p95: float = 0.0
    p99: float = 0.0
    max: float = 0.0

    @classmethod
    def of_seconds(cls, samples_s: Sequence[float]) -> Distribution:
        if not samples_s:
            return cls()
        samples_ms = np.asarray(samples_s, dtype=np.float64) * 1e3
        median, p90, p95, p99 = (float(q) for q in np.percentile(samples_ms, (50, 90, 95, 99)))
        return cls(
            mean=float(samples_ms.mean()),
            median=median,
            std=float(samples_ms.std()),
            p90=p90,
            p95=p95,
            p99=p99,
            max=float(samples_ms.max()),
        )


@dataclass(frozen=True, slots=True)
class TurnCache:
    """Prompt tokens and how many of them were cached, over all requests of one turn number."""

    turn: int
    requests: int
    prompt_tokens: int
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class Summary:
    """All requests that completed. Throughputs are per second of duration_s.

    concurrency: mean number of requests in flight. Cached tokens are None when no answer said.
    """

    duration_s: float
    completed: int
    failed: int
    input_tokens: int
    output_tokens: int
    e2e_latency: Distribution
    ttft: Distribution
    tpot: Distribution
    itl: Distribution
    concurrency: float
    max_output_tokens_per_s: int
    max_concurrent_requests: int
    cached_by_turn: tuple[TurnCache, ...] | None

    @property
    def request_throughput(self) -> float:
        return self.completed / self.duration_s

    @property
    def input_throughput(self) -> float:
        return self.input_tokens / self.duration_s

    @property
    def output_throughput(self) -> float:
        return self.output_tokens / self.duration_s

    @property
    def total_throughput(self) -> float:
        return self.input_throughput + self.output_throughput


def summarise(records: Sequence[RequestRecord], duration_s: float) -> Summary:
    """Needs duration_s > 0."""
    done = [record for record in records if record.ok]
    latencies_s = [record.answer.latency_s for record in done]
    itls_s: list[float] = []
    for record in done:
        itls_s += record.token_latencies_s()
    return Summary(
        duration_s=duration_s,
        completed=len(done),
        failed=len(records) - len(done),
        input_tokens=sum(record.prompt_tokens for record in done),
        output_tokens=sum(record.answer.output_tokens for record in done),
        e2e_latency=Distribution.of_seconds(latencies_s),
        ttft=Distribution.of_seconds([record.answer.ttft_s for record in done]),
        tpot=Distribution.of_seconds([r.tpot_s for r in done if r.tpot_s is not None]),
        itl=Distribution.of_seconds(itls_s),
        concurrency=sum(latencies_s) / duration_s,
        max_output_tokens_per_s=max(tokens_by_second(done), default=0),
        max_concurrent_requests=_peak_in_flight(done),
        cached_by_turn=_cached_by_turn(done),
    )


def tokens_by_second(done: Sequence[RequestRecord]) -> list[int]:
    """Output tokens in each second, the seconds being counted from the first request sent."""
    if not done:
        return []
    times_s: list[float] = []
    tokens: list[int] = []
    for record in done:
        answer = record.answer
        arrival_s = answer.start_s + answer.ttft_s
        later_tokens = sum(answer.chunk_tokens)
        times_s.append(arrival_s)
        tokens.append(max(0, answer.output_tokens - later_tokens))
        for gap_s, new_tokens in zip(answer.chunk_gaps_s, answer.chunk_tokens, strict=True):
            arrival_s += gap_s
            times_s.append(arrival_s)
            tokens.append(new_tokens)
    begin_s = min(record.answer.start_s for record in done)
    seconds = (np.asarray(times_s) - begin_s).astype(np.int64)
    return [int(count) for count in np.bincount(seconds, weights=tokens)]


def in_flight_by_second(done: Sequence[RequestRecord]) -> list[int]:
    """Most requests in flight at once in each second, counted as in tokens_by_second."""
    if not done:
        return []
    changes = _changes(done)
    begin_s, end_s = changes[0][0], changes[-1][0]
    most = [0] * (int(end_s - begin_s) + 1)
    in_flight = second = 0
    for at_s, change in changes:
        while second < int(at_s - begin_s):
            second += 1
            most[second] = in_flight
        in_flight += change
        most[second] = max(most[second], in_flight)
    return most


def _changes(done: Sequence[RequestRecord]) -> list[tuple[float, int]]:
    """(time, 1 for a start or -1 for an end) in order; at equal times an end comes first."""
    changes = [(record.answer.start_s, 1) for record in done]
    changes += [(record.answer.start_s + record.answer.latency_s, -1) for record in done]
    return sorted(changes)


def _peak_in_flight(done: Sequence[RequestRecord]) -> int:
    return max(in_flight_by_second(done), default=0)


def _cached_by_turn(done: Sequence[RequestRecord]) -> tuple[TurnCache, ...] | None:
    if all(record.answer.cached_tokens is None for record in done):
        return None
    turns = sorted({record.turn for record in done})
    return tuple(
        TurnCache(
            turn=turn,
            requests=sum(record.turn == turn for record in done),
            prompt_tokens=sum(record.prompt_tokens for record in done if record.turn == turn),
            cached_tokens=sum(r.answer.cached_tokens or 0 for r in done if r.turn == turn),
        )
        for turn in turns
    )
