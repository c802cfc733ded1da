"""The sizes that an engine pads batches to before they run, for the estimator."""

from __future__ import annotations

from drift_scheduler.lane import Phase
from drift_scheduler.partition import PartitionTable
from drift_scheduler.profile import PaddedSizes
from sglang.srt.model_executor.model_runner import ModelRunner
from sglang.srt.model_executor.prefill_graphs import TOKEN_SIZES


def padded_sizes(table: PartitionTable, runner: ModelRunner) -> PaddedSizes:
    """Of the graphs that the runner was given; empty where nothing was captured."""
    decode, prefill = runner.graphs, runner.prefill_graphs.get((Phase.PREFILL, table.whole.index))
    most_requests = len(runner.slot_table) - 1
    padded = {decode.size_for(reqs) for reqs in range(1, most_requests + 1)} if decode else set()
    return PaddedSizes(
        decode=tuple(sorted(size for size in padded if size is not None)),
        prefill=tuple(size for size in TOKEN_SIZES if prefill and prefill.takes(size, 1, 0)),
    )
