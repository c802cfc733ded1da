"""The decision of a turn: whom to admit, on which partition, and what each worker may launch.

A dispatcher is a pure function of a frozen view and the time; it owns no engine state.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

from drift_scheduler.partition import Partition
from drift_scheduler.view import LoadView

# Slices launched and not finished: one that runs and one behind it, so that the lane never
# waits for the host, and never more, so that the plan can still change.
MAX_SLICES_IN_FLIGHT = 2


class Forecast(NamedTuple):
    """How long a launch is expected to take, and at worst."""

    expected_s: float
    worst_s: float

    def times(self, count: float) -> Forecast:
        """Of `count` such launches in a row, or of a part of one."""
        return Forecast(self.expected_s * count, self.worst_s * count)


@dataclass(frozen=True, slots=True)
class Admission:
    """Who goes into a new prefill batch.

    order: keys of waiting prompts, the first ones first; others stay. None leaves the choice to
    the engine's queue. tokens: new tokens of the batch at most; None takes the engine's limit.
    preempts: the batch in flight is parked at a layer boundary, and goes on when the new one is
    done; then no prompt of the new one may be cut. shed: keys of prompts to be refused, for they
    cannot have their first token in time.
    """

    order: tuple[str, ...] | None = None
    tokens: int | None = None
    preempts: bool = False
    shed: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.tokens is not None and self.tokens < 1:
            raise ValueError(f"tokens={self.tokens} must be at least 1")


@dataclass(frozen=True, slots=True)
class Plan:
    """What to launch now, on which partition: a decode step or not, prefill layers at most.

    fused_tokens: prompt tokens, at most, that ride in the decode step. Such a step has the whole
    device. It goes without them while a prefill batch is in flight (LoadView.can_fuse).
    fused_order: whose tokens; None leaves the choice to the engine's queue.
    step, layer: forecasts of the decode step and of one prefill layer, where a model made them.
    reason: why, in a few words, for the timeline. look_again_s: when to plan anew even if
    nothing has happened by then.
    """

    partition: Partition
    decode: bool = False
    prefill_layers: int = 0
    fused_tokens: int = 0
    fused_order: tuple[str, ...] | None = None
    step: Forecast | None = None
    layer: Forecast | None = None
    reason: str = ""
    look_again_s: float | None = None

    def __post_init__(self) -> None:
        if self.fused_tokens == 0:
            return
        if not self.decode or not self.partition.exclusive or self.prefill_layers:
            raise ValueError(f"a fused step is a decode step alone on the whole device: {self}")
        if self.fused_tokens < 0:
            raise ValueError(f"fused_tokens={self.fused_tokens} must not be negative")


class Dispatcher(Protocol):
    def admit(self, view: LoadView, now_s: float) -> Admission | None:
        """Who goes into a new prefill batch, None if there is to be none now.

        Asked only with prompts waiting and either no prefill batch in flight or one that could be
        pre-empted: its last layer is not launched, and it has not pre-empted another itself.
        """
        ...

    def dispatch(self, view: LoadView, now_s: float) -> Plan:
        """What to launch. The view holds the prefill batch that `admit` let in, if any."""
        ...
