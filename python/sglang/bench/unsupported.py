"""What SGLang's bench_serving has and this one has not: errors that say so, never ignored."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, NoReturn

_LORA = "LoRA adapters are not supported"
_IMAGES = "image data sets are not supported"
_SPEED_BENCH = "the speed-bench data set is not supported"

UNSUPPORTED_FLAGS: dict[str, str] = {
    "--speed-bench-category": _SPEED_BENCH,
    "--speed-bench-output-len": _SPEED_BENCH,
    "--image-count": _IMAGES,
    "--image-resolution": _IMAGES,
    "--random-image-count": _IMAGES,
    "--image-format": _IMAGES,
    "--image-content": _IMAGES,
    "--return-routed-experts": "models with experts are not supported",
    "--lora-name": _LORA,
    "--lora-request-distribution": _LORA,
    "--lora-zipf-alpha": _LORA,
    "--fake-prefill": "prefill and decode are not in servers of their own",
    "--rust-client": "the client is in Python",
}
UNSUPPORTED_DATASETS: dict[str, str] = {
    "autobench": "write its rows as openai ones",
    "image": _IMAGES,
    "mmmu": _IMAGES,
    "speed-bench": _SPEED_BENCH,
}
UNSUPPORTED_BACKENDS: dict[str, str] = {
    "trt": "its wire format is not spoken here",
    "truss": "its wire format is not spoken here",
    "gserver": "SGLang's has none either",
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


def refuse_unsupported(parser: argparse.ArgumentParser, backend: str, dataset: str) -> None:
    """Leaves with an error for a --backend or --dataset-name that only SGLang has."""
    for flag, value, reasons in (
        ("--backend", backend, UNSUPPORTED_BACKENDS),
        ("--dataset-name", dataset, UNSUPPORTED_DATASETS),
    ):
        if value in reasons:
            parser.error(f"{flag} {value} is not available here: {reasons[value]}")
