"""Policies that bring the lanes to rest: nothing new begins, what has begun is ended."""

from __future__ import annotations

from dataclasses import dataclass

from drift_scheduler.dispatcher import Admission, Plan
from drift_scheduler.partition import PartitionTable
from drift_scheduler.policies.take_turns import TakeTurns
from drift_scheduler.view import LoadView


@dataclass(frozen=True, slots=True)
class Halt:
    """No batch and no step begins; a prefill batch in flight goes through its other layers, for
    nothing but its end gives back what it holds."""

    table: PartitionTable

    def admit(self, view: LoadView, now_s: float) -> Admission | None:
        return None

    def dispatch(self, view: LoadView, now_s: float) -> Plan:
        layers = 0 if view.prefill is None else view.prefill.layers_left
        return Plan(self.table.whole, prefill_layers=layers)


@dataclass(frozen=True, slots=True)
class Finish:
    """Requests that have begun are served to their end, a half-filled prompt too; others wait."""

    table: PartitionTable

    def admit(self, view: LoadView, now_s: float) -> Admission | None:
        begun = view.backlog.begun
        if begun is None or view.prefill is not None:
            return None
        return Admission(order=(begun.key,))

    def dispatch(self, view: LoadView, now_s: float) -> Plan:
        return TakeTurns(self.table).dispatch(view, now_s)
