"""Compares scheduling policies: one server, one run, one machine; a JSON line for each window.

    python -m benchmark.policies --model benchmark/models/llama-3.1-8b \\
        --workload mooncake:TRACE.jsonl.gz tool_agent --policy adaptive static:84/48 chunked:512 \\
        --rate 1 2 3 --slo-tbt-ms 50 25 --seconds 60 --out benchmark/results/drift_h100.jsonl \\
        -- --context-length 40960

Starts one server with --enable-pd-multiplex and the flags behind `--`. For each workload and rate
every policy gets a window of the same requests at the same times, in shuffled order, and one for
each TBT if it heeds that: the policy is changed over POST /pd_multiplex/policy, a warm-up of other
prompts runs, the cache is emptied, the load runs. A request is good if its first token came within
max(--slo-ttft-ms, --slo-ttft-ms-per-token x uncached prompt tokens) and the 99th percentile of its
token gaps is no longer than the TBT: as `sglang.bench_serving --goodput` counts. Its body says so
to the server.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from benchmark.arguments import not_negative, positive, workload
from benchmark.command_line import command_line
from benchmark.host_pauses import HostWatch
from benchmark.policy_plan import Comparison
from benchmark.policy_run import Run, ServedModel, Target, server_flags
from benchmark.policy_table import Row, render
from benchmark.serve_trace import append
from benchmark.server_process import ServerError
from sglang.bench.errors import BenchError

_DESCRIBE = (
    "import json; from sglang.srt.benchmarks.environment import describe; "
    "print(json.dumps(describe()))"
)


def environment() -> dict[str, Any]:
    """describe() of a process of its own: one that asks CUDA keeps device memory."""
    done = subprocess.run(
        [sys.executable, "-c", _DESCRIBE], capture_output=True, text=True, check=True, timeout=120
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Exits with code 2 and the flag's name if one is wrong."""
    parser = command_line("policies", __doc__)
    parser.add_argument("--model", type=Path, required=True, help="folder with a config.json, GGUF")
    parser.add_argument(
        "--workload",
        nargs="+",
        type=workload,
        required=True,
        metavar="NAME",
        help="mooncake:FILE, sharegpt_lengths:FILE or tool_agent",
    )
    parser.add_argument("--policy", nargs="+", required=True, help="as the server names them")
    parser.add_argument("--rate", type=positive, nargs="+", default=[1.0], help="requests/s")
    parser.add_argument("--slo-tbt-ms", type=positive, nargs="+", default=[50.0])
    parser.add_argument("--slo-ttft-ms", type=positive, default=1000.0)
    parser.add_argument("--slo-ttft-ms-per-token", type=positive, default=0.5)
    parser.add_argument("--seconds", type=positive, default=60.0, help="of a window's arrivals")
    parser.add_argument("--warm-up-seconds", type=not_negative, default=10.0)
    parser.add_argument(
        "--drain-seconds",
        type=positive,
        default=60.0,
        help="after the last arrival; a request that has not ended by then is a miss (default: 60)",
    )
    parser.add_argument("--max-input-len", type=int, default=32768)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--budget-minutes",
        type=positive,
        help="leave out whole points from the end so that the run takes about so long",
    )
    parser.add_argument("--out", type=Path, required=True, help="JSON lines file to append to")
    parser.add_argument(
        "--timelines", type=Path, help="folder for what the lanes did in each window"
    )
    parser.add_argument("server_flags", nargs="*", help="flags of the server, behind --")
    given = parser.parse_args(argv)
    if given.timelines is not None:
        given.timelines.mkdir(parents=True, exist_ok=True)
    for name in ("policy", "workload", "rate", "slo_tbt_ms"):
        values = getattr(given, name)
        if len(set(values)) < len(values):
            parser.error(f"--{name.replace('_', '-')} names one twice")
    if given.seed < 0 or given.max_input_len < 1:
        parser.error("--seed must not be negative, --max-input-len at least 1")
    return given


def main(argv: Sequence[str] | None = None) -> int:
    """0 if every window that was planned has a result."""
    given = parse(argv)
    comparison = Comparison(
        workloads=tuple(given.workload),
        policies=tuple(given.policy),
        rates=tuple(given.rate),
        tbts_ms=tuple(given.slo_tbt_ms),
        seconds=given.seconds,
        warm_up_seconds=given.warm_up_seconds,
        drain_seconds=given.drain_seconds,
        max_input_len=given.max_input_len,
        ttft_ms=given.slo_ttft_ms,
        ttft_ms_per_token=given.slo_ttft_ms_per_token,
        seed=given.seed,
    )
    budget_s = None if given.budget_minutes is None else given.budget_minutes * 60
    try:
        comparison.check()
        if budget_s is not None:
            print(*comparison.budget_lines(budget_s), sep="\n", flush=True)
            if not comparison.fitting(budget_s):
                raise BenchError("--budget-minutes: not one point fits")
    except BenchError as error:
        print(error, file=sys.stderr)
        return 1
    rows, problem = _measure(given, comparison, budget_s)
    print("\n" + render(rows))
    failures = [line(row) for row in rows if "error" in row]
    if problem is not None:
        failures.append(f"after {len(rows)} windows: {problem}")
    print(*failures, sep="\n", file=sys.stderr)
    return 1 if failures else 0


def _measure(
    given: argparse.Namespace, comparison: Comparison, budget_s: float | None
) -> tuple[list[Row], ServerError | None]:
    """The rows, which are also in the file by then, and what ended the run early or badly."""
    flags = server_flags(given.model, given.server_flags)
    origin = {"model": given.model.name, "server_flags": flags, "environment": environment()}
    servers: list[ServedModel] = []

    def start() -> Target:
        for old in servers:
            old.kill()
        servers.append(ServedModel(given.model, flags))
        return servers[-1]

    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder, closing(HostWatch()) as host:
        run = Run(
            comparison,
            start,
            Path(folder),
            origin,
            host,
            timelines=given.timelines,
            budget_s=budget_s,
        )
        try:
            for row in run.rows(start()):
                append(row, given.out)
                rows.append(row)
                print(line(row), flush=True)
            servers[-1].stop()
        except ServerError as error:
            return rows, error
        finally:
            for server in servers:
                server.kill()
    return rows, None


def line(row: Row) -> str:
    """A window in one line for people."""
    where = f"{row['workload']}, TBT {row['slo_tbt_ms']:g} ms, {row['rate']:g}/s, {row['policy']}"
    if "error" in row:
        return f"{where}: {row['error']}"
    return (
        f"{where}: attainment {row['attainment']:.2f} (TTFT {row['attainment_ttft']:.2f}, "
        f"TBT {row['attainment_tbt']:.2f}), TTFT p50 {row['ttft_p50_ms']:.0f} ms, "
        f"p99 {row['ttft_p99_ms']:.0f} ms, TBT p99 {row['tbt_p99_ms']:.1f} ms"
    )


if __name__ == "__main__":
    sys.exit(main())
