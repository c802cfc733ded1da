"""Metrics: what is counted of requests, and how a scraper reads it."""

from __future__ import annotations

from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from drift_scheduler.attainment import Attainment, Pace
from drift_scheduler.slo import Slo
from sglang.srt.managers.answers import Answer
from sglang.srt.managers.prompts import TokenizedPrompt
from sglang.srt.messages import FinishReason
from sglang.srt.observability.prometheus import exposition
from sglang.srt.observability.request_metrics import Histogram, RequestMetrics
from sglang.srt.sampling_params import SamplingParams
from sglang.srt.service_levels import NOTHING_ASKED, OWN_REQUEST, ServiceLevel

STOP = FinishReason(type="stop")


def answer(level: ServiceLevel = NOTHING_ASKED) -> Answer:
    prompt = TokenizedPrompt([1] * 10, SamplingParams(), "", level)
    return Answer(0, "r", "r", "r.1", prompt, started_s=100.0)


def news(
    metrics: RequestMetrics,
    of: Answer,
    now_s: float,
    tokens: int,
    finish: FinishReason | None = None,
) -> None:
    """What TokenizerManager does with an increment."""
    of.completion_tokens += tokens
    of.prompt_tokens, of.cached_tokens, of.finish = 10, 4, finish
    metrics.took(of, tokens, now_s)


def scrape(
    metrics: RequestMetrics, state: dict[str, Any] | None = None, info: dict[str, Any] | None = None
) -> dict[tuple[str, ...], float]:
    """(name, label values but the model's in order of the labels' names) -> value."""
    body, content_type = exposition(metrics, state or {}, info or {}, model_name="m", accept="")
    assert content_type.startswith("text/plain")
    samples = {}
    for family in text_string_to_metric_families(body.decode()):
        for sample in family.samples:
            labels = dict(sample.labels)
            assert labels.pop("model_name") == "m"
            samples[(sample.name, *(labels[key] for key in sorted(labels)))] = sample.value
    return samples


def test_a_histogram_counts_values_in_the_bucket_that_they_fit() -> None:
    histogram = Histogram((1, 2))
    for value in (0.5, 1, 1.5, 3):
        histogram.observe(value)
    histogram.observe(2, times=3)
    assert (histogram.counts, histogram.sum) == ([2, 4, 1], 12.0)


def test_the_times_of_a_request() -> None:
    metrics, one = RequestMetrics(), answer()
    news(metrics, one, 100.5, 1)
    news(metrics, one, 100.6, 1)
    news(metrics, one, 101.0, 4)
    news(metrics, one, 101.5, 0, STOP)
    assert metrics.ttft_s.sum == pytest.approx(0.5)
    assert sum(metrics.inter_token_s.counts) == 5
    assert metrics.inter_token_s.sum == pytest.approx(0.5)
    assert metrics.per_output_token_s.sum == pytest.approx(1.0 / 5)
    assert metrics.e2e_s.sum == pytest.approx(1.5)
    assert (metrics.finished, metrics.aborted, metrics.generation_tokens) == (1, 0, 6)
    assert (metrics.prompt_tokens, metrics.cached_tokens) == (10, 4)


def test_refused_and_left_requests_are_aborted_ones() -> None:
    metrics, refused, left = RequestMetrics(), answer(), answer()
    news(metrics, refused, 100.1, 0, FinishReason(type="abort", status_code=503))
    news(metrics, left, 100.2, 1)
    metrics.left(left)
    assert (metrics.finished, metrics.aborted, metrics.prompt_tokens) == (0, 2, 0)
    assert sum(metrics.e2e_s.counts) == 0


def test_the_server_s_own_requests_do_not_count() -> None:
    metrics, probe = RequestMetrics(), answer(OWN_REQUEST)
    news(metrics, probe, 100.1, 1, STOP)
    metrics.left(probe)
    assert (metrics.finished, metrics.aborted, metrics.generation_tokens) == (0, 0, 0)


