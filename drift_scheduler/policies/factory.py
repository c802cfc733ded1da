"""PolicyFactory: a dispatcher for what a flag or an endpoint names."""

from __future__ import annotations

from dataclasses import dataclass

from drift_scheduler.dispatcher import Dispatcher
from drift_scheduler.partition import Partition, PartitionTable
from drift_scheduler.policies.adaptive import DEFAULT_TBT_S, Adaptive
from drift_scheduler.policies.by_batch_size import SplitByBatchSize, even_thresholds
from drift_scheduler.policies.chunked import Chunked
from drift_scheduler.policies.latency_model import LatencyModel, WithoutGuard
from drift_scheduler.policies.modes import FUSED_STEP_TOKENS, Mode
from drift_scheduler.policies.names import (
    AdaptiveSpec,
    ChunkedSpec,
    StaticSpec,
    TableSpec,
    TemporalSpec,
    TurnsSpec,
    parse_policy,
)
from drift_scheduler.policies.static import StaticSplit
from drift_scheduler.policies.take_turns import TakeTurns
from drift_scheduler.policies.temporal import Temporal


@dataclass(frozen=True, slots=True)
class PolicyFactory:
    """What policies are made of.

    model: None where latencies are not known; then adaptive and temporal are refused.
    max_batch_tokens: new tokens of a prefill batch, and of a step of "chunked" without a number.
    decode_depth: 2 launches a step while the one before it runs, 1 does not. max_step_tokens,
    sheds: see Adaptive.
    thresholds: of "table", one a split; even ones up to batch_size_for_last if None.
    """

    table: PartitionTable
    model: LatencyModel | None
    num_layers: int
    max_batch_tokens: int
    decode_depth: int = 2
    max_step_tokens: int = FUSED_STEP_TOKENS[-1]
    sheds: bool = False
    default_tbt_s: float = DEFAULT_TBT_S
    thresholds: tuple[int, ...] | None = None
    batch_size_for_last: int = 36
    layer_token_budget: int = 65536

    def make(self, text: str) -> Dispatcher:
        """See names.py. Raises ValueError that says what is wrong with the text."""
        match parse_policy(text):
            case AdaptiveSpec() as spec:
                return self._adaptive(spec)
            case StaticSpec(prefill_sms, decode_sms):
                split = self._split(prefill_sms, decode_sms)
                return StaticSplit(self.table, split, self.decode_depth)
            case ChunkedSpec(step_tokens):
                return Chunked(self.table, step_tokens or self.max_batch_tokens, self.decode_depth)
            case TemporalSpec():
                return Temporal(self.table, self._latencies("temporal"), self.default_tbt_s)
            case TableSpec():
                return self._by_batch_size()
            case TurnsSpec():
                return TakeTurns(self.table, self.decode_depth)

    def _adaptive(self, spec: AdaptiveSpec) -> Adaptive:
        model = self._latencies("adaptive")
        return Adaptive(
            self.table,
            model if spec.guard else WithoutGuard(model),
            self.num_layers,
            self.max_batch_tokens,
            decode_depth=self.decode_depth,
            max_step_tokens=self.max_step_tokens,
            sheds=self.sheds,
            modes=spec.modes if self.table.splits else spec.modes - {Mode.SPLIT},
            slices=spec.slices,
            polls=spec.polls,
        )

    def _latencies(self, name: str) -> LatencyModel:
        if self.model is None:
            raise ValueError(f"policy {name} needs a latency model, and none was fitted")
        return self.model

    def _split(self, prefill_sms: int, decode_sms: int) -> Partition:
        for split in self.table.splits:
            if (split.prefill_sms, split.decode_sms) == (prefill_sms, decode_sms):
                return split
        offered = ", ".join(f"{s.prefill_sms}/{s.decode_sms}" for s in self.table.splits)
        raise ValueError(f"no partition {prefill_sms}/{decode_sms}; there are {offered or 'none'}")

    def _by_batch_size(self) -> SplitByBatchSize:
        splits = len(self.table.splits)
        if not splits:
            raise ValueError("policy table needs partitions, and there are none")
        return SplitByBatchSize(
            self.table,
            self.thresholds or even_thresholds(splits, self.batch_size_for_last),
            layer_token_budget=self.layer_token_budget,
            decode_depth=self.decode_depth,
        )
