# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc"
"""Causal attention of new tokens over a paged cache with one token a page.

The query heads that share a kv head are packed into the rows of one tile, token by token:

    tile row   0       1       2       3       4       ...
    token      0       0       0       1       1       ...      (3 query heads a kv head)
    head       3h      3h+1    3h+2    3h      3h+1    ...

so short prompts fill tiles too, any ratio of heads does, and only few keys of a tile need a mask.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from sgl_kernel.online_softmax import fold_block
from sgl_kernel.paged_batch import PagedBatch, check_attention_args


def prefill_attention_ref(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    batch: PagedBatch,
    *,
    scale: float,
) -> torch.Tensor:
    """What prefill_attention does, in plain torch and float64 [tokens, q_heads, head_dim]."""
    out = torch.zeros(q.shape, dtype=torch.float64, device=q.device)
    group = q.shape[1] // k_cache.shape[1]
    starts = batch.new_starts.tolist()
    for req, seq_len in enumerate(batch.seq_lens.tolist()):
        first, end = starts[req], starts[req + 1]
        slots = batch.slot_table[batch.rows[req], :seq_len].long()
        keys = k_cache[slots].double().repeat_interleave(group, dim=1)
        values = v_cache[slots].double().repeat_interleave(group, dim=1)
        scores = torch.einsum("qhd,khd->hqk", q[first:end].double(), keys) * scale
        positions = torch.arange(seq_len, device=q.device)
        visible = positions[None, :] <= positions[seq_len - (end - first) :, None]
        weights = scores.masked_fill(~visible, -math.inf).softmax(dim=-1)
        out[first:end] = torch.einsum("hqk,khd->qhd", weights, values)
    return out


class _Tile(NamedTuple):
    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def _tile(dtype: torch.dtype, block_dim: int) -> _Tile:
    """A fixed choice, so that no request waits for a tuner and none changes a result."""
    if dtype == torch.float32:
        # Exact products run outside the tensor cores and hold whole operands in registers:
        # larger tiles spill.
        return _Tile(block_m=32, block_n=16, num_warps=8, num_stages=2)
    if block_dim <= 128:
        return _Tile(block_m=128, block_n=64, num_warps=8, num_stages=3)
    return _Tile(block_m=64, block_n=32, num_warps=4, num_stages=2)


@triton.jit(
    do_not_specialize=["min_new_tokens"],
    do_not_specialize_on_alignment=["rows", "seq_lens", "new_starts"],
)
def _prefill_kernel(
    q,
    k_cache,
    v_cache,
    out,
    slot_table,
    rows,
    seq_lens,
    new_starts,
    scale_log2,
    min_new_tokens,
    q_token_stride,
    q_head_stride,
    cache_slot_stride,
    cache_head_stride,
    out_token_stride,
    out_head_stride,
    slot_table_stride,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    req = tl.program_id(1)
    first_token = tl.load(new_starts + req)
    new_len = tl.load(new_starts + req + 1) - first_token
    if new_len < min_new_tokens:
        return
    # A request's last query block sees the most keys: it starts first, for all heads.
    kv_head = tl.program_id(0) % KV_HEADS
    block = tl.cdiv(new_len * GROUP, BLOCK_M) - 1 - tl.program_id(0) // KV_HEADS
    if block < 0:
        return

    seq_len = tl.load(seq_lens + req)
    prefix_len = seq_len - new_len
    slot_row = slot_table + tl.load(rows + req).to(tl.int64) * slot_table_stride

    tile_row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    token = tile_row // GROUP
    q_head = kv_head * GROUP + tile_row % GROUP
    position = prefix_len + token
    dim = tl.arange(0, BLOCK_DIM)
    in_tile = (token < new_len)[:, None] & (dim < HEAD_DIM)[None, :]
    batch_token = (first_token + token).to(tl.int64)
    q_offset = batch_token * q_token_stride + q_head * q_head_stride
    queries = tl.load(q + q_offset[:, None] + dim[None, :], mask=in_tile, other=0.0)

    keys = k_cache + kv_head * cache_head_stride + dim[None, :]
    values = v_cache + kv_head * cache_head_stride + dim[None, :]
    in_head = (dim < HEAD_DIM)[None, :]

    # [0, full_end): seen by every row of the tile; [full_end, kv_end): up to the diagonal.
    full_end = (prefix_len + block * BLOCK_M // GROUP + 1) // BLOCK_N * BLOCK_N
    kv_end = tl.minimum(seq_len, prefix_len + (block * BLOCK_M + BLOCK_M - 1) // GROUP + 1)

    acc = tl.zeros([BLOCK_M, BLOCK_DIM], dtype=tl.float32)
    norm = tl.zeros([BLOCK_M], dtype=tl.float32)
    peak = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)

    for start in range(0, full_end, BLOCK_N):
        col = start + tl.arange(0, BLOCK_N)
        slot = tl.load(slot_row + col).to(tl.int64)
        offset = slot[:, None] * cache_slot_stride
        if HEAD_DIM == BLOCK_DIM:
            k = tl.load(keys + offset)
            v = tl.load(values + offset)
        else:
            k = tl.load(keys + offset, mask=in_head, other=0.0)
            v = tl.load(values + offset, mask=in_head, other=0.0)
        scores = tl.dot(queries, tl.trans(k), input_precision="ieee")
        acc, norm, peak = fold_block(acc, norm, peak, scores, v, scale_log2)

    for start in range(full_end, kv_end, BLOCK_N):
        col = start + tl.arange(0, BLOCK_N)
        in_seq = col < kv_end
        slot = tl.load(slot_row + col, mask=in_seq, other=0).to(tl.int64)
        offset = slot[:, None] * cache_slot_stride
        # Whatever lies in a slot that is not the request's own must not reach the sum: 0 * nan.
        in_block = in_seq[:, None] & in_head
        k = tl.load(keys + offset, mask=in_block, other=0.0)
        v = tl.load(values + offset, mask=in_block, other=0.0)
        scores = tl.dot(queries, tl.trans(k), input_precision="ieee")
        scores = tl.where(col[None, :] <= position[:, None], scores, float("-inf"))
        acc, norm, peak = fold_block(acc, norm, peak, scores, v, scale_log2)

    out_offset = batch_token * out_token_stride + q_head * out_head_stride
    result = (acc / norm[:, None]).to(out.dtype.element_ty)
    tl.store(out + out_offset[:, None] + dim[None, :], result, mask=in_tile)


def prefill_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    batch: PagedBatch,
    out: torch.Tensor,
    *,
    scale: float,
    max_new_tokens: int,
    min_new_tokens: int = 1,
) -> None:
    """Attends every request with at least min_new_tokens new tokens; writes no other row of out.

    q, out [tokens, q_heads, head_dim]: f32, bf16 or f16; q may be strided over tokens and heads.
    k_cache, v_cache [slots, kv_heads, head_dim], of q's dtype; the new tokens are already in them.
    scale: positive factor of the scores. max_new_tokens: the most that any request has.

    Sums are f32, and so are products if q is. A token's result depends on its own sequence alone:
    not on its batch, and not on where its prompt was cut, bit for bit.
    Raises ValueError if shapes, dtypes or strides do not fit.
    """
    check_attention_args(q, k_cache, v_cache, out, batch)
    if batch.num_reqs == 0 or max_new_tokens < min_new_tokens:
        return
    num_kv_heads, head_dim = k_cache.shape[1:]
    group = q.shape[1] // num_kv_heads
    block_dim = max(16, triton.next_power_of_2(head_dim))
    tile = _tile(q.dtype, block_dim)
    grid = (num_kv_heads * triton.cdiv(max_new_tokens * group, tile.block_m), batch.num_reqs)
    _prefill_kernel[grid](
        q,
        k_cache,
        v_cache,
        out,
        batch.slot_table,
        batch.rows,
        batch.seq_lens,
        batch.new_starts,
        scale * math.log2(math.e),
        min_new_tokens,
        q.stride(0),
        q.stride(1),
        k_cache.stride(0),
        k_cache.stride(1),
        out.stride(0),
        out.stride(1),
        batch.slot_table.stride(0),
        KV_HEADS=num_kv_heads,
        GROUP=group,
        HEAD_DIM=head_dim,
        BLOCK_DIM=block_dim,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
