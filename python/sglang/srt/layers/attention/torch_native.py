"""Attention in plain PyTorch: for CPU, and the reference that GPU kernels are tested against."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import scaled_dot_product_attention

from sglang.srt.layers.attention.base import KVPool
from sglang.srt.model_config import ModelConfig
from sglang.srt.model_executor.forward_batch import ForwardBatch

# Queries of a prefill are taken in blocks, so that the mask and, where a kernel needs them, the
# scores stay small; a block also skips the keys behind its last query.
_BLOCK_TOKENS = 256


@dataclass(frozen=True, slots=True)
class _Request:
    """New tokens [first, last) of the batch; slots [seq_len] i32 of the whole sequence."""

    first: int
    last: int
    slots: torch.Tensor


@dataclass(frozen=True, slots=True)
class _Plan:
    """mask [block, columns] bool: see TorchNativeAttention._mask; None if no request needs one."""

    requests: list[_Request]
    mask: torch.Tensor | None


class TorchNativeAttention:
    """Gathers each request's keys and values from the pool and attends, request by request.

    Never reads a slot that is not in a request's own line of the slot table, so that whatever lies
    in free slots cannot reach a result, and a request's result does not depend on its neighbours.
    """

    name = "torch_native"

    def __init__(self, kv_pool: KVPool, config: ModelConfig) -> None:
        self._kv_pool = kv_pool
        self._num_kv_heads = config.num_kv_heads
        self._plan: _Plan | None = None
        self.planned: ForwardBatch | None = None

    def plan(self, batch: ForwardBatch) -> None:
        """Gathers the slots of every request, once for all layers."""
        longest = max(batch.seq_lens_host, default=0)
        slots = batch.slot_table[:, :longest].index_select(0, batch.rows)
        requests = []
        first = 0
        for index, (new, total) in enumerate(
            zip(batch.new_lens_host, batch.seq_lens_host, strict=True)
        ):
            requests.append(_Request(first, first + new, slots[index, :total]))
            first += new
        mask = None
        if max(batch.new_lens_host, default=0) > 1:
            rows, columns = _BLOCK_TOKENS, longest + _BLOCK_TOKENS
            mask = torch.ones((rows, columns), dtype=torch.bool, device=batch.rows.device)
            mask = mask.tril(longest)
        self._plan = _Plan(requests, mask)
        self.planned = batch

    def attend(
        self,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        batch: ForwardBatch,
    ) -> torch.Tensor:
        """See AttentionBackend.attend. The pool may be of another dtype than q."""
        assert self._plan is not None, "plan() must be called before attend()"
        keys, values = self._kv_pool.layer(layer)
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        for request in self._plan.requests:
            request_keys = keys.index_select(0, request.slots).to(q.dtype).transpose(0, 1)
            request_values = values.index_select(0, request.slots).to(q.dtype).transpose(0, 1)
            if request.last - request.first == 1:
                token = request.first
                out[token] = self._attend_one(q[token], request_keys, request_values)
            else:
                self._attend_many(out, q, request, request_keys, request_values)
        return out

    def _attend_one(
        self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> torch.Tensor:
        """q [q_heads, head_dim]; keys, values [kv_heads, seq, head_dim] -> like q.

        The query heads that share a KV head become its queries: no mask, and keys are read once.
        """
        grouped = q.view(1, self._num_kv_heads, -1, q.shape[-1])
        return scaled_dot_product_attention(grouped, keys[None], values[None]).reshape(q.shape)

    def _attend_many(
        self,
        out: torch.Tensor,
        q: torch.Tensor,
        request: _Request,
        keys: torch.Tensor,
        values: torch.Tensor,
    ) -> None:
        """Fills the request's rows of out [tokens, q_heads, head_dim], block by block."""
        for first in range(request.first, request.last, _BLOCK_TOKENS):
            last = min(first + _BLOCK_TOKENS, request.last)
            visible = keys.shape[1] - (request.last - last)
            attended = scaled_dot_product_attention(
                q[first:last].transpose(0, 1)[None],
                keys[None, :, :visible],
                values[None, :, :visible],
                attn_mask=self._mask(last - first, visible),
                enable_gqa=True,
            )
            out[first:last] = attended[0].transpose(0, 1)

    def _mask(self, queries: int, visible: int) -> torch.Tensor:
        """Causal mask [queries, visible] whose last query sees all, a view of the plan's mask.

        The plan's mask allows column j to row i where j <= i + longest, so shifting the columns
        gives every offset up to `longest` cached tokens.
        """
        assert self._plan is not None
        mask = self._plan.mask
        assert mask is not None
        end = mask.shape[1] - mask.shape[0] + queries
        return mask[:queries, end - visible : end]
