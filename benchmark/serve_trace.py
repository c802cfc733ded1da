"""Replays a trace against a fresh server, once for each rate, and appends a JSON line for each.

    python -m benchmark.serve_trace --model benchmark/models/llama-3.1-8b --trace TRACE.jsonl.gz \\
        --rate 1 --seconds 60 --out benchmark/results/serving_h100.jsonl

The load comes from `python -m sglang.bench_serving`, as a user would run it. Weights are random
(--load-format dummy): times do not depend on them. Server flags follow a bare `--`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmark.server_process import ServerProcess
from sglang.srt.benchmarks.environment import describe

START_LIMIT_S = 300.0
STOP_LIMIT_S = 60.0
# Long enough for the slowest answers of the last arrivals.
DRAIN_LIMIT_S = 300.0
VOCAB_SIZE_MARGIN = 256  # special tokens sit at the end of the vocabulary
WARM_UP_REQUESTS = 4


@dataclass(frozen=True, slots=True)
class TraceLoad:
    """rate: requests/s, Poisson, for about `seconds`; inputs longer than max_input_len are left
    out. min_turns: above 1, only whole conversations of at least so many turns are replayed.
    tbt_ms and the TTFT limits are the service level that attainment is counted against."""

    trace: Path
    rate: float
    seconds: float
    max_input_len: int
    min_turns: int = 1
    seed: int = 0
    ttft_ms: float = 1000.0
    ttft_ms_per_token: float = 0.5
    tbt_ms: float = 50.0

    def bench_flags(self) -> list[str]:
        return [
            "--dataset-name=mooncake",
            f"--dataset-path={self.trace}",
            f"--mooncake-max-input-len={self.max_input_len}",
            f"--mooncake-min-turns={self.min_turns}",
            f"--request-rate={self.rate}",
            f"--num-prompts={round(self.rate * self.seconds)}",
            f"--seed={self.seed}",
            "--goodput",
            f"ttft:{self.ttft_ms}",
            f"ttft_per_token:{self.ttft_ms_per_token}",
            f"itl_p99:{self.tbt_ms}",
        ]


def run(
    model: Path, loads: Sequence[TraceLoad], server_flags: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """Each measured load as one JSON object, one after the other on one server, whose cache is
    emptied before each. Raises ServerError if the server fails."""
    vocab_size = json.loads((model / "config.json").read_text())["vocab_size"]
    flags = ["--load-format=dummy", "--skip-tokenizer-init", *server_flags]
    server = ServerProcess(model, flags)
    try:
        ready_s = asyncio.run(server.wait_ready(START_LIMIT_S, lambda: None))
        client = ["--backend=sglang", f"--base-url={server.base_url}", "--tokenize-prompt"]
        client += [f"--vocab-size={vocab_size - VOCAB_SIZE_MARGIN}"]
        warm_up = ["--dataset-name=random-ids", f"--num-prompts={WARM_UP_REQUESTS}"]
        warm_up += ["--random-input-len=8192", "--random-output-len=16", "--random-range-ratio=1"]
        _bench([*client, *warm_up], START_LIMIT_S)
        for load in loads:
            before = _lanes(server.base_url)
            result = _bench(
                [*client, *load.bench_flags(), "--flush-cache"], load.seconds + DRAIN_LIMIT_S
            )
            after = _lanes(server.base_url)
            yield _row(model, load, flags, ready_s, result, before, after)
        server.stop(STOP_LIMIT_S)
    except Exception:
        print(server.log_tail(), file=sys.stderr)
        raise
    finally:
        server.kill()


def _bench(flags: Sequence[str], limit_s: float) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "result.jsonl"
        command = [sys.executable, "-m", "sglang.bench_serving", *flags]
        command += ["--cache-report", "--output-file", str(output)]
        subprocess.run(command, check=True, timeout=limit_s)
        result: dict[str, Any] = json.loads(output.read_text().splitlines()[-1])
        return result


def _lanes(base_url: str) -> dict[str, Any]:
    with urllib.request.urlopen(f"{base_url}/server_info", timeout=30) as response:
        lanes: dict[str, Any] = json.load(response)["internal_states"][0]["pd_multiplex"]
        return lanes


def _row(
    model: Path,
    load: TraceLoad,
    flags: Sequence[str],
    ready_s: float,
    result: dict[str, Any],
    before: dict[str, Any],
    after: dict[str, Any],
) -> dict[str, Any]:
    busy_s = {
        name: after[name] - before[name]
        for name in ("prefill_busy_s", "decode_busy_s", "both_busy_s", "fused_busy_s")
    }
    launches = {
        _partition_name(new): new["launches"] - old["launches"]
        for old, new in zip(before["partitions"], after["partitions"], strict=True)
    }
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
        "slo": {
            "ttft_ms": load.ttft_ms,
            "ttft_ms_per_token": load.ttft_ms_per_token,
            "tbt_ms": load.tbt_ms,
        },
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
        **busy_s,
        "both_busy_share": busy_s["both_busy_s"] / result["duration"],
        "launches": launches,
        "environment": describe(),
    }


def _partition_name(partition: dict[str, Any]) -> str:
    if partition["exclusive"]:
        return "whole"
    return f"p{partition['prefill_sms']}/d{partition['decode_sms']}"


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
    parser = argparse.ArgumentParser(prog="python -m benchmark.serve_trace", description=__doc__)
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
