"""The JSON line of a run: SGLang's keys, and a few of our own beside them."""

from __future__ import annotations

import math
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

import orjson

from sglang.bench.goodput import Goodput, request_gap_p99_ms
from sglang.bench.metrics import Summary
from sglang.bench.options import BenchOptions
from sglang.bench.runner import LoadRun

_STATISTICS = ("mean", "median", "std", "p90", "p95", "p99")


def result_of(
    options: BenchOptions,
    run: LoadRun,
    summary: Summary,
    goodput: Goodput | None,
    *,
    retokenized: int | None,
    server_info: dict[str, Any] | None,
) -> dict[str, Any]:
    """retokenized: the answers' texts counted by our tokenizer; None without one."""
    result: dict[str, Any] = {
        "tag": options.tag,
        "backend": options.backend,
        "dataset_name": options.dataset_name,
        "request_rate": _rate(options),
        "max_concurrency": options.max_concurrency,
        "sharegpt_output_len": options.text_file.output_len,
        "random_input_len": options.random.input_len,
        "random_output_len": options.random.output_len,
        "random_range_ratio": options.random.range_ratio,
        "seed": options.seed,
        "server_info": server_info,
        "duration": summary.duration_s,
        "completed": summary.completed,
        "failed": summary.failed,
        "interrupted": run.interrupted,
        "client_max_start_lag_ms": run.max_start_lag_s * 1e3,
        "total_input_tokens": summary.input_tokens,
        "total_input_text_tokens": summary.input_tokens,
        "total_input_vision_tokens": 0,
        "total_output_tokens": summary.output_tokens,
        "total_output_tokens_retokenized": retokenized,
        "request_throughput": summary.request_throughput,
        "input_throughput": summary.input_throughput,
        "output_throughput": summary.output_throughput,
        "total_throughput": summary.total_throughput,
        "concurrency": summary.concurrency,
        "accept_length": accept_length(server_info),
        "max_output_tokens_per_s": summary.max_output_tokens_per_s,
        "max_concurrent_requests": summary.max_concurrent_requests,
    }
    for name in ("e2e_latency", "ttft", "tpot", "itl"):
        distribution = getattr(summary, name)
        for statistic in _STATISTICS:
            result[f"{statistic}_{name}_ms"] = getattr(distribution, statistic)
    result["max_itl_ms"] = summary.itl.max
    if goodput is not None:
        result["goodput_slos_ms"] = goodput.objectives.as_json()
        result["request_goodput"] = goodput.request_goodput
        result["slo_attainment"] = goodput.attainment
        result["slo_attainment_by_metric"] = goodput.attainment_by_metric
    if options.cache_report:
        result["cache_report"] = _cache_report(summary)
    if options.output_details:
        result.update(_details(run))
    return result


def append_result(options: BenchOptions, result: dict[str, Any], today: date) -> Path:
    """Appends one line; the file is --output-file or default_name(). Raises OSError."""
    path = Path(options.output_file or default_name(options, today))
    with path.open("ab") as file:
        file.write(orjson.dumps(result, option=orjson.OPT_APPEND_NEWLINE))
    return path


def default_name(options: BenchOptions, today: date) -> str:
    """<backend>_<MMDD>_<prompts>_<lengths or data set>.jsonl; prompts is "all" without a limit."""
    if options.dataset_name == "random-ids":
        what = f"{options.random.input_len}_{options.random.output_len}"
        prompts: int | str = options.num_prompts or 1000
    else:
        what = options.dataset_name
        prompts = options.num_prompts or "all"
    return f"{options.backend}_{today:%m%d}_{prompts}_{what}.jsonl"


def accept_length(server_info: dict[str, Any] | None) -> float | None:
    """Mean accepted tokens a step of speculative decoding, if the server reports one."""
    states = (server_info or {}).get("internal_states")
    if not isinstance(states, list) or not states or not isinstance(states[0], dict):
        return None
    value = states[0].get("avg_spec_accept_length")
    return float(value) if isinstance(value, int | float) else None


def _rate(options: BenchOptions) -> float | str:
    """JSON has no infinity: "inf", which float() reads back, or "trace"."""
    if options.use_trace_timestamps:
        return "trace"
    return "inf" if math.isinf(options.request_rate) else options.request_rate


def _cache_report(summary: Summary) -> dict[str, Any] | None:
    """None when no answer said how much of its prompt was cached."""
    if summary.cached_by_turn is None:
        return None
    cached = sum(turn.cached_tokens for turn in summary.cached_by_turn)
    return {
        "total_prompt_tokens": summary.input_tokens,
        "total_cached_tokens": cached,
        "cache_hit_rate": cached / summary.input_tokens if summary.input_tokens else 0.0,
        "by_turn": [asdict(turn) for turn in summary.cached_by_turn],
    }


def _details(run: LoadRun) -> dict[str, list[Any]]:
    """One entry a request, in order of conversation and turn; times in seconds.

    start_times are counted from the start of the run, as are due_times, when the request's
    conversation was to begin.
    """
    records = run.records
    return {
        "conversations": [record.conversation for record in records],
        "turns": [record.turn for record in records],
        "due_times": [record.due_s for record in records],
        "start_times": [record.answer.start_s - run.begin_s for record in records],
        "input_lens": [record.prompt_tokens for record in records],
        "cached_tokens": [record.answer.cached_tokens for record in records],
        "output_lens": [record.answer.output_tokens for record in records],
        "ttfts": [record.answer.ttft_s for record in records],
        "latencies": [record.answer.latency_s for record in records],
        "itls": [record.token_latencies_s() for record in records],
        "itl_p99s_ms": [request_gap_p99_ms(record) for record in records],
        "generated_texts": [record.answer.text for record in records],
        "errors": [record.answer.error for record in records],
    }
