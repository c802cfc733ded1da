"""The command line of profile_drift."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sglang.srt.benchmarks.engine_flags import EngineFlags
from sglang.srt.server_args import ServerArgs

DEFAULT_MINUTES = 4.5

# No request, text, deadline or policy is involved, and the profile is what is being made.
_WITHOUT = (
    "tokenizer_path",
    "tokenizer_mode",
    "skip_tokenizer_init",
    "max_queued_requests",
    "prefill_max_requests",
    "schedule_policy",
    "schedule_conservativeness",
    "disable_radix_cache",
    "disable_overlap_schedule",
    "enable_mixed_chunk",
    "pd_multiplex_policy",
    "drift_profile",
    "drift_profile_save",
    "slo_ttft_ms",
    "slo_ttft_ms_per_token",
    "slo_tbt_ms",
    "slo_overload",
    "watchdog_timeout",
    "log_level_http",
    "log_requests",
    "log_requests_level",
    "decode_log_interval",
    "enable_metrics",
)
# Makes every lane and graph that any policy uses, and needs no latency model itself.
_POLICY = "table"


@dataclass(frozen=True, slots=True)
class ProfileOptions:
    """out: None is where the next server start looks. report: a folder; None lies next to the
    profile."""

    server: ServerArgs
    minutes: float
    out: Path | None
    report: Path | None
    show_progress: bool


def parse_options(argv: Sequence[str]) -> ProfileOptions:
    """Prints and exits 0 for --help. Raises ConfigError naming the flag."""
    flags = EngineFlags(_WITHOUT)
    parser = flags.parser(
        module="sglang.profile_drift",
        description="Measure how long prefill and decode take on every partition of the device, "
        "alone and side by side, for the latency model of --enable-pd-multiplex. Give the flags "
        "that the server is started with; --enable-pd-multiplex is implied.",
    )
    group = parser.add_argument_group("What becomes of it")
    group.add_argument(
        "--minutes",
        metavar="X",
        type=_minutes,
        default=DEFAULT_MINUTES,
        help="time for measuring, once the model is loaded; repetitions are dropped, then points, "
        f"where it is short (default: {DEFAULT_MINUTES})",
    )
    group.add_argument(
        "--out",
        metavar="FILE",
        type=Path,
        help="the profile, for --drift-profile; where the server finds it by itself if not given",
    )
    group.add_argument(
        "--report",
        metavar="DIR",
        type=Path,
        help="folder for report.md and plots; next to the profile if not given",
    )
    group.add_argument("--disable-tqdm", action="store_true", help="no progress bar")
    given, rest = flags.parse_known(parser, argv)
    flags.refuse(rest)
    return ProfileOptions(
        server=_multiplexing(flags.server_args(given | {"enable_pdmux": True})),
        minutes=given["minutes"],
        out=given["out"],
        report=given["report"],
        show_progress=not given["disable_tqdm"],
    )


def _multiplexing(args: ServerArgs) -> ServerArgs:
    args = dataclasses.replace(args, pd_multiplex_policy=_POLICY)
    args.check()
    return args


def _minutes(text: str) -> float:
    try:
        minutes = float(text)
    except ValueError:
        minutes = 0.0
    if not 0 < minutes < 24 * 60:
        raise argparse.ArgumentTypeError(f"must be a positive number of minutes, got {text}")
    return minutes
