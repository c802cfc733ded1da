"""The numbers of a run, from records made by hand."""

from __future__ import annotations

import pytest

from sglang.bench.goodput import Objectives, evaluate, request_gap_p99_ms
from sglang.bench.metrics import Distribution, in_flight_by_second, summarise
from sglang.bench.records import Answer, RequestRecord


def record(
    start_s: float = 0.0,
    ttft_s: float = 0.1,
    gaps: tuple[tuple[float, int], ...] = (),
    *,
    turn: int = 0,
    prompt_tokens: int = 10,
    cached_tokens: int | None = None,
    first_tokens: int = 1,
    error: str = "",
) -> RequestRecord:
    """gaps: (seconds, new tokens) of every chunk after the first."""
    answer = Answer(
        start_s=start_s,
        ttft_s=ttft_s,
        latency_s=ttft_s + sum(gap_s for gap_s, _ in gaps),
        chunk_gaps_s=[gap_s for gap_s, _ in gaps],
        chunk_tokens=[tokens for _, tokens in gaps],
        prompt_tokens=prompt_tokens,
        output_tokens=first_tokens + sum(tokens for _, tokens in gaps),
        cached_tokens=cached_tokens,
        error=error,
    )
    return RequestRecord(0, turn, 0.0, None, answer)


def test_distribution_interpolates_percentiles_in_milliseconds() -> None:
    values = Distribution.of_seconds([i / 1000 for i in range(101)])
    assert (values.mean, values.median, values.p90, values.p95, values.p99, values.max) == (
        pytest.approx((50.0, 50.0, 90.0, 95.0, 99.0, 100.0))
    )
    assert values.std == pytest.approx(29.1547595)
    assert Distribution.of_seconds([]) == Distribution()


def test_a_chunk_gap_is_divided_among_its_tokens() -> None:
    several = record(ttft_s=0.2, gaps=((0.03, 1), (0.09, 3)))
    assert several.token_latencies_s() == pytest.approx([0.03, 0.03, 0.03, 0.03])
    assert several.tpot_s == pytest.approx(0.12 / 4)


def test_one_token_has_no_tpot() -> None:
    assert record().tpot_s is None
    assert summarise([record()], 1.0).tpot == Distribution()


def test_summary_counts_only_what_completed() -> None:
    records = [
        record(0.0, 0.1, ((0.1, 2), (0.2, 2))),  # 5 tokens, 0.4 s
        record(0.2, 0.3, ((0.1, 1),), prompt_tokens=30),  # 2 tokens, 0.4 s
        record(0.0, 9.0, prompt_tokens=999, error="HTTP 503"),
    ]
    summary = summarise(records, 2.0)
    assert (summary.completed, summary.failed) == (2, 1)
    assert (summary.input_tokens, summary.output_tokens) == (40, 7)
    assert summary.request_throughput == 1.0
    assert summary.input_throughput == 20.0
    assert summary.output_throughput == 3.5
    assert summary.total_throughput == 23.5
    assert summary.ttft.mean == pytest.approx(200.0)
    assert summary.tpot.mean == pytest.approx((75.0 + 100.0) / 2)
    assert summary.itl.max == pytest.approx(100.0)
    assert summary.concurrency == pytest.approx(0.8 / 2.0)
    assert summary.max_concurrent_requests == 2


def test_requests_that_touch_do_not_overlap() -> None:
    assert summarise([record(0.0, 0.5), record(0.5, 0.5)], 1.0).max_concurrent_requests == 1


def test_peak_token_rate_is_by_seconds_from_the_first_request() -> None:
    # From 100 s on: 2 tokens in the first second, 5 in the second.
    records = [record(100.0, 0.5, ((0.4, 1), (0.3, 4))), record(100.9, 0.2)]
    assert summarise(records, 2.0).max_output_tokens_per_s == 5


def test_cached_tokens_by_turn() -> None:
    records = [
        record(turn=0, prompt_tokens=100, cached_tokens=0),
        record(turn=1, prompt_tokens=200, cached_tokens=150),
        record(turn=1, prompt_tokens=300, cached_tokens=250),
    ]
    turns = summarise(records, 1.0).cached_by_turn
    assert turns is not None
    assert [(t.turn, t.requests, t.prompt_tokens, t.cached_tokens) for t in turns] == [
        (0, 1, 100, 0),
        (1, 2, 500, 400),
    ]
    assert summarise([record()], 1.0).cached_by_turn is None


def test_goodput_needs_every_objective_and_counts_failures_as_misses() -> None:
    records = [
        record(ttft_s=0.2, gaps=((0.05, 1),)),  # good
        record(ttft_s=0.4, gaps=((0.05, 1),)),  # late first token
        record(ttft_s=0.2, gaps=((0.3, 1),)),  # slow tokens
        record(ttft_s=0.2),  # one token: no TPOT to miss
        record(ttft_s=0.0, error="HTTP 503"),
    ]
    goodput = evaluate(records, Objectives(ttft_ms=300, tpot_ms=100), duration_s=2.0)
    assert goodput.request_goodput == 1.0
    assert goodput.attainment == pytest.approx(2 / 5)
    assert goodput.attainment_by_metric == pytest.approx({"ttft": 3 / 5, "tpot": 3 / 5})
    assert goodput.objectives.as_json() == {"ttft": 300, "tpot": 100}


def test_an_objective_is_met_at_its_bound() -> None:
    exact = record(ttft_s=0.5)
    assert evaluate([exact], Objectives(e2el_ms=500), 1.0).attainment == 1.0
    assert evaluate([exact], Objectives(e2el_ms=499.9), 1.0).attainment == 0.0


def test_first_token_deadline_grows_with_uncached_tokens() -> None:
    both = Objectives(ttft_ms=300, ttft_per_token_ms=1)
    cached = record(ttft_s=0.5, prompt_tokens=1000, cached_tokens=900)  # deadline 300 ms
    uncached = record(ttft_s=0.5, prompt_tokens=1000, cached_tokens=0)  # deadline 1000 ms
    unknown = record(ttft_s=0.5, prompt_tokens=1000)
    goodput = evaluate([cached, uncached, unknown], both, 1.0)
    assert goodput.attainment_by_metric == pytest.approx({"ttft": 2 / 3})
    alone = Objectives(ttft_per_token_ms=0.4)
    assert evaluate([uncached], alone, 1.0).attainment_by_metric == {"ttft": 0.0}


def test_gap_percentile_sees_the_whole_gap_of_a_chunk() -> None:
    bursty = record(gaps=((0.2, 10),))
    assert bursty.token_latencies_s() == pytest.approx([0.02] * 10)
    assert request_gap_p99_ms(bursty) == pytest.approx(200.0)
    assert evaluate([bursty], Objectives(itl_p99_ms=60), 1.0).attainment == 0.0
    assert evaluate([bursty], Objectives(tpot_ms=60), 1.0).attainment == 1.0
    assert request_gap_p99_ms(record()) == 0.0


def test_requests_in_flight_are_counted_second_by_second() -> None:
    records = [record(100.0, 0.5, ((0.4, 1), (0.3, 4))), record(100.9, 0.2), record(103.5, 0.2)]
    assert in_flight_by_second(records) == [2, 2, 0, 1]
    assert in_flight_by_second([]) == []
