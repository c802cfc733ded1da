"""The sizes that batches are padded to before they run, for the estimator."""

from __future__ import annotations

from typing import NamedTuple

from drift_scheduler.lane import Phase
from drift_scheduler.partition import PartitionTable
from sglang.srt.model_executor.model_runner import ModelRunner
from sglang.srt.model_executor.prefill_graphs import TOKEN_SIZES


class GraphSizes(NamedTuple):
    """Rising. decode_sizes: requests of a step. prefill_sizes: tokens of a short batch on the
    whole device. Empty where nothing was captured."""

    decode_sizes: tuple[int, ...] = ()
    prefill_sizes: tuple[int, ...] = ()


def graph_sizes(table: PartitionTable, runner: ModelRunner) -> GraphSizes:
    """Of the graphs that the runner was given."""
    decode, prefill = runner.graphs, runner.prefill_graphs.get((Phase.PREFILL, table.whole.index))
    most_requests = len(runner.slot_table) - 1
    padded = {decode.size_for(reqs) for reqs in range(1, most_requests + 1)} if decode else set()
    return GraphSizes(
        tuple(sorted(size for size in padded if size is not None)),
        tuple(size for size in TOKEN_SIZES if prefill and prefill.takes(size, 1, 0)),
    )