def test_a_scrape_has_what_was_counted() -> None:
    metrics, one = RequestMetrics(), answer()
    news(metrics, one, 100.15, 1)
    news(metrics, one, 100.25, 1, STOP)
    got = scrape(metrics)
    assert got["sglang:num_requests_total",] == 1
    assert got["sglang:prompt_tokens_total",] == 10
    assert got["sglang:generation_tokens_total",] == 2
    assert got["sglang:cache_hit_rate",] == 0.4
    assert got["sglang:time_to_first_token_seconds_bucket", "0.1"] == 0
    assert got["sglang:time_to_first_token_seconds_bucket", "0.2"] == 1
    assert got["sglang:time_to_first_token_seconds_bucket", "+Inf"] == 1
    assert got["sglang:time_to_first_token_seconds_count",] == 1
    assert got["sglang:inter_token_latency_seconds_sum",] == pytest.approx(0.1)


def test_a_scrape_has_the_scheduler_s_state() -> None:
    attainment = Attainment(0.0)
    late, slo = Pace(0.0, 1.0), Slo(ttft_s=1.0, tbt_s=1.0)
    late.token(2.0)
    attainment.finish(late, slo, 1, "chat")
    attainment.finish(Pace(1.0, 1.0), slo, 1, "default")
    attainment.shed("chat")
    state = {
        "running_requests": 3,
        "waiting_requests": 2,
        "token_usage": 0.5,
        "retractions": 4,
        "slo": attainment.snapshot(10.0),
        "pd_multiplex": {
            "prefill_busy_s": 1.5,
            "both_busy_s": 0.5,
            "partitions": [
                {"prefill_sms": 52, "decode_sms": 80, "exclusive": False, "launches": 7}
            ],
        },
    }
    got = scrape(RequestMetrics(), state, {"max_total_num_tokens": 1000})
    assert got["sglang:num_running_reqs",] == 3
    assert got["sglang:num_queue_reqs",] == 2
    assert got["sglang:token_usage",] == 0.5
    assert got["sglang:max_total_num_tokens",] == 1000
    assert got["sglang:num_retractions_total",] == 4
    assert got["sglang:phase_busy_seconds_total", "prefill"] == 1.5
    assert ("sglang:phase_busy_seconds_total", "decode") not in got
    assert got["sglang:partition_launches_total", "80", "false", "52"] == 7
    assert got["sglang:slo_attainment",] == 0.5
    assert got["sglang:slo_goodput",] == pytest.approx(0.1)
    assert got["sglang:slo_finished_requests_total", "chat"] == 1
    assert got["sglang:slo_met_requests_total", "ttft", "chat"] == 0
    assert got["sglang:slo_met_requests_total", "tbt", "chat"] == 1
    assert got["sglang:slo_met_requests_total", "both", "default"] == 1
    assert got["sglang:slo_shed_requests_total", "chat"] == 1


def test_a_scrape_leaves_out_what_nobody_tells() -> None:
    names = {name for name, *_ in scrape(RequestMetrics())}
    assert "sglang:num_requests_total" in names
    assert not [name for name in names if "slo" in name or "running" in name or "hit_rate" in name]


def test_a_scraper_that_reads_open_metrics_gets_it() -> None:
    body, content_type = exposition(
        RequestMetrics(), {}, {}, model_name="m", accept="application/openmetrics-text"
    )
    assert content_type.startswith("application/openmetrics-text")
    assert body.endswith(b"# EOF\n")


def test_grammars_are_counted_by_upstreams_names() -> None:
    counts = {"asked": 9, "cache_hits": 4, "aborted": 1, "timed_out": 2, "failed": 3}
    samples = scrape(
        RequestMetrics(), {"grammars": {"waiting": 5, "compile_s": 1.5, "compiled": 2, **counts}}
    )
    assert samples[("sglang:num_grammar_queue_reqs",)] == 5
    assert samples[("sglang:num_grammar_total",)] == 9
    assert samples[("sglang:num_grammar_cache_hit_total",)] == 4
    assert samples[("sglang:num_grammar_aborted_total",)] == 1
    assert samples[("sglang:num_grammar_timeout_total",)] == 2
    assert samples[("sglang:num_grammar_failed_total",)] == 3
    assert samples[("sglang:grammar_compilation_seconds_total",)] == 1.5
