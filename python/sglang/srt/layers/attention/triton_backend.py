"""Attention through our Triton kernels: paged prefill, split-KV decode, and both in one batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sgl_kernel.decode_attention import DecodeScratch, decode_attention
from sgl_kernel.decode_cut import chunks_needed, most_chunks
from sgl_kernel.paged_batch import PagedBatch
from sgl_kernel.prefill_attention import prefill_attention
from sglang.srt.errors import ConfigError
from sglang.srt.layers.attention.base import KVPool
from sglang.srt.model_config import ModelConfig
from sglang.srt.model_executor.forward_batch import ForwardBatch

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MAX_HEAD_DIM = 256


@dataclass(frozen=True, slots=True)
class _Plan:
    """What launches a batch takes. Requests with one new token always go the decode way, so that
    a decode row gets the same bits alone as in a batch that also carries a prefill."""

    has_decode: bool
    max_new_tokens: int


class TritonAttention:
    """One lane's attention. It owns the lane's decode scratch; two lanes need two instances.

    num_sms, the lane's SM count, sets the decode grid and no result; it may be changed between
    batches, when the lane moves to another partition.
    """

    name = "triton"

    def __init__(self, kv_pool: KVPool, config: ModelConfig, num_sms: int) -> None:
        """Raises ConfigError if the kernels do not take the model's dtype or head size."""
        keys, _ = kv_pool.layer(0)
        if config.dtype not in _DTYPES or keys.dtype != config.dtype:
            raise ConfigError(
                f"--attention-backend triton takes float32, bfloat16 or float16 and a KV cache of"
                f" the model's dtype; the model is {config.dtype}, its KV cache {keys.dtype}"
            )
        if config.head_dim > _MAX_HEAD_DIM:
            raise ConfigError(
                f"--attention-backend triton takes heads of up to {_MAX_HEAD_DIM} elements;"
                f" {config.architecture} has {config.head_dim}"
            )
        self.num_sms = num_sms
        self._kv_pool = kv_pool
        self._num_heads = config.num_heads
        self._head_dim = config.head_dim
        self._scale = config.head_dim**-0.5
        self._device = keys.device
        self._scratch = self._allocate_scratch(0)
        self._scratch_is_fixed = False
        self._plan: _Plan | None = None
        self.planned: ForwardBatch | None = None

    def reserve(self, max_reqs: int, max_seq_len: int) -> None:
        """Takes scratch for any decode batch within these bounds and never moves it again.

        To be called before the first graph is captured, since graphs keep its address. Later
        batches outside the bounds are an assertion. A graph must be captured after plan() of a
        batch whose seq_lens_host has the longest length that it will ever replay.
        """
        assert not self._scratch_is_fixed, "reserve() may be called once"
        self._scratch = self._allocate_scratch(max_reqs * most_chunks(max_seq_len))
        self._scratch_is_fixed = True

    @property
    def scratch(self) -> DecodeScratch:
        """For others that never run at the same time; after reserve(), for good."""
        return self._scratch

    def plan(self, batch: ForwardBatch) -> None:
        """See AttentionBackend.plan. Grows the scratch if need be; launches nothing."""
        decode_lens = [
            seq_len
            for seq_len, new_len in zip(batch.seq_lens_host, batch.new_lens_host, strict=True)
            if new_len == 1
        ]
        chunks = chunks_needed(decode_lens)
        if chunks > self._scratch.chunks:
            assert not self._scratch_is_fixed, (
                f"{chunks} chunks exceed the {self._scratch.chunks} that were reserved"
            )
            # The old scratch may still be read by launches of this stream; the allocator reuses
            # freed memory in stream order, so dropping it here is safe.
            self._scratch = self._allocate_scratch(max(chunks, 2 * self._scratch.chunks))
        self._plan = _Plan(
            has_decode=bool(decode_lens),
            max_new_tokens=max(batch.new_lens_host, default=0),
        )
        self.planned = batch

    def attend(
        self,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        batch: ForwardBatch,
    ) -> torch.Tensor:
        """See AttentionBackend.attend."""
        plan = self._plan
        assert plan is not None, "plan() must be called before attend()"
        keys, values = self._kv_pool.layer(layer)
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        paged = PagedBatch(batch.slot_table, batch.rows, batch.seq_lens, batch.new_starts)
        if plan.has_decode:
            decode_attention(
                q,
                keys,
                values,
                paged,
                out,
                self._scratch,
                scale=self._scale,
                num_sms=self.num_sms,
            )
        if plan.max_new_tokens > 1:
            prefill_attention(
                q,
                keys,
                values,
                paged,
                out,
                scale=self._scale,
                max_new_tokens=plan.max_new_tokens,
                min_new_tokens=2,
            )
        return out

    def _allocate_scratch(self, chunks: int) -> DecodeScratch:
        return DecodeScratch.allocate(chunks, self._num_heads, self._head_dim, self._device)
