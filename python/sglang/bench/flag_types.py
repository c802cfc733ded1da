"""What values of options may be: parsers that say what they expected."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from typing import Any

import orjson

from sglang.bench.goodput import OBJECTIVE_NAMES, Objectives


class GoodputAction(argparse.Action):
    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        bounds: dict[str, float] = {}
        for value in values or ():
            name, _, bound_ms = str(value).partition(":")
            if name not in OBJECTIVE_NAMES:
                parser.error(
                    f"--goodput: {value!r} is not NAME:MS with NAME one of "
                    f"{', '.join(OBJECTIVE_NAMES)}"
                )
            if name in bounds:
                parser.error(f"--goodput: {name} is given twice")
            try:
                bounds[name] = number(0, exclusive=True)(bound_ms)
            except argparse.ArgumentTypeError as error:
                parser.error(f"--goodput {name}: {error}")
        objectives = Objectives(**{f"{name}_ms": bound for name, bound in bounds.items()})
        setattr(namespace, self.dest, objectives)


def whole(at_least: int) -> Callable[[str], int]:
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


def number(
    at_least: float,
    *,
    exclusive: bool = False,
    at_most: float = math.inf,
    infinite: bool = False,
) -> Callable[[str], float]:
    """A parser of numbers in [at_least, at_most], or in (at_least, at_most] when exclusive."""
    lower = "above" if exclusive else "at least"
    upper = "" if math.isinf(at_most) else f" and at most {at_most:g}"

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        low_ok = value > at_least if exclusive else value >= at_least
        if not (low_ok and value <= at_most and (infinite or not math.isinf(value))):
            raise argparse.ArgumentTypeError(f"must be {lower} {at_least:g}{upper}, got {text}")
        return value

    return parse


def header(text: str) -> tuple[str, str]:
    """NAME=VALUE or NAME: VALUE, whichever mark comes first."""
    at = min((i for i in (text.find("="), text.find(":")) if i > 0), default=0)
    if at == 0:
        raise argparse.ArgumentTypeError(f"must be NAME=VALUE, got {text!r}")
    return text[:at].strip(), text[at + 1 :].strip()


def json_object(text: str) -> dict[str, Any]:
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"not JSON: {error}") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError("must be a JSON object")
    return value
