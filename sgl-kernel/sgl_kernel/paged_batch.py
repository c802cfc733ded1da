"""What attention over a paged cache needs to know about a batch."""

from __future__ import annotations

from typing import NamedTuple

import torch


class PagedBatch(NamedTuple):
    """Which slots every request of a batch sees; all tensors contiguous, on one device.

    Request i owns the query tokens new_starts[i] .. new_starts[i + 1] - 1, which are the last ones
    of its seq_lens[i] tokens; token j of it lives in slot slot_table[rows[i], j].

    slot_table [rows, context] i32. rows [reqs] i64. seq_lens [reqs] i32. new_starts [reqs + 1] i32.
    """

    slot_table: torch.Tensor
    rows: torch.Tensor
    seq_lens: torch.Tensor
    new_starts: torch.Tensor

    @property
    def num_reqs(self) -> int:
        return int(self.rows.shape[0])


def check_attention_args(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    out: torch.Tensor,
    batch: PagedBatch,
) -> None:
    """Raises ValueError where shapes, dtypes or strides do not fit the attention kernels."""
    num_heads, head_dim = q.shape[1:]
    num_kv_heads = k_cache.shape[1]
    if num_heads % num_kv_heads:
        raise ValueError(f"{num_heads} query heads are no multiple of {num_kv_heads} kv heads")
    if k_cache.shape != v_cache.shape or k_cache.stride() != v_cache.stride():
        raise ValueError("k_cache and v_cache must have one shape and one set of strides")
    if k_cache.shape[2] != head_dim or out.shape != q.shape:
        raise ValueError(
            f"q {tuple(q.shape)}, out {tuple(out.shape)}, cache {tuple(k_cache.shape)}"
        )
    if not q.dtype == k_cache.dtype == v_cache.dtype == out.dtype:
        raise ValueError(f"q is {q.dtype}, cache {k_cache.dtype}/{v_cache.dtype}, out {out.dtype}")
    if not q.stride(2) == k_cache.stride(2) == out.stride(2) == 1:
        raise ValueError("the head dimension must be contiguous in q, out and the cache")
    if batch.slot_table.dtype != torch.int32 or batch.slot_table.stride(1) != 1:
        raise ValueError("slot_table must be i32 with contiguous rows")
