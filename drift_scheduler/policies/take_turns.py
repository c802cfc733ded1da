"""TakeTurns: a server without multiplexing."""

from __future__ import annotations

from dataclasses import dataclass

from drift_scheduler.dispatcher import Admission, Plan
from drift_scheduler.partition import PartitionTable
from drift_scheduler.view import LoadView


@dataclass(frozen=True, slots=True)
class TakeTurns:
    """The whole device for one phase at a time, prefill first, whole batches."""

    table: PartitionTable
    decode_depth: int = 2

    def admit(self, view: LoadView, now_s: float) -> Admission | None:
        return None if view.prefill else Admission()

    def dispatch(self, view: LoadView, now_s: float) -> Plan:
        if view.prefill is not None:
            return Plan(self.table.whole, prefill_layers=view.prefill.layers_left)
        decode = view.running > 0 and view.takes_step(self.decode_depth)
        return Plan(self.table.whole, decode=decode)
