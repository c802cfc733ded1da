"""/metrics: counts of the HTTP process and the scheduler's state, as Prometheus's metric families.

Names are SGLang's where it has one for what we count; those about service levels, phases and
partitions are ours. Whatever the scheduler does not tell is left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
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

from sglang.srt.observability.http_traffic import HttpTraffic
from sglang.srt.observability.request_metrics import Histogram, RequestMetrics

_PREFIX = "sglang:"
# (key in the state, name, help)
_STATE_GAUGES = (
    ("running_requests", "num_running_reqs", "Requests in prefill or decode."),
    ("waiting_requests", "num_queue_reqs", "Requests that wait."),
    ("used_tokens", "num_used_tokens", "Tokens of the KV pool in use."),
    ("token_usage", "token_usage", "Share of the KV pool in use."),
    ("token_usage", "full_token_usage", "The same: there is one pool."),
    ("used_tokens", "kv_used_tokens", "Tokens of the KV pool in use."),
    ("available_tokens", "kv_available_tokens", "Tokens of the KV pool that are free."),
    ("evictable_tokens", "kv_evictable_tokens", "Tokens of cached prefixes that may go."),
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
_STATE_COUNTERS = (
    (
        "retractions",
        "num_retracted_requests",
        "Times that a request gave its memory back and started anew.",
    ),
    ("evicted_tokens", "evicted_tokens", "Tokens of cached prefixes given up for others."),
)
_INFO_GAUGES = (("max_total_num_tokens", "max_total_num_tokens", "Size of the KV pool in tokens."),)
_SERVER_GAUGES = (
    ("context_len", "context_len", "Longest sequence in tokens."),
    ("page_size", "page_size", "Tokens in a page of the KV pool."),
    ("num_pages", "num_pages", "Pages of the KV pool."),
    ("startup_s", "engine_startup_time", "Seconds from the start until requests were taken."),
)
_PHASES = ("prefill", "decode", "both", "fused")
_CATEGORIES = {"extend": "prefill_busy_s", "decode": "decode_busy_s"}
_LIMITS = {"ttft": "met_ttft", "tbt": "met_tbt", "both": "met"}


@dataclass(frozen=True, slots=True)
class ServerFacts:
    """What the HTTP process knows of the server. cpu_s: by process. None is left out."""

    context_len: int
    page_size: int
    num_pages: int | None
    startup_s: float | None
    cpu_s: Mapping[str, float]
    traffic: HttpTraffic


def exposition(
    requests: RequestMetrics,
    state: Mapping[str, Any],
    info: Mapping[str, Any],
    *,
    model_name: str,
    accept: str,
    server: ServerFacts | None = None,
) -> tuple[bytes, str]:
    """Body and content type of a scrape.

    state: the scheduler's, see Scheduler; info: what it said at start. accept: the header, which
    says whether the scraper reads OpenMetrics.
    """
    registry = CollectorRegistry()
    registry.register(_Snapshot(requests, state, info, model_name, server))
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
        server: ServerFacts | None,
    ) -> None:
        self._requests = requests
        self._state = state
        self._info = info
        self._model_name = model_name
        self._server = server

    def collect(self) -> Iterator[Metric]:
        yield from self._of_requests()
        for table, values in ((_STATE_GAUGES, self._state), (_INFO_GAUGES, self._info)):
            for key, name, text in table:
                if key in values:
                    yield self._gauge(name, text, values[key])
        for key, name, text in _STATE_COUNTERS:
            if key in self._state:
                yield self._counter(name, text, self._state[key])
        if self._server is not None:
            yield from self._of_server(self._server)
        yield self._counters(
            "realtime_tokens",
            "Tokens, counted as they are computed or found in the prefix cache.",
            ("mode",),
            [((mode,), count) for mode, count in self._state.get("realtime_tokens", {}).items()],
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

    def _of_server(self, server: ServerFacts) -> Iterator[Metric]:
        for field, name, text in _SERVER_GAUGES:
            value = getattr(server, field)
            if value is not None:
                yield self._gauge(name, text, value)
        yield self._counters(
            "process_cpu_seconds",
            "Processor time of each process.",
            ("component",),
            [((component,), seconds) for component, seconds in server.cpu_s.items()],
        )
        traffic = server.traffic
        yield self._counters(
            "http_requests",
            "Requests that have been answered, or are being.",
            ("endpoint", "method"),
            traffic.requests.items(),
        )
        yield self._counters(
            "http_responses",
            "Responses begun.",
            ("endpoint", "status_code", "method"),
            traffic.responses.items(),
        )
        active = GaugeMetricFamily(
            _PREFIX + "http_requests_active",
            "Requests whose response is not complete.",
            labels=["model_name", "method"],
        )
        for method, count in traffic.active.items():
            active.add_metric([self._model_name, method], count)
        yield active

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
        yield self._histogram(
            "prompt_tokens_histogram", "Prompt tokens of each request.", seen.prompt_lengths
        )
        yield self._histogram(
            "uncached_prompt_tokens_histogram",
            "Of those, tokens that were not in the prefix cache.",
            seen.uncached_lengths,
        )
        yield self._histogram(
            "generation_tokens_histogram", "Tokens generated for each.", seen.answer_lengths
        )

    def _of_lanes(self, lanes: Mapping[str, Any]) -> Iterator[Metric]:
        busy_s = [((phase,), lanes.get(f"{phase}_busy_s")) for phase in _PHASES]
        yield self._counters(
            "forward_execution_seconds",
            "Time in which work of a phase was in progress.",
            ("category",),
            [((category,), lanes[key]) for category, key in _CATEGORIES.items() if key in lanes],
        )
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
