"""PrefillGraphs: short batches that prefill, and fused steps, as CUDA graphs.

Up to about a thousand tokens a layer takes the GPU no longer than its launches take the host. Such
a batch is padded to the next of a few sizes, and all layers are one launch. Longer batches keep
the GPU busy while the host launches the next layers.

What the layers read is copied to fixed places before each replay: ids, positions and slots of the
tokens, and attention's plan. Padding stores to the scratch slot and is attended by nothing.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from drift_scheduler.lane import Lane
from sglang.srt.layers.attention.base import AttentionBackend, KVPool
from sglang.srt.layers.matmul.base import Matmul
from sglang.srt.mem_cache.slot_table import PADDING_ROW
from sglang.srt.model_executor.forward_batch import ForwardBatch
from sglang.srt.models.base import CausalLM, HiddenState, LayerContext

# A tile of attention is 128 tokens, and so is one of most matrix products.
TOKEN_SIZES = (128, 256, 384, 512, 640, 768, 1024)
MAX_PREFILL_REQS = 32
PADDING_SLOT = 0
CAPTURE_LIMIT_S = 60.0


@dataclass(frozen=True, slots=True)
class PrefillBounds:
    """What a batch may hold to fit a graph: tokens in all, requests of either kind."""

    tokens: int
    prefill_reqs: int
    decode_reqs: int


class PrefillGraphs:
    """The graphs of one lane, captured once at start.

    `attention` belongs to them alone, and is reserved for `bounds`: launches take the same
    arguments for every batch that was planned. Replays run in the order of launch.
    """

    def __init__(
        self,
        model: CausalLM,
        kv_pool: KVPool,
        attention: AttentionBackend,
        matmul: Matmul,
        slot_table: torch.Tensor,
        sizes: Sequence[int],
        bounds: PrefillBounds,
    ) -> None:
        self._model = model
        self._kv_pool = kv_pool
        self._attention = attention
        self._matmul = matmul
        self._slot_table = slot_table
        self._sizes = sorted(sizes)
        self._bounds = bounds
        config, device = model.config, slot_table.device
        largest = self._sizes[-1]
        self._ids, self._positions, self._slots = (
            torch.zeros(largest, dtype=torch.int64, device=device) for _ in range(3)
        )
        state = (2, largest, config.hidden_size)
        self._hidden, self._residual = torch.zeros(state, dtype=config.dtype, device=device)
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}

    def takes(self, tokens: int, reqs: int, decode_reqs: int) -> bool:
        """Whether a batch of so many tokens fits, with `decode_reqs` of its requests decoding."""
        bounds = self._bounds
        return (
            tokens <= min(bounds.tokens, self._sizes[-1])
            and reqs - decode_reqs <= bounds.prefill_reqs
            and decode_reqs <= bounds.decode_reqs
        )

    def capture(
        self, lane: Lane, memory: Any, on_progress: Callable[[], None] = lambda: None
    ) -> None:
        """Captures every size on the lane, largest first so that the pool is sized once.

        memory: a torch.cuda.graph_pool_handle(), shared with graphs whose replays never overlap
        these.
        """
        for size in reversed(self._sizes):
            lane.launch(lambda size=size: self._capture_one(size, memory)).wait(  # type: ignore[misc]
                CAPTURE_LIMIT_S
            )
            on_progress()

    def replay(self, input_ids: torch.Tensor, batch: ForwardBatch) -> HiddenState:
        """Embeds input_ids [tokens] i64 and runs all layers, on the current stream, which is the
        lane's. What it returns holds until the next replay."""
        count = batch.num_tokens
        size = self._sizes[bisect.bisect_left(self._sizes, count)]
        self._ids[:count].copy_(input_ids)
        self._positions[:count].copy_(batch.positions)
        self._slots[:count].copy_(batch.token_slots)
        self._positions[count:size].zero_()
        self._slots[count:size].fill_(PADDING_SLOT)
        self._attention.plan(batch)
        self._graphs[size].replay()
        return HiddenState(self._hidden[:count], self._residual[:count])

    def _capture_one(self, size: int, pool: Any) -> None:
        batch = self._padding(size)
        self._attention.plan(batch)
        # Once outside: kernels compile and workspaces are taken where no graph would own them.
        self._run(size, batch)
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(pool=pool)
        try:
            self._run(size, batch)
        finally:
            graph.capture_end()
        self._graphs[size] = graph

    def _run(self, size: int, batch: ForwardBatch) -> None:
        model = self._model
        context = LayerContext(batch, self._kv_pool, self._attention, self._matmul)
        state = model.embed(self._ids[:size])
        hidden, residual = model.run_layers(state, context, 0, model.config.num_layers)
        assert residual is not None, "a model has at least one layer"
        self._hidden[:size].copy_(hidden)
        self._residual[:size].copy_(residual)

    def _padding(self, size: int) -> ForwardBatch:
        """One request of `size` tokens, all of them padding."""
        device = self._slot_table.device

        def ints(*values: int) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.int32, device=device)

        return ForwardBatch(
            decode_reqs=0,
            token_slots=self._slots[:size].fill_(PADDING_SLOT),
            positions=self._positions[:size].zero_(),
            rows=ints(PADDING_ROW).long(),
            seq_lens=ints(size),
            new_lens=ints(size),
            new_starts=ints(0, size),
            slot_table=self._slot_table,
            new_lens_host=[size],
            seq_lens_host=[size],
        )
