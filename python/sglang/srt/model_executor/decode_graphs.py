"""DecodeGraphs: decode steps as CUDA graphs, by lane and padded batch size.

A graph keeps the SMs of the stream it was captured on, so every decode lane needs its own. What
they read and write is shared: decode steps run one behind the other whatever their lane, so one
set of inputs and outputs and one memory pool serve all of them, and a graph costs little more than
its nodes.

A graph covers a step from the slot table to the likeliest tokens, which it leaves in the relay
table for the next step. Only what a step seldom needs stays outside: a slot table that lacks more
than the new tokens, and random sampling, which starts from the graph's logits.
"""

from __future__ import annotations

import bisect
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from drift_scheduler.lane import Lane
from sglang.srt.layers.attention.base import KVPool
from sglang.srt.layers.attention.triton_backend import TritonAttention
from sglang.srt.layers.matmul.base import Matmul
from sglang.srt.layers.on_device import pinned_copy
from sglang.srt.layers.sampler import likeliest
from sglang.srt.mem_cache.slot_table import PADDING_ROW
from sglang.srt.model_executor.forward_batch import ForwardBatch
from sglang.srt.model_executor.host_batch import HostBatch
from sglang.srt.models.base import CausalLM, LayerContext

logger = logging.getLogger(__name__)

PADDING_SLOT = 0
CAPTURE_LIMIT_S = 60.0


def default_sizes(max_reqs: int) -> list[int]:
    """Padded batch sizes up to max_reqs: dense where a step is short, and max_reqs itself."""
    sizes = [1, 2, 4, 8, 16, 24, 32, 48, 64, *range(96, max_reqs, 32)]
    return [size for size in sizes if size < max_reqs] + [max_reqs]


class StepOutput(NamedTuple):
    """Of every request of a step; holds until the next replay.

    rows, positions [reqs] i64: of the token that the step computed. logits [reqs, vocab_size] of
    the model's dtype, tokens [reqs] i64 the likeliest of each.
    """

    rows: torch.Tensor
    positions: torch.Tensor
    logits: torch.Tensor
    tokens: torch.Tensor


class DecodeGraphs:
    """Captured once at start.

    `attention` belongs to the graphs alone: they keep the address of its scratch, which must be
    reserved for the largest size at the longest context. matmuls: by partition index.
    """

    def __init__(
        self,
        model: CausalLM,
        kv_pool: KVPool,
        attention: TritonAttention,
        matmuls: Mapping[int, Matmul],
        slot_table: torch.Tensor,
        relay: torch.Tensor,
        sizes: Sequence[int],
    ) -> None:
        self._model = model
        self._kv_pool = kv_pool
        self._attention = attention
        self._matmuls = matmuls
        self._slot_table = slot_table
        self._relay = relay
        self._sizes = sorted(sizes)
        largest = self._sizes[-1]
        # One buffer for every size: int64 [4, size] is copied to its front, packed.
        self._buffer = torch.zeros(4 * largest, dtype=torch.int64, device=relay.device)
        config = model.config
        self._logits = torch.empty(
            (largest, config.vocab_size), dtype=config.dtype, device=relay.device
        )
        self._tokens = torch.zeros(largest, dtype=torch.int64, device=relay.device)
        self._graphs: dict[tuple[int, int], torch.cuda.CUDAGraph] = {}

    def size_for(self, reqs: int) -> int | None:
        """The smallest captured size that holds `reqs` requests; None if none does."""
        position = bisect.bisect_left(self._sizes, reqs)
        return self._sizes[position] if position < len(self._sizes) else None

    def capture(
        self, lanes: Sequence[Lane], on_progress: Callable[[], None] = lambda: None
    ) -> None:
        """Captures every size on every lane, largest first so that the pool is sized once."""
        started_s = time.perf_counter()
        free_before, total = torch.cuda.mem_get_info(self._relay.device)
        pool = torch.cuda.graph_pool_handle()
        for lane in lanes:
            for size in reversed(self._sizes):
                self._capture_one(lane, size, pool)
                on_progress()
        free_after, _ = torch.cuda.mem_get_info(self._relay.device)
        taken = free_before - free_after
        logger.info(
            "Captured %d decode graphs (%d lanes x %d batch sizes up to %d) in %.1f s,"
            " %.2f GB, %.1f %% of the device's memory",
            len(self._graphs),
            len(lanes),
            len(self._sizes),
            self._sizes[-1],
            time.perf_counter() - started_s,
            taken / 1e9,
            100 * taken / total,
        )

    def replay(self, lane: Lane, host: HostBatch) -> StepOutput:
        """Runs the step on the current stream, which is the lane's."""
        reqs = len(host.rows)
        size = self.size_for(reqs)
        assert size is not None, f"{reqs} requests exceed the largest graph"
        packed = np.zeros((4, size), dtype=np.int64)
        packed[0, :reqs] = host.token_slots
        packed[1, :reqs] = host.positions
        packed[2, :reqs] = host.rows
        packed[3] = 1
        packed[3, :reqs] = host.seq_lens
        self._load(packed)
        self._graphs[lane.partition.index, size].replay()
        _, positions, rows, _ = self._buffer[: 4 * size].view(4, size)
        return StepOutput(rows[:reqs], positions[:reqs], self._logits[:reqs], self._tokens[:reqs])

    def _load(self, packed: np.ndarray[tuple[int, ...], np.dtype[np.int64]]) -> None:
        pinned = pinned_copy(packed.reshape(-1))
        self._buffer[: pinned.numel()].copy_(pinned, non_blocking=True)

    def _capture_one(self, lane: Lane, size: int, pool: Any) -> None:
        padding = np.zeros((4, size), dtype=np.int64)
        padding[0] = PADDING_SLOT
        padding[2] = PADDING_ROW
        padding[3] = 1

        def work() -> None:
            self._load(padding)
            # Once outside: kernels compile and workspaces are taken where no graph would own them.
            self._step(size, lane)
            graph = torch.cuda.CUDAGraph()
            graph.capture_begin(pool=pool)
            try:
                self._step(size, lane)
            finally:
                graph.capture_end()
            self._graphs[lane.partition.index, size] = graph

        lane.launch(work).wait(CAPTURE_LIMIT_S)

    def _step(self, size: int, lane: Lane) -> None:
        slots, positions, rows, seq_lens = self._buffer[: 4 * size].view(4, size)
        slot_table = self._slot_table
        # Lengths are planned at the longest: a graph serves every length up to it.
        longest = slot_table.shape[1]
        slot_table.view(-1)[rows * longest + positions] = slots.to(torch.int32)
        batch = ForwardBatch(
            decode_reqs=size,
            token_slots=slots,
            positions=positions,
            rows=rows,
            seq_lens=seq_lens.to(torch.int32),
            new_lens=torch.ones(size, dtype=torch.int32, device=rows.device),
            new_starts=torch.arange(size + 1, dtype=torch.int32, device=rows.device),
            slot_table=slot_table,
            new_lens_host=[1] * size,
            seq_lens_host=[longest] * size,
        )
        self._attention.num_sms = lane.sms
        self._attention.plan(batch)
        model = self._model
        context = LayerContext(
            batch, self._kv_pool, self._attention, self._matmuls[lane.partition.index]
        )
        state = model.run_layers(
            model.embed(self._relay[rows]), context, 0, model.config.num_layers
        )
        logits = model.logits(state, None, out=self._logits[:size])
        tokens = likeliest(logits, out=self._tokens[:size])
        self._relay[rows] = tokens
