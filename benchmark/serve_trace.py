"""Replays a trace against a fresh server, once for each rate, and appends a JSON line for each.

    python -m benchmark.serve_trace --model benchmark/models/llama-3.1-8b --trace TRACE.jsonl.gz \\
        --rate 1 --seconds 60 --out benchmark/results/serving_h100.jsonl

The load comes from `python -m sglang.bench_serving`, as a user would run it. Weights are random
(--load-format dummy): times do not depend on them. Server flags follow a bare `--`.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmark.command_line import command_line
from benchmark.server_process import ServerProcess
from benchmark.trace_load import (
    LaneUse,
    LoadError,
    TraceLoad,
    client_flags,
    internal_state,
    model_flags,
    run_bench,
    vocab_size,
)
from sglang.srt.benchmarks.environment import describe

START_LIMIT_S = 300.0
STOP_LIMIT_S = 60.0
# Long enough for the slowest answers of the last arrivals.
DRAIN_LIMIT_S = 300.0
WARM_UP_REQUESTS = 4


def run(
    model: Path, loads: Sequence[TraceLoad], server_flags: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """Each measured load as one JSON object, one after the other on one server, whose cache is
    emptied before each. Raises ServerError if the server fails, LoadError if the client does."""
    flags = [*model_flags(model), *server_flags]
    server = ServerProcess(model, flags)
    try:
        ready_s = asyncio.run(server.wait_ready(START_LIMIT_S, lambda: None))
        client = client_flags(server.base_url, vocab_size(model))
        warm_up = ["--dataset-name=random-ids", f"--num-prompts={WARM_UP_REQUESTS}"]
        warm_up += ["--random-input-len=8192", "--random-output-len=16", "--random-range-ratio=1"]
        run_bench([*client, *warm_up], START_LIMIT_S)
        for load in loads:
            before = internal_state(server.base_url)["pd_multiplex"]
            result = run_bench(
                [*client, *load.bench_flags(), "--flush-cache"], load.seconds + DRAIN_LIMIT_S
            )
            if result["interrupted"]:
                raise LoadError(f"requests were left {DRAIN_LIMIT_S:.0f} s after the last arrival")
            after = internal_state(server.base_url)["pd_multiplex"]
            yield _row(model, load, flags, ready_s, result, before, after)
        server.stop(STOP_LIMIT_S)
    except Exception:
        print(server.log_tail(), file=sys.stderr)
        raise
    finally:
        server.kill()


def _row(
    model: Path,
    load: TraceLoad,
    flags: Sequence[str],
    ready_s: float,
    result: dict[str, Any],
    before: dict[str, Any],
    after: dict[str, Any],
) -> dict[str, Any]:
    lanes = LaneUse.between(before, after)
    metrics = {
        f"{name}_{statistic}_ms": result[f"{long_statistic}_{name}_ms"]
        for name in ("ttft", "tpot", "itl", "e2e_latency")
        for statistic, long_statistic in (("p50", "median"), ("p99", "p99"))
    }
    return {
        "benchmark": "serve_trace",
        "model": model.name,
        "workload": load.trace.name,
        "rate": load.rate,
        "seconds": load.seconds,
        "max_input_len": load.max_input_len,
        "min_turns": load.min_turns,
        "seed": load.seed,
        "slo": load.slo,
        "server_flags": list(flags),
        "ready_s": ready_s,
        "duration_s": result["duration"],
        "completed": result["completed"],
        "failed": result["failed"],
        "input_tokens": result["total_input_tokens"],
        "output_tokens": result["total_output_tokens"],
        "cache_report": result["cache_report"],
        "attainment": result["slo_attainment"],
        "attainment_by_metric": result["slo_attainment_by_metric"],
        "goodput": result["request_goodput"],
        **metrics,
        **asdict(lanes),
        "both_busy_share": lanes.both_busy_s / result["duration"],
        "environment": describe(),
    }


def summary(row: dict[str, Any]) -> str:
    """The row in a few lines for people."""
    cache = row["cache_report"]
    cached, prompt = cache["total_cached_tokens"], cache["total_prompt_tokens"]
    return "\n".join(
        [
            f"{row['model']} on {row['environment']['gpu']}: {row['workload']} at {row['rate']:g} "
            f"requests/s for {row['duration_s']:.0f} s",
            f"  {row['completed']} completed, {row['failed']} failed; "
            f"cached {cached} of {prompt} prompt tokens ({cached / prompt:.0%})",
            f"  TTFT p50 {row['ttft_p50_ms']:.0f} ms, p99 {row['ttft_p99_ms']:.0f} ms; "
            f"token gap p50 {row['itl_p50_ms']:.1f} ms, p99 {row['itl_p99_ms']:.1f} ms; "
            f"attainment {row['attainment']:.2f}",
            f"  prefill lane busy {row['prefill_busy_s']:.1f} s, decode lane "
            f"{row['decode_busy_s']:.1f} s, both at once {row['both_busy_s']:.1f} s "
            f"({row['both_busy_share']:.0%} of the run); fused steps {row['fused_busy_s']:.1f} s",
        ]
    )


def append(row: dict[str, Any], out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    parser = command_line("serve_trace", __doc__)
    parser.add_argument("--model", type=Path, required=True, help="folder with a config.json")
    parser.add_argument("--trace", type=Path, required=True, help="Mooncake trace, .jsonl[.gz]")
    parser.add_argument("--rate", type=float, nargs="+", default=[1.0], help="requests/s")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--max-input-len", type=int, default=32768)
    parser.add_argument("--min-turns", type=int, default=1, help="whole conversations only")
    parser.add_argument("--tbt-ms", type=float, default=50.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="JSON lines file to append to")
    parser.add_argument("server_flags", nargs="*", help="flags of the server, behind --")
    given = parser.parse_args(argv)
    loads = [
        TraceLoad(
            given.trace,
            rate,
            given.seconds,
            given.max_input_len,
            min_turns=given.min_turns,
            seed=given.seed,
            tbt_ms=given.tbt_ms,
        )
        for rate in given.rate
    ]
    for row in run(given.model, loads, given.server_flags):
        append(row, given.out)
        print(summary(row), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
