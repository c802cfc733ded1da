"""Simulates windows that were measured, and says how far apart the two are.

    python -m benchmark.simulated --rows benchmark/results/drift_h100.jsonl \\
        --profile PROFILE.json --workload mooncake:TRACE.jsonl.gz tool_agent --out FILE.jsonl

For every row that `benchmark.policies` wrote, the requests that its client sent are made again, at
the same times, and run through the simulator under the row's policy, flags of the server and
limits. The profile is that of the machine, from `python -m sglang.profile_drift`. A line for each
window is appended to --out; a table for each point says whether the policies rank the same.

The simulator counts where the server counts: as a step's tokens are there. The client sees them
after the detokenizer and the network; `server_attainment` is the server's own count.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmark.arguments import not_negative, workload
from benchmark.command_line import command_line
from benchmark.policy_plan import Workload
from benchmark.policy_table import Row
from benchmark.simulated_load import workload_named
from benchmark.simulated_table import render
from drift_scheduler.estimator import EstimatorError
from drift_scheduler.profile import ProfileError
from drift_scheduler.simulation.machine import load_machine
from sglang.bench.errors import BenchError


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Exits with code 2 and the flag's name if one is wrong."""
    parser = command_line("simulated", __doc__)
    parser.add_argument(
        "--rows", type=Path, required=True, help="of benchmark.policies, JSON lines"
    )
    parser.add_argument("--profile", type=Path, required=True, help="of the machine")
    parser.add_argument(
        "--workload",
        nargs="+",
        type=workload,
        required=True,
        metavar="NAME",
        help="mooncake:FILE, sharegpt_lengths:FILE or tool_agent, as in the rows",
    )
    parser.add_argument("--out", type=Path, required=True, help="JSON lines file to append to")
    parser.add_argument("--num-layers", type=_count, help="of the model, if not in the profile")
    parser.add_argument(
        "--kv-tokens",
        type=_count,
        default=420_000,
        help="of the KV pool, where the server had no --max-total-tokens (default: 420000)",
    )
    parser.add_argument(
        "--launch-us",
        type=not_negative,
        default=400.0,
        help="host time before a launch runs (default: 400; `host_cost` measured that of a step "
        "of 128 requests)",
    )
    parser.add_argument(
        "--batch-launch-us",
        type=not_negative,
        default=1300.0,
        help="host time before a prefill batch that is no graph, beside that of a launch (default: "
        "1300, as on an H100 of what prompts of 1,000 to 6,000 tokens took)",
    )
    parser.add_argument(
        "--layer-launch-us",
        type=not_negative,
        default=500.0,
        help="host time for each layer that is launched kernel by kernel (default: 500; short "
        "prefills without graphs took 530 to 1,070 on an H100)",
    )
    parser.add_argument(
        "--head-us",
        type=not_negative,
        default=450.0,
        help="of a prefill batch's time, what comes behind its last layer (default: 450, as an "
        "H100's last slices took more than others)",
    )
    parser.add_argument(
        "--noise",
        type=not_negative,
        default=0.03,
        help="sigma of the logarithm of the times that launches take (default: 0.03, as an H100's "
        "scatter from one to the next); of decode steps alone a small part of it",
    )
    parser.add_argument(
        "--timelines",
        type=Path,
        help="folder that benchmark.policies was given for those of the rows: launches take as "
        "long as they did in the windows of the workload, not as long as the profile says, and "
        "the host pauses when it did",
    )
    parser.add_argument(
        "--drain-seconds",
        type=not_negative,
        default=60.0,
        help="after the last arrival, where a row does not say (default: 60)",
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """0 if every row with a result was simulated."""
    given = parse(argv)
    try:
        rows, failed = read_rows(given.rows)
        windows = with_workloads(rows, given.workload)
        lines = _simulate(given, windows)
    except (BenchError, ProfileError, EstimatorError) as error:
        print(error, file=sys.stderr)
        return 1
    print("\n" + render(lines))
    if failed:
        print(f"{failed} rows have no result and were left out")
    return 0


def read_rows(path: Path) -> tuple[list[Row], int]:
    """Rows with a result, in the file's order, and how many have none. Raises BenchError."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise BenchError(f"--rows {path}: {error.strerror or error}") from error
    rows: list[Row] = []
    failed = 0
    for number, line in enumerate(text.splitlines(), start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise BenchError(f"--rows {path}:{number}: {error}") from error
        if not isinstance(row, dict) or row.get("benchmark") != "policies":
            raise BenchError(f"--rows {path}:{number}: not a row of benchmark.policies")
        if "error" in row:
            failed += 1
        else:
            rows.append(row)
    if not rows:
        raise BenchError(f"--rows {path}: no row has a result")
    return rows, failed


def with_workloads(
    rows: Sequence[Row], workloads: Sequence[Workload]
) -> list[tuple[Row, Workload]]:
    """Raises BenchError naming the first workload of the rows that was not given."""
    found = []
    for row in rows:
        workload = workload_named(row["workload"], workloads)
        if workload is None:
            given = ", ".join(map(str, workloads))
            raise BenchError(f"--workload: the rows have {row['workload']}, given are {given}")
        found.append((row, workload))
    return found


def _simulate(given: argparse.Namespace, windows: Sequence[tuple[Row, Workload]]) -> list[Row]:
    from benchmark.serve_trace import append
    from benchmark.simulated_times import seen_in
    from benchmark.simulated_window import Host, WindowSimulator  # which import torch

    host = Host(
        launch_us=given.launch_us,
        batch_launch_us=given.batch_launch_us,
        layer_launch_us=given.layer_launch_us,
        head_us=given.head_us,
        noise=given.noise,
        kv_tokens=given.kv_tokens,
        drain_seconds=given.drain_seconds,
    )
    machine = load_machine(given.profile, given.num_layers)
    seen = None
    if given.timelines is not None:
        seen = seen_in(given.timelines, [row for row, _ in windows], machine)
    lines: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        simulator = WindowSimulator(machine, host, Path(folder), seen)
        for row, workload in windows:
            line = simulator.simulate(row, workload)
            append(line, given.out)
            lines.append(line)
            print(_in_words(line), flush=True)
    return lines


def _in_words(line: Row) -> str:
    measured, simulated = line["measured"], line["simulated"]

    def both(key: str, form: str) -> str:
        return f"{measured[key]:{form}} -> {simulated[key]:{form}}"

    return (
        f"{line['workload']}, TBT {line['slo_tbt_ms']:g} ms, {line['rate']:g}/s, "
        f"{line['policy']}: goodput {both('goodput', '.3f')}, "
        f"attainment {both('attainment', '.2f')} "
        f"(TTFT {both('attainment_ttft', '.2f')}, TBT {both('attainment_tbt', '.2f')}), "
        f"TTFT p50 {both('ttft_p50_ms', '.0f')} ms, p99 {both('ttft_p99_ms', '.0f')} ms, "
        f"TBT p99 {both('tbt_p99_ms', '.1f')} ms"
    )


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1, got {text}")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
