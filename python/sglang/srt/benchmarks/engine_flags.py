"""Flags of benchmarks that run the engine in their own process: the server's, where they apply."""

from __future__ import annotations

import argparse
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from sglang.srt.errors import ConfigError
from sglang.srt.flags import build_parser, unknown_flag
from sglang.srt.server_args import FLAGS, ServerArgs
from sglang.srt.upstream_flags import UNSUPPORTED_FLAGS

# One field of each group that speaks of the HTTP server only.
_HTTP_ONLY_FIELDS = ("port", "served_model_name")


class EngineFlags:
    """The server's flags without those of HTTP and API and without the fields in `without`."""

    def __init__(self, without: Collection[str] = ()) -> None:
        http_only = {spec.group for spec in FLAGS if spec.field in _HTTP_ONLY_FIELDS}
        self._flags = [
            spec for spec in FLAGS if spec.group not in http_only and spec.field not in without
        ]
        fields = {spec.field for spec in self._flags}
        self._left_out = {name for spec in FLAGS if spec.field not in fields for name in spec.names}

    def parser(self, *, module: str, description: str) -> argparse.ArgumentParser:
        """A parser of these flags, to which the benchmark adds its own."""
        return build_parser(
            self._flags,
            prog=f"python -m {module}",
            usage="%(prog)s --model-path MODEL [flag ...]",
            description=description,
        )

    def parse_known(
        self, parser: argparse.ArgumentParser, argv: Sequence[str]
    ) -> tuple[dict[str, Any], list[str]]:
        """(what was given, words that the parser does not know).

        Raises ConfigError naming a flag whose value is wrong or which has no effect here.
        """
        for word in argv:
            if (name := word.partition("=")[0]) in self._left_out:
                raise ConfigError(f"{name} has no effect on {parser.prog}")
        given, rest = parser.parse_known_args(list(argv))
        return vars(given), rest

    def refuse(self, words: Sequence[str], foreign: Collection[str] = ()) -> None:
        """Raises ConfigError for the first of `words`; `foreign`: flags known from SGLang."""
        unknown = [word.partition("=")[0] for word in words if word.startswith("--")]
        for name in unknown or words:
            raise unknown_flag(name, self._flags, UNSUPPORTED_FLAGS.union(foreign))

    def server_args(self, given: Mapping[str, Any]) -> ServerArgs:
        """Checked ServerArgs of the fields in `given` that are the server's."""
        fields = {spec.field for spec in self._flags}
        args = ServerArgs(**{name: value for name, value in given.items() if name in fields})
        args.check()
        return args


def whole(at_least: int) -> Any:
    """An argparse type: integers from `at_least` up."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = at_least - 1
        if value < at_least:
            raise argparse.ArgumentTypeError(
                f"must be an integer of at least {at_least}, got {text}"
            )
        return value

    return parse
