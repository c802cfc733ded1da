"""Policies by name, as flags and endpoints say them.

adaptive            the way of sharing is chosen at every turn; adaptive:A,B with ablations:
                    split-only, fused-only, turns-only, no-guard, no-slices, no-polling
static:P/D          prefill on P SMs and decode on D, whenever both have work
temporal            turns on the whole device, a decode step and then some prefill layers
chunked:N           prompts ride in decode steps of up to N tokens, on the whole device;
                    without N the size of a prefill chunk
table               divided by a table of decode batch sizes
turns               whole prefill batches and decode steps in turn: no multiplexing
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from drift_scheduler.policies.modes import ALL_MODES, Mode

NAMES = ("adaptive", "static:P/D", "temporal", "chunked:N", "table", "turns")
_ONLY = {f"{mode}-only": frozenset({mode}) for mode in Mode}
ABLATIONS = (*_ONLY, "no-guard", "no-slices", "no-polling")


@dataclass(frozen=True, slots=True)
class AdaptiveSpec:
    """modes: the ways that may be chosen; without the guard the worst case is the expected one."""

    modes: frozenset[Mode] = ALL_MODES
    guard: bool = True
    slices: bool = True
    polls: bool = True


@dataclass(frozen=True, slots=True)
class StaticSpec:
    prefill_sms: int
    decode_sms: int


@dataclass(frozen=True, slots=True)
class ChunkedSpec:
    """step_tokens: None takes the size of a prefill chunk."""

    step_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class TemporalSpec:
    pass


@dataclass(frozen=True, slots=True)
class TableSpec:
    pass


@dataclass(frozen=True, slots=True)
class TurnsSpec:
    pass


PolicySpec = AdaptiveSpec | StaticSpec | ChunkedSpec | TemporalSpec | TableSpec | TurnsSpec


def heeds_tbt(spec: PolicySpec) -> bool:
    """Whether what it does depends on the time between tokens that requests ask for."""
    return isinstance(spec, AdaptiveSpec | TemporalSpec)


def parse_policy(text: str) -> PolicySpec:
    """Raises ValueError that says what is wrong with the text."""
    name, colon, argument = text.partition(":")
    match name:
        case "adaptive":
            return _adaptive(argument)
        case "static":
            return _static(argument)
        case "chunked":
            return ChunkedSpec(_tokens(argument) if colon else None)
        case "temporal" | "table" | "turns" if colon:
            raise ValueError(f"policy {name} takes nothing after its name, got {text!r}")
        case "temporal":
            return TemporalSpec()
        case "table":
            return TableSpec()
        case "turns":
            return TurnsSpec()
    raise ValueError(f"expected one of {', '.join(NAMES)}, got {text!r}")


def _adaptive(argument: str) -> AdaptiveSpec:
    options = [option for option in argument.split(",") if option]
    for option in options:
        if option not in ABLATIONS:
            raise ValueError(f"adaptive has no option {option!r}; known are {', '.join(ABLATIONS)}")
    only = [_ONLY[option] for option in options if option in _ONLY]
    if len(only) > 1:
        raise ValueError(f"adaptive takes one way only, got adaptive:{argument}")
    return AdaptiveSpec(
        modes=only[0] if only else ALL_MODES,
        guard="no-guard" not in options,
        slices="no-slices" not in options,
        polls="no-polling" not in options,
    )


def _static(argument: str) -> StaticSpec:
    found = re.fullmatch(r"(\d+)/(\d+)", argument)
    if found is None:
        raise ValueError(f"expected static:P/D with P and D SMs, got 'static:{argument}'")
    return StaticSpec(*map(int, found.groups()))


def _tokens(argument: str) -> int:
    digits = argument.removesuffix("K").removesuffix("k")
    tokens = int(digits) * (1 if digits == argument else 1024) if digits.isdigit() else 0
    if tokens < 1:
        raise ValueError(f"expected chunked:N with N tokens a step, got 'chunked:{argument}'")
    return tokens
