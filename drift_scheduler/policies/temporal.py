"""Temporal: the phases take turns on the whole device, a decode step and then some layers."""

from __future__ import annotations

import math
from dataclasses import dataclass

from drift_scheduler.dispatcher import Admission, Plan
from drift_scheduler.partition import PartitionTable
from drift_scheduler.policies.latency_model import LatencyModel
from drift_scheduler.view import LoadView


@dataclass(frozen=True, slots=True)
class Temporal:
    """After each decode step as many prefill layers as the next token's deadline leaves room for,
    and at least one. tbt_s: where a request asks for none."""

    table: PartitionTable
    model: LatencyModel
    tbt_s: float

    def admit(self, view: LoadView, now_s: float) -> Admission | None:
        return None if view.prefill else Admission()

    def dispatch(self, view: LoadView, now_s: float) -> Plan:
        whole = self.table.whole
        prefill = view.prefill
        if prefill is None:
            decode = view.running > 0 and view.takes_step(2)
            return Plan(whole, decode=decode)
        if not view.running:
            return Plan(whole, prefill_layers=prefill.layers_left)
        if view.decode_in_flight or prefill.slices_in_flight > 1:
            return Plan(whole)
        step = self.model.decode(view.decode, whole, None)
        layer = self.model.prefill(prefill.shape, whole, None).times(1 / prefill.layers_total)
        tbt_s = view.tbt_s if math.isfinite(view.tbt_s) else self.tbt_s
        layers = max(1, int((tbt_s - step.worst_s) / layer.worst_s))
        return Plan(
            whole,
            decode=True,
            prefill_layers=min(layers, prefill.layers_left),
            step=step,
            layer=layer,
            reason="turns",
        )
