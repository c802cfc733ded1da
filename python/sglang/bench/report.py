"""The table printed at the end, under the labels that scripts look for."""

from __future__ import annotations

import math
from collections.abc import Sequence

import orjson

from sglang.bench.goodput import Goodput
from sglang.bench.metrics import Distribution, Summary
from sglang.bench.options import BenchOptions
from sglang.bench.records import RequestRecord
from sglang.bench.runner import LoadRun

_WIDTH = 56
_LABEL_WIDTH = 42
_ERRORS_SHOWN = 5


def render(
    options: BenchOptions,
    run: LoadRun,
    summary: Summary,
    goodput: Goodput | None,
    *,
    retokenized: int | None,
    accept_length: float | None,
) -> str:
    """Several lines without a final newline."""
    concurrency_limit = "not set" if options.max_concurrency is None else options.max_concurrency
    lines = [
        _rule("=", " Serving Benchmark Result "),
        _row("Backend:", options.backend),
        _row("Traffic request rate:", _rate(options)),
        _row("Max request concurrency:", concurrency_limit),
        _row("Successful requests:", summary.completed),
        _row("Failed requests:", summary.failed),
        _row("Benchmark duration (s):", summary.duration_s),
        _row("Total input tokens:", summary.input_tokens),
        _row("Total generated tokens:", summary.output_tokens),
        _row(
            "Total generated tokens (retokenized):",
            "no tokenizer" if retokenized is None else retokenized,
        ),
        _row("Request throughput (req/s):", summary.request_throughput),
        _row("Input token throughput (tok/s):", summary.input_throughput),
        _row("Output token throughput (tok/s):", summary.output_throughput),
        _row("Peak output token throughput (tok/s):", summary.max_output_tokens_per_s),
        _row("Peak concurrent requests:", summary.max_concurrent_requests),
        _row("Total token throughput (tok/s):", summary.total_throughput),
        _row("Concurrency:", summary.concurrency),
        _row("Max client start lag (ms):", run.max_start_lag_s * 1e3),
    ]
    if accept_length is not None:
        lines.append(_row("Accept length:", accept_length))
    for title, label, distribution in (
        ("End-to-End Latency", "E2E Latency", summary.e2e_latency),
        ("Time to First Token", "TTFT", summary.ttft),
        ("Time per Output Token (excl. 1st token)", "TPOT", summary.tpot),
        ("Inter-Token Latency", "ITL", summary.itl),
    ):
        lines += _distribution_rows(title, label, distribution)
    lines.append(_row("Max ITL (ms):", summary.itl.max))
    if goodput is not None:
        lines += _goodput_rows(goodput)
    lines += _cache_rows(options, summary)
    lines.append("=" * _WIDTH)
    return "\n".join(lines)


def request_line(record: RequestRecord) -> str:
    """What --print-requests says of a request, as JSON."""
    answer = record.answer
    fields = {
        "conversation": record.conversation,
        "turn": record.turn,
        "prompt_tokens": record.prompt_tokens,
        "output_tokens": answer.output_tokens,
        "ttft_s": answer.ttft_s,
        "latency_s": answer.latency_s,
        "text": answer.text,
        "error": answer.error,
    }
    return orjson.dumps(fields).decode()


def render_failures(run: LoadRun) -> str:
    """The first different errors of failed requests; empty when none failed."""
    errors = [record.answer.error for record in run.records if not record.ok]
    if not errors:
        return ""
    distinct = list(dict.fromkeys(errors))
    lines = [f"{len(errors)} requests failed. First errors:"]
    lines += [f"  {errors.count(error)} x {error}" for error in distinct[:_ERRORS_SHOWN]]
    return "\n".join(lines)


def _distribution_rows(title: str, label: str, values: Distribution) -> Sequence[str]:
    return [
        _rule("-", title),
        _row(f"Mean {label} (ms):", values.mean),
        _row(f"Median {label} (ms):", values.median),
        _row(f"P90 {label} (ms):", values.p90),
        _row(f"P95 {label} (ms):", values.p95),
        _row(f"P99 {label} (ms):", values.p99),
    ]


def _goodput_rows(goodput: Goodput) -> list[str]:
    bounds = " ".join(f"{name}:{ms:g}" for name, ms in goodput.objectives.as_json().items())
    rows = [
        _rule("-", "Goodput"),
        _row("SLOs (ms):", bounds),
        _row("Request goodput (req/s):", goodput.request_goodput),
        _row("SLO attainment (%):", goodput.attainment * 100),
    ]
    for name, attainment in goodput.attainment_by_metric.items():
        rows.append(_row(f"SLO attainment, {name} (%):", attainment * 100))
    return rows


def _cache_rows(options: BenchOptions, summary: Summary) -> list[str]:
    turns = summary.cached_by_turn
    if turns is None:
        if not options.cache_report:
            return []
        missing = "not reported; start the server with --enable-cache-report"
        return [_rule("-", "Prefix Cache"), f"Cached tokens: {missing}"]
    cached = sum(turn.cached_tokens for turn in turns)
    share = _share(cached, summary.input_tokens)
    rows = [
        _rule("-", "Prefix Cache"),
        f"Cached tokens: {cached} of {summary.input_tokens} prompt tokens ({share})",
    ]
    if options.cache_report or len(turns) > 1:
        rows += [
            f"  turn {turn.turn + 1}: {turn.cached_tokens} of {turn.prompt_tokens} "
            f"({_share(turn.cached_tokens, turn.prompt_tokens)}), {turn.requests} requests"
            for turn in turns
        ]
    return rows


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole if whole else 0.0:.1f} %"


def _rate(options: BenchOptions) -> str:
    if options.use_trace_timestamps:
        return "trace"
    return "inf" if math.isinf(options.request_rate) else f"{options.request_rate:g}"


def _rule(mark: str, title: str) -> str:
    return title.center(_WIDTH, mark)


def _row(label: str, value: str | int | float) -> str:
    text = f"{value:.2f}" if isinstance(value, float) else str(value)
    return f"{label:<{_LABEL_WIDTH}} {text}"
