"""DecodeGraphs: decode steps as CUDA graphs, by lane and padded batch size.

A graph keeps the SMs of the stream it was captured on, so every decode lane needs its own. What
they read and write is shared: decode steps run one behind the other whatever their lane, so one
set of inputs and one memory pool serve all of them, and a graph costs little more than its nodes.

A graph covers the embedding and all layers. The slot table's update, the LM head and sampling
stay outside: their shapes vary, and they are few launches.
"""

from __future__ import annotations

import bisect
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from drift_scheduler.lane import Lane
from sglang.srt.layers.attention.triton_backend import TritonAttention
from sglang.srt.mem_cache.slot_table import PADDING_ROW
from sglang.srt.model_executor.forward_batch import ForwardBatch
from sglang.srt.model_executor.host_batch import HostBatch
from sglang.srt.models.base import CausalLM, HiddenState

logger = logging.getLogger(__name__)

PADDING_SLOT = 0
CAPTURE_LIMIT_S = 60.0


def default_sizes(max_reqs: int) -> list[int]:
    """Padded batch sizes up to max_reqs: dense where a step is short, and max_reqs itself."""
    sizes = [1, 2, 4, 8, 16, 24, 32, 48, 64, *range(96, max_reqs, 32)]
    return [size for size in sizes if size < max_reqs] + [max_reqs]


@dataclass(frozen=True, slots=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    state: HiddenState


class DecodeGraphs:
    """Captured once at start. `attention` belongs to the graphs alone: they keep the address of
    its scratch, which must be reserved for the largest size at the longest context."""

    def __init__(
        self,
        model: CausalLM,
        attention: TritonAttention,
        slot_table: torch.Tensor,
        relay: torch.Tensor,
        sizes: Sequence[int],
    ) -> None:
        self._model = model
        self._attention = attention
        self._slot_table = slot_table
        self._relay = relay
        self._sizes = sorted(sizes)
        # One buffer for every size: int64 [4, size] is copied to its front, packed.
        self._buffer = torch.zeros(4 * self._sizes[-1], dtype=torch.int64, device=relay.device)
        self._graphs: dict[tuple[int, int], _Captured] = {}

    def size_for(self, reqs: int) -> int | None:
        """The smallest captured size that holds `reqs` requests; None if none does."""
        position = bisect.bisect_left(self._sizes, reqs)
        return self._sizes[position] if position < len(self._sizes) else None

    def capture(
        self, lanes: Sequence[Lane], on_progress: Callable[[], None] = lambda: None
    ) -> None:
        """Captures every size on every lane, largest first so that the pool is sized once."""
        started_s = time.perf_counter()
        free_before, _ = torch.cuda.mem_get_info(self._relay.device)
        pool = torch.cuda.graph_pool_handle()
        for lane in lanes:
            for size in reversed(self._sizes):
                self._capture_one(lane, size, pool)
                on_progress()
        free_after, _ = torch.cuda.mem_get_info(self._relay.device)
        logger.info(
            "Captured %d decode graphs (%d lanes x %d batch sizes up to %d) in %.1f s, %.2f GB",
            len(self._graphs),
            len(lanes),
            len(self._sizes),
            self._sizes[-1],
            time.perf_counter() - started_s,
            (free_before - free_after) / 1e9,
        )

    def replay(self, lane: Lane, host: HostBatch) -> HiddenState:
        """Runs the step on the current stream, which is the lane's.

        Returns the last layer's state for the first host.rows.size tokens; it holds until the
        next replay.
        """
        reqs = len(host.rows)
        size = self.size_for(reqs)
        assert size is not None, f"{reqs} requests exceed the largest graph"
        captured = self._graphs[lane.partition.index, size]
        packed = np.zeros((4, size), dtype=np.int64)
        packed[0, :reqs] = host.token_slots
        packed[1, :reqs] = host.positions
        packed[2, :reqs] = host.rows
        packed[3] = 1
        packed[3, :reqs] = host.seq_lens
        self._load(packed)
        captured.graph.replay()
        hidden, residual = captured.state
        return HiddenState(hidden[:reqs], None if residual is None else residual[:reqs])

    def _load(self, packed: np.ndarray[tuple[int, ...], np.dtype[np.int64]]) -> None:
        pinned = torch.from_numpy(packed.reshape(-1)).pin_memory()
        self._buffer[: pinned.numel()].copy_(pinned, non_blocking=True)

    def _capture_one(self, lane: Lane, size: int, pool: Any) -> None:
        padding = np.zeros((4, size), dtype=np.int64)
        padding[0] = PADDING_SLOT
        padding[2] = PADDING_ROW
        padding[3] = 1

        def work() -> None:
            self._load(padding)
            # Once outside: kernels compile and workspaces are taken where no graph would own them.
            self._step(size, lane.sms)
            graph = torch.cuda.CUDAGraph()
            graph.capture_begin(pool=pool)
            try:
                state = self._step(size, lane.sms)
            finally:
                graph.capture_end()
            self._graphs[lane.partition.index, size] = _Captured(graph, state)

        lane.launch(work).wait(CAPTURE_LIMIT_S)

    def _step(self, size: int, num_sms: int) -> HiddenState:
        slots, positions, rows, seq_lens = self._buffer[: 4 * size].view(4, size)
        # Lengths are planned at the longest: a graph serves every length up to it.
        longest = self._slot_table.shape[1]
        ones = torch.ones(size, dtype=torch.int32, device=rows.device)
        batch = ForwardBatch(
            decode_reqs=size,
            token_slots=slots,
            positions=positions,
            rows=rows,
            seq_lens=seq_lens.to(torch.int32),
            new_lens=ones,
            new_starts=torch.arange(size + 1, dtype=torch.int32, device=rows.device),
            slot_table=self._slot_table,
            new_lens_host=[1] * size,
            seq_lens_host=[longest] * size,
        )
        self._attention.num_sms = num_sms
        self._attention.plan(batch)

        def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return self._attention.attend(layer, q, k, v, batch)

        model = self._model
        state = model.embed(self._relay[rows])
        return model.run_layers(state, positions, attend, 0, model.config.num_layers)
