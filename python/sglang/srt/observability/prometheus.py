"""/metrics: counts of the HTTP process and the scheduler's state, as Prometheus's metric families.

Names are SGLang's where it has one for what we count; those about service levels, phases and
partitions are ours. Whatever the scheduler does not tell is left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from sglang.srt.observability.request_metrics import Histogram, RequestMetrics

_PREFIX = "sglang:"
# (key in the state, name, help)
_STATE_GAUGES = (
    ("running_requests", "num_running_reqs", "Requests in prefill or decode."),
    ("waiting_requests", "num_queue_reqs", "Requests that wait."),
    ("used_tokens", "num_used_tokens", "Tokens of the KV pool in use."),
    ("token_usage", "token_usage", "Share of the KV pool in use."),
    ("last_gen_throughput", "gen_throughput", "Tokens a second, as in the last log line."),
)
# (key in the state's grammars, name, help)
_GRAMMAR_COUNTERS = (
    ("asked", "num_grammar", "Requests with a grammar."),
    ("cache_hits", "num_grammar_cache_hit", "Of them, those whose grammar was known."),
    ("aborted", "num_grammar_aborted", "Requests that ended while their grammar was compiled."),
    ("timed_out", "num_grammar_timeout", "Grammars whose compilation was given up."),
    ("failed", "num_grammar_failed", "Grammars that the library refused."),
    ("compile_s", "grammar_compilation_seconds", "Time that compilation took."),
)
_INFO_GAUGES = (("max_total_num_tokens", "max_total_num_tokens", "Size of the KV pool in tokens."),)
_PHASES = ("prefill", "decode", "both", "fused")
_LIMITS = {"ttft": "met_ttft", "tbt": "met_tbt", "both": "met"}


def exposition(
    requests: RequestMetrics,
    state: Mapping[str, Any],
    info: Mapping[str, Any],
    *,
    model_name: str,
    accept: str,
) -> tuple[bytes, str]:
    """Body and content type of a scrape.

    state: the scheduler's, see Scheduler; info: what it said at start. accept: the header, which
    says whether the scraper reads OpenMetrics.
    """
    registry = CollectorRegistry()
    registry.register(_Snapshot(requests, state, info, model_name))
    encode, content_type = choose_encoder(accept)
    return encode(registry), content_type


class _Snapshot(Collector):
    """Makes the families when asked. Every sample has the label model_name."""

    def __init__(
        self,
        requests: RequestMetrics,
        state: Mapping[str, Any],
        info: Mapping[str, Any],
        model_name: str,
    ) -> None:
        self._requests = requests
        self._state = state
        self._info = info
        self._model_name = model_name

    def collect(self) -> Iterator[Metric]:
        yield from self._of_requests()
        for table, values in ((_STATE_GAUGES, self._state), (_INFO_GAUGES, self._info)):
            for key, name, text in table:
                if key in values:
                    yield self._gauge(name, text, values[key])
        if "retractions" in self._state:
            yield self._counter(
                "num_retractions",
                "Times that a request gave its memory back and started anew.",
                self._state["retractions"],
            )
        yield from self._of_grammars(self._state.get("grammars", {}))
        yield from self._of_lanes(self._state.get("pd_multiplex", {}))
        if "slo" in self._state:
            yield from self._of_slo(self._state["slo"])

    def _of_grammars(self, grammars: Mapping[str, Any]) -> Iterator[Metric]:
        if "waiting" in grammars:
            text = "Requests that wait for their grammar."
            yield self._gauge("num_grammar_queue_reqs", text, grammars["waiting"])
        for key, name, text in _GRAMMAR_COUNTERS:
            if key in grammars:
                yield self._counter(name, text, grammars[key])

    def _of_requests(self) -> Iterator[Metric]:
        seen = self._requests
        yield self._counter("num_requests", "Requests that have finished.", seen.finished)
        yield self._counter(
            "num_aborted_requests", "Requests refused, or left by their client.", seen.aborted
        )
        yield self._counter("prompt_tokens", "Prompt tokens of them.", seen.prompt_tokens)
        yield self._counter(
            "cached_tokens", "Of those, tokens found in the prefix cache.", seen.cached_tokens
        )
        yield self._counter("generation_tokens", "Tokens generated.", seen.generation_tokens)
        if seen.prompt_tokens:
            yield self._gauge(
                "cache_hit_rate",
                "Share of the prompt tokens found in the prefix cache, since the start.",
                seen.cached_tokens / seen.prompt_tokens,
            )
        yield self._histogram(
            "time_to_first_token_seconds", "From a request's arrival on.", seen.ttft_s
        )
        yield self._histogram(
            "inter_token_latency_seconds", "Between two tokens of a request.", seen.inter_token_s
        )
        yield self._histogram(
            "request_time_per_output_token_seconds",
            "Mean of each request, first token apart.",
            seen.per_output_token_s,
        )
        yield self._histogram(
            "e2e_request_latency_seconds", "From a request's arrival to its end.", seen.e2e_s
        )

    def _of_lanes(self, lanes: Mapping[str, Any]) -> Iterator[Metric]:
        busy_s = [((phase,), lanes.get(f"{phase}_busy_s")) for phase in _PHASES]
        yield self._counters(
            "phase_busy_seconds",
            "Time in which work of a phase was in progress; of both at once; of fused steps.",
            ("phase",),
            [(labels, value) for labels, value in busy_s if value is not None],
        )
        yield self._counters(
            "partition_launches",
            "Pieces of work by the SMs that each phase was given.",
            ("prefill_sms", "decode_sms", "exclusive"),
            [
                (
                    (str(p["prefill_sms"]), str(p["decode_sms"]), str(p["exclusive"]).lower()),
                    p["launches"],
                )
                for p in lanes.get("partitions", ())
            ],
        )

    def _of_slo(self, slo: Mapping[str, Any]) -> Iterator[Metric]:
        window = slo["window"]
        if window["attainment"] is not None:
            yield self._gauge(
                "slo_attainment",
                "Share of requests that met their SLO, of those finished in the last minute.",
                window["attainment"],
            )
        yield self._gauge(
            "slo_goodput",
            "Requests a second that met their SLO, in the last minute.",
            window["goodput_rps"],
        )
        classes = slo["classes"].items()
        yield self._counters(
            "slo_finished_requests",
            "Requests that have finished.",
            ("slo_class",),
            [((name,), counts["finished"]) for name, counts in classes],
        )
        yield self._counters(
            "slo_met_requests",
            "Of those, requests that met their limit for the first token, for the others, or both.",
            ("slo_class", "limit"),
            [
                ((name, limit), counts[key])
                for name, counts in classes
                for limit, key in _LIMITS.items()
            ],
        )
        yield self._counters(
            "slo_shed_requests",
            "Requests refused for want of room or of time.",
            ("slo_class",),
            [((name,), counts["shed"]) for name, counts in classes],
        )

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(_PREFIX + name, text, labels=["model_name"])
        family.add_metric([self._model_name], value)
        return family

    def _counter(self, name: str, text: str, value: float) -> Metric:
        return self._counters(name, text, (), [((), value)])

    def _counters(
        self,
        name: str,
        text: str,
        labels: tuple[str, ...],
        samples: Iterable[tuple[tuple[str, ...], float]],
    ) -> Metric:
        """Their names end in _total when they are written."""
        family = CounterMetricFamily(_PREFIX + name, text, labels=["model_name", *labels])
        for values, value in samples:
            family.add_metric([self._model_name, *values], value)
        return family

    def _histogram(self, name: str, text: str, histogram: Histogram) -> Metric:
        buckets: list[tuple[str, float]] = []
        total = 0
        for bound, count in zip((*histogram.bounds, None), histogram.counts, strict=True):
            total += count
            buckets.append(("+Inf" if bound is None else str(float(bound)), total))
        family = HistogramMetricFamily(_PREFIX + name, text, labels=["model_name"])
        family.add_metric([self._model_name], buckets, histogram.sum)
        return family
