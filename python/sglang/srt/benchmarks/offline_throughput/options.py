"""The command line of bench_offline_throughput: engine flags, and bench_serving's for the data."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sglang.bench.cli import parse_options as parse_bench_options
from sglang.bench.options import BenchOptions
from sglang.srt.benchmarks.engine_flags import EngineFlags
from sglang.srt.server_args import ServerArgs

# All prompts arrive at once and are in no hurry, and nothing is logged but the result.
_WITHOUT = (
    "max_queued_requests",
    "log_level_http",
    "log_requests",
    "log_requests_level",
    "decode_log_interval",
    "enable_metrics",
    "drift_profile_save",
    "slo_ttft_ms",
    "slo_ttft_ms_per_token",
    "slo_tbt_ms",
    "slo_overload",
)
# Flags of bench_serving that say which prompts and answers are wanted.
_BENCH_PREFIXES = ("--dataset-", "--random-", "--gsp-", "--mooncake-", "--mt-bench-", "--sharegpt-")
_BENCH_FLAGS = (
    "--num-prompts",
    "--seed",
    "--temperature",
    "--top-p",
    "--disable-ignore-eos",
    "--apply-chat-template",
    "--disable-tqdm",
)
_SGLANG_ONLY = (
    "--do-not-exit",
    "--extra-request-body",
    "--gsp-send-routing-key",
    "--profile",
    "--prompt-suffix",
)


@dataclass(frozen=True, slots=True)
class OfflineOptions:
    """bench: its data set, sampling and progress fields only. result_file: None writes none.
    `command` is the command line, for the record."""

    server: ServerArgs
    bench: BenchOptions
    skip_warmup: bool
    result_file: Path | None
    command: tuple[str, ...]


def parse_options(argv: Sequence[str]) -> OfflineOptions:
    """Prints and exits 0 for --help, and exits 2 for a data set flag at fault.

    Raises ConfigError naming any other flag.
    """
    flags = EngineFlags(_WITHOUT)
    parser = flags.parser(
        module="sglang.bench_offline_throughput",
        description="Give all prompts of a data set to an engine in this process and report its "
        "throughput. Data set flags are those of sglang.bench_serving: --dataset-name, "
        "--dataset-path, --num-prompts, --seed, --random-*, --gsp-*, --mooncake-*, --sharegpt-*, "
        "--apply-chat-template, --temperature, --top-p, --disable-ignore-eos, --disable-tqdm.",
    )
    _add_flags(parser.add_argument_group("Benchmark"))
    given, rest = flags.parse_known(parser, argv)
    flags.refuse(
        [word for word in rest if word.startswith("--") and not _is_bench_flag(word)], _SGLANG_ONLY
    )
    return OfflineOptions(
        server=flags.server_args(given),
        bench=parse_bench_options(["--backend=sglang", "--tokenize-prompt", *rest]),
        skip_warmup=given["skip_warmup"],
        result_file=Path(given["result_filename"]) if given["result_filename"] else None,
        command=tuple(argv),
    )


def _add_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--backend",
        metavar="{engine}",
        choices=("engine",),
        default="engine",
        help="what generates: only the engine in this process",
    )
    group.add_argument(
        "--result-filename", metavar="FILE", default="", help="JSON lines file to append to"
    )
    group.add_argument(
        "--skip-warmup", action="store_true", help="measure from the first request on"
    )


def _is_bench_flag(word: str) -> bool:
    name = word.partition("=")[0]
    if name in _SGLANG_ONLY:
        return False
    return name in _BENCH_FLAGS or name.startswith(_BENCH_PREFIXES)
