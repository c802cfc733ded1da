"""DecodeRows: attention of the requests that decode, in a batch that may prefill others too."""

from __future__ import annotations

import torch

from sgl_kernel.decode_attention import DecodeScratch, decode_attention
from sgl_kernel.decode_cut import chunks_needed
from sgl_kernel.paged_batch import PagedBatch
from sglang.srt.layers.attention.base import KVPool
from sglang.srt.mem_cache.slot_table import PADDING_ROW
from sglang.srt.model_config import ModelConfig
from sglang.srt.model_executor.forward_batch import ForwardBatch


class DecodeRows:
    """Our split-KV kernel over a batch's leading requests; one lane's, since it owns scratch.

    A row gets the same bits whatever else is in the batch.
    """

    def __init__(self, kv_pool: KVPool, config: ModelConfig, num_sms: int) -> None:
        """num_sms, the lane's SM count, sets the grid and no result."""
        keys, _ = kv_pool.layer(0)
        self._kv_pool = kv_pool
        self._num_heads = config.num_heads
        self._head_dim = config.head_dim
        self._num_sms = num_sms
        self._device = keys.device
        self._scratch = self._allocate(0)
        self._requests: PagedBatch | None = None
        self._is_reserved = False

    def reserve(self, max_reqs: int, scratch: DecodeScratch, slot_table: torch.Tensor) -> None:
        """From now on launches of any planned batch of up to max_reqs take the same arguments, so
        that a graph of them serves all. scratch: room for all; nothing else may run on it."""
        self._scratch = scratch
        self._requests = PagedBatch(
            slot_table,
            torch.full((max_reqs,), PADDING_ROW, dtype=torch.int64, device=self._device),
            torch.zeros(max_reqs, dtype=torch.int32, device=self._device),
            torch.zeros(max_reqs + 1, dtype=torch.int32, device=self._device),
        )
        self._is_reserved = True

    def plan(self, batch: ForwardBatch) -> None:
        """Takes the first batch.decode_reqs requests. Grows the scratch if need be; launches
        nothing."""
        if self._is_reserved:
            self._refill(batch)
            return
        count = batch.decode_reqs
        lengths = batch.seq_lens_host[:count]
        chunks = chunks_needed(lengths)
        if chunks > self._scratch.chunks:
            # Launches of this stream may still read the old scratch; the allocator reuses freed
            # memory in stream order, so dropping it here is safe.
            self._scratch = self._allocate(max(chunks, 2 * self._scratch.chunks))
        self._requests = PagedBatch(
            batch.slot_table,
            batch.rows[:count],
            batch.seq_lens[:count],
            batch.new_starts[: count + 1],
        )

    def _refill(self, batch: ForwardBatch) -> None:
        """Puts the requests into the reserved tensors. Those behind them have no new token, and
        the kernel leaves them out."""
        requests, count = self._requests, batch.decode_reqs
        assert requests is not None
        requests.rows[:count].copy_(batch.rows[:count])
        requests.seq_lens[:count].copy_(batch.seq_lens[:count])
        requests.new_starts[: count + 1].copy_(batch.new_starts[: count + 1])
        requests.new_starts[count + 1 :].fill_(count)

    def attend(self, layer: int, q: torch.Tensor, out: torch.Tensor) -> None:
        """Writes the requests' rows of out, which are its first, and no others.

        q, out [tokens, q_heads, head_dim]; the new keys and values lie in the pool already.
        """
        assert self._requests is not None, "plan() must be called before attend()"
        keys, values = self._kv_pool.layer(layer)
        decode_attention(
            q,
            keys,
            values,
            self._requests,
            out,
            self._scratch,
            scale=self._head_dim**-0.5,
            num_sms=self._num_sms,
        )

    def _allocate(self, chunks: int) -> DecodeScratch:
        return DecodeScratch.allocate(chunks, self._num_heads, self._head_dim, self._device)
