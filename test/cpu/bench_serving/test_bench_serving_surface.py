"""The options are SGLang's: same names, defaults, choices and kinds of value, or refused."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import pytest

from sglang.bench.cli import parse_options
from sglang.bench.flags import build_parser
from sglang.bench.unsupported import (
    UNSUPPORTED_BACKENDS,
    UNSUPPORTED_DATASETS,
    UNSUPPORTED_FLAGS,
)

SURFACE = Path(__file__).parents[3] / "docs" / "data" / "upstream_surface.json"
OPTIONS: list[dict[str, Any]] = json.loads(SURFACE.read_text())["bench_serving"]
ACTIONS: dict[str, argparse.Action] = {
    name: action for action in build_parser()._actions for name in action.option_strings
}
REFUSED_CHOICES = {"--dataset-name": UNSUPPORTED_DATASETS, "--backend": UNSUPPORTED_BACKENDS}
# A word that each kind of value understands.
SAMPLE = {"str": "x", "int": "7", "float": "0.5", "finite_positive_float": "0.5"}
STRUCTURED = {"--extra-request-body": '{"a": 1}', "--header": "A=b"}


@pytest.mark.parametrize("theirs", OPTIONS, ids=lambda option: option["names"][0])
def test_every_option_of_sglang_is_the_same_or_refused(theirs: dict[str, Any]) -> None:
    [name] = theirs["names"]
    action = ACTIONS[name]
    if name in UNSUPPORTED_FLAGS:
        with pytest.raises(SystemExit):
            parse_options(["--dataset-name", "random-ids", name])
        return
    assert (action.nargs == 0) is theirs.get("switch", False)
    wanted = math.inf if theirs["default"] == "inf" else theirs["default"]
    assert action.default == wanted
    if "nargs" in theirs:
        assert action.nargs == theirs["nargs"]
    if "choices" in theirs:
        assert set(theirs["choices"]) <= set(action.choices or ())
    elif theirs.get("type") and not theirs.get("switch"):
        assert action.choices is None or name == "--backend"
        word = STRUCTURED.get(name, SAMPLE[theirs["type"]])
        value = action.type(word) if callable(action.type) else word
        assert value == {"str": value, "int": 7}.get(theirs["type"], 0.5)


@pytest.mark.parametrize(
    ("flag", "value"),
    [(flag, value) for flag, reasons in REFUSED_CHOICES.items() for value in reasons],
)
def test_choices_that_only_sglang_has_are_refused_by_name(
    flag: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse_options([flag, value])
    assert f"{flag} {value} is not available here" in capsys.readouterr().err


def test_nothing_is_refused_that_sglang_has_not() -> None:
    names = {name for option in OPTIONS for name in option["names"]}
    assert set(UNSUPPORTED_FLAGS) - names == {"--rust-client"}  # of a later SGLang
