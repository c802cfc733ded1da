"""Flags of SGLang's bench_serving that this one knows but cannot honour: errors, never ignored."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, NoReturn

UNSUPPORTED_FLAGS: dict[str, str] = {
    "--dataset-offset": "cut the file instead",
    "--agentic-max-turns": "the agentic-trace data set is not supported",
    "--speed-bench-category": "the speed-bench data set is not supported",
    "--speed-bench-output-len": "the speed-bench data set is not supported",
    "--image-count": "image data sets are not supported",
    "--image-resolution": "image data sets are not supported",
    "--random-image-count": "image data sets are not supported",
    "--image-format": "image data sets are not supported",
    "--image-content": "image data sets are not supported",
    "--print-requests": "use --output-details",
    "--return-logprob": "put it in --extra-request-body",
    "--top-logprobs-num": "put it in --extra-request-body",
    "--token-ids-logprob": "put it in --extra-request-body",
    "--logprob-start-len": "put it in --extra-request-body",
    "--return-routed-experts": "not supported by this server",
    "--profile": "profiling is not supported yet",
    "--profile-activities": "profiling is not supported yet",
    "--profile-start-step": "profiling is not supported yet",
    "--profile-steps": "profiling is not supported yet",
    "--profile-num-steps": "profiling is not supported yet",
    "--profile-by-stage": "profiling is not supported yet",
    "--profile-stages": "profiling is not supported yet",
    "--profile-output-dir": "profiling is not supported yet",
    "--profile-prefix": "profiling is not supported yet",
    "--profile-prefill-url": "profiling is not supported yet",
    "--profile-decode-url": "profiling is not supported yet",
    "--pd-separated": "profiling is not supported yet",
    "--plot-throughput": "plot from the file of --output-details",
    "--lora-name": "LoRA adapters are not supported",
    "--lora-request-distribution": "LoRA adapters are not supported",
    "--lora-zipf-alpha": "LoRA adapters are not supported",
    "--prompt-suffix": "not supported",
    "--gsp-fast-prepare": "not needed: preparation counts no tokens",
    "--gsp-send-routing-key": "not supported",
    "--mooncake-num-rounds": "repeat rows in the trace instead",
    "--mooncake-workload": "nothing is downloaded; give the trace's file with --dataset-path",
    "--fake-prefill": "not supported",
    "--rust-client": "not supported",
}


class _Refuse(argparse.Action):
    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> NoReturn:
        flag = option_string or self.option_strings[0]
        parser.error(f"{flag} is not available here: {UNSUPPORTED_FLAGS[flag]}")


def add_unsupported_flags(parser: argparse.ArgumentParser) -> None:
    for flag in UNSUPPORTED_FLAGS:
        parser.add_argument(
            flag, action=_Refuse, nargs="*", default=argparse.SUPPRESS, help=argparse.SUPPRESS
        )
