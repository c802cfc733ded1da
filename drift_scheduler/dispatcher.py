"""The decision of one turn: which partition, and what each worker may launch.

A dispatcher is a pure function of a frozen view and the time; it owns no engine state.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

from drift_scheduler.partition import Partition, PartitionTable


@dataclass(frozen=True, slots=True)
class PrefillView:
    """The prefill batch in flight.

    tokens: new tokens of the batch. layers_launched counts from the bottom. layer_s: measured
    mean time of its finished layers, None before the first has finished.
    """

    tokens: int
    layers_launched: int
    layers_total: int
    slices_in_flight: int
    layer_s: float | None

    @property
    def layers_left(self) -> int:
        return self.layers_total - self.layers_launched


@dataclass(frozen=True, slots=True)
class LoadView:
    """What a dispatcher may know.

    waiting: prompts that a launch could take up, the half-filled one included; waiting_tokens:
    their tokens that no launch has taken yet, prefixes that may be cached counted too.
    decode_step_s: time of the last settled step without prompt tokens, if any.
    """

    waiting: int
    running: int
    decode_in_flight: int
    prefill: PrefillView | None
    decode_step_s: float | None = None
    waiting_tokens: int = 0

    @property
    def can_fuse(self) -> bool:
        """Whether a step launched now could carry prompt tokens."""
        return self.waiting > 0 and self.prefill is None


@dataclass(frozen=True, slots=True)
class Plan:
    """What to launch now, on which partition: a decode step or not, prefill layers at most.

    fused_tokens: prompt tokens, at most, that ride in the decode step. Such a step has the whole
    device. It goes without them while a prefill batch is in flight (LoadView.can_fuse).
    """

    partition: Partition
    decode: bool = False
    prefill_layers: int = 0
    fused_tokens: int = 0

    def __post_init__(self) -> None:
        if self.fused_tokens == 0:
            return
        if not self.decode or not self.partition.exclusive or self.prefill_layers:
            raise ValueError(f"a fused step is a decode step alone on the whole device: {self}")
        if self.fused_tokens < 0:
            raise ValueError(f"fused_tokens={self.fused_tokens} must not be negative")


class Dispatcher(Protocol):
    def admits(self, view: LoadView, now_s: float) -> bool:
        """Whether a new prefill batch may be formed. Asked only with requests waiting and no
        prefill batch in flight."""
        ...

    def dispatch(self, view: LoadView, now_s: float) -> Plan:
        """What to launch. The view holds the prefill batch that `admits` let in, if any."""
        ...


# Slices launched and not finished: one that runs and one behind it, so that the lane never
# waits for the host, and never more, so that the plan can still change.
MAX_SLICES_IN_FLIGHT = 2


@dataclass(frozen=True, slots=True)
class TakeTurns:
    """The whole device for one phase at a time, prefill first: a server without multiplexing."""

    table: PartitionTable
    decode_depth: int = 2

    def admits(self, view: LoadView, now_s: float) -> bool:
        return True

    def dispatch(self, view: LoadView, now_s: float) -> Plan:
        if view.prefill is not None:
            return Plan(self.table.whole, prefill_layers=view.prefill.layers_left)
        decode = view.running > 0 and view.decode_in_flight < self.decode_depth
        return Plan(self.table.whole, decode=decode)


@dataclass(frozen=True, slots=True)
class Chunked:
    """Prompts ride in decode steps, on the whole device: what others call a mixed chunk.

    A step has at most `step_tokens` tokens, one of each running request and prompt tokens in what
    is left. With nothing waiting it is a plain decode step, with nothing running a chunk of
    `step_tokens`. While `step_tokens` requests or more are running no prompt goes on.
    """

    table: PartitionTable
    step_tokens: int
    decode_depth: int = 2

    def __post_init__(self) -> None:
        if self.step_tokens < 1:
            raise ValueError(f"step_tokens={self.step_tokens} must be at least 1")

    def admits(self, view: LoadView, now_s: float) -> bool:
        return False

    def dispatch(self, view: LoadView, now_s: float) -> Plan:
        room = max(self.step_tokens - view.running, 0) if view.can_fuse else 0
        decode = (view.running > 0 or room > 0) and view.decode_in_flight < self.decode_depth
        return Plan(self.table.whole, decode=decode, fused_tokens=room if decode else 0)


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

    def admits(self, view: LoadView, now_s: float) -> bool:
        return True

    def dispatch(self, view: LoadView, now_s: float) -> Plan:
        both = view.running > 0 and view.prefill is not None
        return Plan(
            self._split_for(view.running) if both else self.table.whole,
            decode=view.running > 0 and view.decode_in_flight < self.decode_depth,
            prefill_layers=self._layers(view, sliced=both),
        )

    def _split_for(self, decode_batch: int) -> Partition:
        position = sum(threshold <= decode_batch for threshold in self.thresholds)
        return self.table.splits[max(position - 1, 0)]

    def _layers(self, view: LoadView, sliced: bool) -> int:
        """Just enough layers to outlast a decode step, as in Drift: N_PL = ceil(T_d * L / T_p)."""
        prefill = view.prefill
        if prefill is None:
            return 0
        if not sliced:
            return prefill.layers_left
        if prefill.slices_in_flight >= MAX_SLICES_IN_FLIGHT:
            return 0
        if prefill.layer_s is None or view.decode_step_s is None:
            return min(prefill.layers_left, 1)
        enough = math.ceil(view.decode_step_s / max(prefill.layer_s, 1e-6))
        budget = self.layer_token_budget // max(prefill.tokens, 1)
        return min(prefill.layers_left, max(enough, 1), max(budget, 1))


def even_thresholds(splits: int, batch_size_for_last: int) -> tuple[int, ...]:
    """Thresholds that rise evenly up to batch_size_for_last, where the last split begins."""
    return (1, *(-(-batch_size_for_last * (i + 1) // splits) for i in range(1, splits)))
