"""SplitByBatchSize: the device divided by a table of decode batch sizes, as upstream's pdmux."""

from __future__ import annotations

from dataclasses import dataclass

from drift_scheduler.dispatcher import Admission, Plan
from drift_scheduler.partition import Partition, PartitionTable
from drift_scheduler.policies.slices import layers_to_outlast
from drift_scheduler.view import LoadView


@dataclass(frozen=True, slots=True)
class SplitByBatchSize:
    """Both phases at once; the decode share is read from a table of decode batch sizes.

    thresholds[i] is the smallest decode batch for splits[i]; a batch below all of them uses the
    first. With one phase absent the other gets the whole device and is not sliced.
    layer_token_budget caps a slice: layers x new tokens.
    """

    table: PartitionTable
    thresholds: tuple[int, ...]
    layer_token_budget: int = 65536
    decode_depth: int = 2

    def __post_init__(self) -> None:
        if len(self.thresholds) != len(self.table.splits) or not self.thresholds:
            raise ValueError(
                f"{len(self.thresholds)} thresholds for {len(self.table.splits)} splits"
            )
        if list(self.thresholds) != sorted(self.thresholds):
            raise ValueError(f"thresholds {self.thresholds} are not sorted")

    def admit(self, view: LoadView, now_s: float) -> Admission | None:
        return None if view.prefill else Admission()

    def dispatch(self, view: LoadView, now_s: float) -> Plan:
        prefill = view.prefill
        both = view.running > 0 and prefill is not None
        layers = 0
        if prefill is not None:
            layers = self._slice(view) if both else prefill.layers_left
        return Plan(
            self._split_for(view.running) if both else self.table.whole,
            decode=view.running > 0 and view.takes_step(self.decode_depth),
            prefill_layers=layers,
        )

    def _split_for(self, decode_batch: int) -> Partition:
        position = sum(threshold <= decode_batch for threshold in self.thresholds)
        return self.table.splits[max(position - 1, 0)]

    def _slice(self, view: LoadView) -> int:
        prefill = view.prefill
        assert prefill is not None
        budget = self.layer_token_budget // max(prefill.tokens, 1)
        enough = layers_to_outlast(prefill, view.decode_step_s, prefill.layer_s)
        return min(enough, max(budget, 1))


def even_thresholds(splits: int, batch_size_for_last: int) -> tuple[int, ...]:
    """Thresholds that rise evenly up to batch_size_for_last, where the last split begins."""
    return (1, *(-(-batch_size_for_last * (i + 1) // splits) for i in range(1, splits)))
