"""StaticSplit: one division of the device whenever both phases have work."""

from __future__ import annotations

from dataclasses import dataclass

from drift_scheduler.dispatcher import Admission, Plan
from drift_scheduler.partition import Partition, PartitionTable
from drift_scheduler.policies.slices import layers_to_outlast
from drift_scheduler.view import LoadView


@dataclass(frozen=True, slots=True)
class StaticSplit:
    """Both phases at once on `split`; with one absent the other has the whole device, unsliced."""

    table: PartitionTable
    split: Partition
    decode_depth: int = 2

    def admit(self, view: LoadView, now_s: float) -> Admission | None:
        return None if view.prefill else Admission()

    def dispatch(self, view: LoadView, now_s: float) -> Plan:
        prefill = view.prefill
        decode = view.running > 0 and view.takes_step(self.decode_depth)
        if prefill is None or not view.running:
            layers = prefill.layers_left if prefill else 0
            return Plan(self.table.whole, decode=decode, prefill_layers=layers)
        layers = layers_to_outlast(prefill, view.decode_step_s, prefill.layer_s)
        return Plan(self.split, decode=decode, prefill_layers=layers)
