"""Ways of sharing a device, with the decode step and prefill rate of each, and the best of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from drift_scheduler.policies.modes import Choice, Mode
from sglang.srt.benchmarks.one_batch.measure import Distribution

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Way:
    """One point of a frontier, measured.

    partition: as it is printed. fused_tokens: prompt tokens in a step, 0 unless fused. layers:
    of prefill between two steps, 0 unless taking turns. step_ms: between two tokens of a running
    request, the median. slowest_ms: the longest of those measured, which is what a deadline must
    allow for. rate: prompt tokens/s.
    """

    mode: str
    partition: str
    step_ms: float
    slowest_ms: float
    rate: float
    fused_tokens: int = 0
    layers: int = 0

    def __str__(self) -> str:
        match self.mode:
            case Mode.FUSED:
                return f"fused {self.fused_tokens}"
            case Mode.TURNS:
                return f"turns of {self.layers} layers"
        return f"split {self.partition}"

    def is_of(self, choice: Choice) -> bool:
        return (
            self.mode == choice.mode
            and self.partition == str(choice.partition)
            and self.fused_tokens == choice.fused_tokens
            and self.layers == choice.layers
        )


def turns(
    step: Distribution, prefill: Distribution, prefill_tokens: int, num_layers: int
) -> list[Way]:
    """A decode step and 1, 2, ... layers of prefill in turn on the whole device. Nothing overlaps,
    so they follow from the times of both alone."""
    ways = []
    for layers in range(1, num_layers + 1):
        share = layers / num_layers
        round_ms = step.median + share * prefill.median
        slowest_ms = step.largest + share * prefill.largest
        rate = prefill_tokens * share / round_ms * 1e3
        ways.append(Way(Mode.TURNS, "whole", round_ms, slowest_ms, rate, layers=layers))
    return ways


def best_within(ways: Sequence[Way], deadline_ms: float) -> Way | None:
    """The highest rate among those whose steps were all in time."""
    in_time = [way for way in ways if way.slowest_ms <= deadline_ms]
    return max(in_time, key=lambda way: way.rate, default=None)


def judge(ways: Sequence[Way], choice: Choice | None, deadline_ms: float) -> Row:
    """What the choice is worth: its measured rate over the best one that meets the deadline.

    The choice, unless None, must be among the ways. ratio: 0 if nothing was chosen although
    something would have done, None if nothing does. It may exceed 1 where in_time is false, for
    then the choice has taken more than its time.
    """
    best = best_within(ways, deadline_ms)
    row: Row = {"deadline_ms": deadline_ms, "best": None, "choice": None, "ratio": None}
    if best is not None:
        row |= {"best": str(best), "best_rate": best.rate, "best_step_ms": best.step_ms, "ratio": 0}
    if choice is None:
        return row
    chosen = next(way for way in ways if way.is_of(choice))
    return row | {
        "choice": str(chosen),
        "rate": chosen.rate,
        "step_ms": chosen.step_ms,
        "forecast_rate": choice.rate,
        "slowest_ms": chosen.slowest_ms,
        "in_time": chosen.slowest_ms <= deadline_ms,
        "ratio": chosen.rate / best.rate if best else None,
    }


def way_row(way: Way) -> Row:
    return asdict(way) | {"way": str(way)}
