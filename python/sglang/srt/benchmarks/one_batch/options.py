"""The command line of bench_one_batch."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from sglang.srt.benchmarks.engine_flags import EngineFlags, whole
from sglang.srt.benchmarks.one_batch.cases import (
    DEFAULT_DECODE,
    DEFAULT_PREFILL,
    Case,
    DecodeCase,
    GenerationCase,
    PrefillCase,
)
from sglang.srt.errors import ConfigError
from sglang.srt.server_args import ServerArgs

# Sizes and splits follow from the cases, and no request, text or policy is involved.
_WITHOUT = (
    "tokenizer_path",
    "tokenizer_mode",
    "skip_tokenizer_init",
    "max_running_requests",
    "max_queued_requests",
    "chunked_prefill_size",
    "max_prefill_tokens",
    "prefill_max_requests",
    "schedule_policy",
    "schedule_conservativeness",
    "disable_radix_cache",
    "disable_overlap_schedule",
    "enable_pdmux",
    "enable_mixed_chunk",
    "pd_multiplex_policy",
    "pdmux_config_path",
    "sm_group_num",
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
_SGLANG_ONLY = (
    "--correct",
    "--correctness-test",
    "--cut-len",
    "--log-decode-step",
    "--profile",
    "--profile-activities",
    "--profile-filename-prefix",
    "--profile-prefix",
    "--profile-record-shapes",
    "--profile-stage",
    "--profile-start-step",
    "--profile-steps",
    "--prompt-filename",
)
_SGLANG_BATCH_SIZE, _SGLANG_INPUT_LEN, _SGLANG_OUTPUT_LEN = 1, 1024, 16

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Split:
    """A division of the device that the user asked for, in SMs or cores."""

    prefill_sms: int
    decode_sms: int

    def __str__(self) -> str:
        return f"{self.prefill_sms}/{self.decode_sms}"

    @classmethod
    def parse(cls, text: str) -> Split:
        """Reads "84/48" or "p84/d48"; ValueError otherwise."""
        prefill, _, decode = text.partition("/")
        try:
            split = cls(int(prefill.removeprefix("p")), int(decode.removeprefix("d")))
        except ValueError:
            split = cls(0, 0)
        if min(split.prefill_sms, split.decode_sms) < 1:
            raise ValueError(f"expected PREFILL/DECODE, such as 84/48, got {text!r}")
        return split


@dataclass(frozen=True, slots=True)
class OneBatchOptions:
    """What to measure, and how often. `command` is the command line, for the record."""

    server: ServerArgs
    decode: tuple[DecodeCase, ...]
    prefill: tuple[PrefillCase, ...]
    generation: tuple[GenerationCase, ...]
    splits: tuple[Split, ...]
    co_run: bool
    slice_layers: int
    decode_steps: int
    prefill_runs: int
    warm_up: int
    run_name: str
    result_file: Path
    show_progress: bool
    command: tuple[str, ...]

    @property
    def cases(self) -> tuple[Case, ...]:
        return (*self.decode, *self.prefill, *self.generation)


def parse_options(argv: Sequence[str]) -> OneBatchOptions:
    """Prints and exits 0 for --help. Raises ConfigError naming the flag."""
    flags = EngineFlags(_WITHOUT)
    parser = flags.parser(
        module="sglang.bench_one_batch",
        description="Time decode steps and prefills on the lanes that a server would use, beside "
        "the least time that the machine's measured memory and matrix rates allow.",
    )
    _add_flags(parser.add_argument_group("What is measured"))
    given, rest = flags.parse_known(parser, argv)
    flags.refuse(rest, _SGLANG_ONLY)
    generation = _generation_cases(given)
    decode, prefill = given["decode"], given["prefill"]
    if decode is None and prefill is None and not generation:
        decode, prefill = DEFAULT_DECODE, DEFAULT_PREFILL
    splits = tuple(dict.fromkeys(given["partition"]))
    decode, prefill = tuple(decode or ()), tuple(prefill or ())
    if given["co_run"] and not splits:
        raise ConfigError("--co-run needs --partition: the phases run on the two sides of a split")
    if given["co_run"] and not (decode and prefill):
        raise ConfigError("--co-run needs both --decode and --prefill cases")
    shares = [split.decode_sms for split in splits]
    if len(set(shares)) != len(shares):
        raise ConfigError(f"--partition names a decode share twice: {' '.join(map(str, splits))}")
    return OneBatchOptions(
        server=flags.server_args(given),
        decode=decode,
        prefill=prefill,
        generation=generation,
        splits=tuple(sorted(splits, key=lambda split: split.decode_sms)),
        co_run=given["co_run"],
        slice_layers=given["slice_layers"],
        decode_steps=given["decode_steps"],
        prefill_runs=given["prefill_runs"],
        warm_up=given["warm_up"],
        run_name=given["run_name"],
        result_file=Path(given["result_filename"]),
        show_progress=not given["disable_tqdm"],
        command=tuple(argv),
    )


def _add_flags(group: argparse._ArgumentGroup) -> None:
    def add(name: str, metavar: str, help: str, **options: Any) -> None:
        group.add_argument(name, metavar=metavar, help=help, **options)

    add(
        "--decode",
        "BATCHxLENGTH",
        "decode steps, by requests and tokens of each "
        f"(default: {' '.join(map(str, DEFAULT_DECODE))})",
        nargs="+",
        type=_typed(DecodeCase.parse),
    )
    add(
        "--prefill",
        "NEW+CACHED",
        "prefills, by new and cached tokens; BATCHxNEW+CACHED for several requests "
        f"(default: {' '.join(map(str, DEFAULT_PREFILL))})",
        nargs="+",
        type=_typed(PrefillCase.parse),
    )
    for name, default in (
        ("--batch-size", _SGLANG_BATCH_SIZE),
        ("--input-len", _SGLANG_INPUT_LEN),
        ("--output-len", _SGLANG_OUTPUT_LEN),
    ):
        add(
            name,
            "N",
            "SGLang's cases: a batch is prefilled, then decoded, for every combination of the "
            f"three lists ({default} if another of them is given)",
            nargs="+",
            type=whole(1),
        )
    add(
        "--partition",
        "PREFILL/DECODE",
        "also measure on the lanes of these splits of the device, in SMs or cores",
        nargs="+",
        type=_typed(Split.parse),
        default=[],
    )
    group.add_argument(
        "--co-run",
        action="store_true",
        help="on every --partition, also run each decode case beside each prefill case",
    )
    add(
        "--slice-layers",
        "N",
        "layers in a slice, for the cost of slicing and beside decode (default: 1)",
        type=whole(1),
        default=1,
    )
    add("--decode-steps", "N", "(default: 50)", type=whole(2), default=50)
    add("--prefill-runs", "N", "(default: 5)", type=whole(1), default=5)
    add("--warm-up", "N", "runs of each case before (default: 2)", type=whole(0), default=2)
    add("--run-name", "TEXT", "copied into the results (default: default)", default="default")
    add(
        "--result-filename",
        "FILE",
        "JSON lines file to append to (default: result.jsonl)",
        default="result.jsonl",
    )
    group.add_argument("--disable-tqdm", action="store_true", help="no progress bar")


def _generation_cases(given: dict[str, Any]) -> tuple[GenerationCase, ...]:
    lists = (given["batch_size"], given["input_len"], given["output_len"])
    if lists == (None, None, None):
        return ()
    defaults = (_SGLANG_BATCH_SIZE, _SGLANG_INPUT_LEN, _SGLANG_OUTPUT_LEN)
    chosen = [values or [default] for values, default in zip(lists, defaults, strict=True)]
    return tuple(GenerationCase(*case) for case in itertools.product(*chosen))


def _typed(parse: Callable[[str], T]) -> Callable[[str], T]:
    """argparse prints a ValueError's text only if it is an ArgumentTypeError."""

    def convert(text: str) -> T:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return convert
