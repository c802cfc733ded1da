# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc"
"""Attention of one new token a request over a paged cache, split over the keys.

    sequence   [ chunk 0 | chunk 1 | ... | rest ]       one unit of work each, times kv heads
                    |         |           |
               partial sums, relative to each chunk's own peak
                    +---------+-----------+---> merge

How a sequence is cut depends on its own length only: neither the batch nor the number of SMs
changes a result, not in its last bit. The SM count sets how many programs share the units.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from sgl_kernel.online_softmax import fold_block
from sgl_kernel.paged_batch import PagedBatch, check_attention_args

_MIN_CHUNK_TOKENS = 256
_MAX_CHUNKS = 64
# Chunks double until at most _MAX_CHUNKS remain; the kernel unrolls this many doublings, enough
# for 67 million tokens. Later chunks would only become more numerous, not wrong.
_MAX_DOUBLINGS = 12
_MERGE_BLOCK = 16
_MAX_REQS = 4096


def decode_attention_ref(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    batch: PagedBatch,
    *,
    scale: float,
) -> torch.Tensor:
    """What decode_attention does, in plain torch and float64 [tokens, q_heads, head_dim].

    Zero in rows of requests that have more than one new token or no tokens at all.
    """
    out = torch.zeros(q.shape, dtype=torch.float64, device=q.device)
    num_kv_heads = k_cache.shape[1]
    starts = batch.new_starts.tolist()
    for req, seq_len in enumerate(batch.seq_lens.tolist()):
        if starts[req + 1] - starts[req] != 1 or seq_len == 0:
            continue
        slots = batch.slot_table[batch.rows[req], :seq_len].long()
        query = q[starts[req]].double().unflatten(0, (num_kv_heads, -1))
        scores = torch.einsum("hgd,khd->hgk", query, k_cache[slots].double()) * scale
        attended = torch.einsum("hgk,khd->hgd", scores.softmax(-1), v_cache[slots].double())
        out[starts[req]] = attended.flatten(0, 1)
    return out


def num_chunks(seq_len: int) -> int:
    """Into how many chunks a sequence of that length is cut; at least 1."""
    chunk_tokens = _MIN_CHUNK_TOKENS
    for _ in range(_MAX_DOUBLINGS):
        if seq_len > chunk_tokens * _MAX_CHUNKS:
            chunk_tokens *= 2
    return max(1, -(-seq_len // chunk_tokens))


@dataclass(slots=True)
class DecodeScratch:
    """Where chunks leave their sums; belongs to one lane, since launches overwrite it.

    acc [chunks, q_heads, head_dim] f32: attended values of a chunk. lse [chunks, q_heads] f32:
    log2 of the chunk's softmax denominator.
    """

    acc: torch.Tensor
    lse: torch.Tensor

    @classmethod
    def allocate(
        cls, chunks: int, num_heads: int, head_dim: int, device: torch.device
    ) -> DecodeScratch:
        """Room for so many chunks, all requests of a batch together."""
        return cls(
            acc=torch.empty((chunks, num_heads, head_dim), dtype=torch.float32, device=device),
            lse=torch.empty((chunks, num_heads), dtype=torch.float32, device=device),
        )

    @property
    def chunks(self) -> int:
        return int(self.lse.shape[0])


def chunks_needed(seq_lens: Iterable[int]) -> int:
    """Chunks of all the given sequences together: the scratch that one launch over them takes."""
    return sum(map(num_chunks, seq_lens))


class _Tile(NamedTuple):
    block_n: int
    num_warps: int
    num_stages: int
    programs_per_sm: int


def _tile(dtype: torch.dtype, block_dim: int) -> _Tile:
    """A fixed choice, so that no request waits for a tuner and none changes a result."""
    if dtype == torch.float32:
        return _Tile(block_n=32, num_warps=4, num_stages=2, programs_per_sm=2)
    # Five stages are two for the slots, whose loads the keys wait for, and two blocks in flight.
    programs_per_sm = 4 if block_dim <= 128 else 2
    return _Tile(block_n=32, num_warps=4, num_stages=5, programs_per_sm=programs_per_sm)


@triton.jit
def _chunk_tokens(
    seq_len, MIN_CHUNK: tl.constexpr, MAX_CHUNKS: tl.constexpr, MAX_DOUBLINGS: tl.constexpr
):
    chunk = seq_len * 0 + MIN_CHUNK
    for _ in tl.static_range(MAX_DOUBLINGS):
        chunk = tl.where(seq_len > chunk * MAX_CHUNKS, chunk * 2, chunk)
    return chunk


@triton.jit
def _chunks_of_reqs(
    seq_lens,
    new_starts,
    num_reqs,
    BLOCK_REQS: tl.constexpr,
    MIN_CHUNK: tl.constexpr,
    MAX_CHUNKS: tl.constexpr,
    MAX_DOUBLINGS: tl.constexpr,
):
    """How many chunks each request has [BLOCK_REQS] i32; 0 for those that are not decoding."""
    req = tl.arange(0, BLOCK_REQS)
    in_batch = req < num_reqs
    seq_len = tl.load(seq_lens + req, mask=in_batch, other=0)
    first_token = tl.load(new_starts + req, mask=in_batch, other=0)
    end_token = tl.load(new_starts + req + 1, mask=in_batch, other=0)
    chunk = _chunk_tokens(seq_len, MIN_CHUNK, MAX_CHUNKS, MAX_DOUBLINGS)
    # An empty sequence keeps one empty chunk, so that its row of out is written: with zeros.
    return tl.where(end_token - first_token == 1, tl.maximum(tl.cdiv(seq_len, chunk), 1), 0)


@triton.jit(
    do_not_specialize=["num_reqs"],
    do_not_specialize_on_alignment=["rows", "seq_lens", "new_starts"],
)
def _chunk_kernel(
    q,
    k_cache,
    v_cache,
    out,
    acc_scratch,
    lse_scratch,
    slot_table,
    rows,
    seq_lens,
    new_starts,
    num_reqs,
    scale_log2,
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
    BLOCK_REQS: tl.constexpr,
    MIN_CHUNK: tl.constexpr,
    MAX_CHUNKS: tl.constexpr,
    MAX_DOUBLINGS: tl.constexpr,
):
    # Every program derives the same list of units from the lengths on the device, so that one
    # launch, and one captured graph, serves any lengths: unit = (request, chunk), request-major.
    req_index = tl.arange(0, BLOCK_REQS)
    chunks = _chunks_of_reqs(
        seq_lens, new_starts, num_reqs, BLOCK_REQS, MIN_CHUNK, MAX_CHUNKS, MAX_DOUBLINGS
    )
    chunk_ends = tl.cumsum(chunks, axis=0)
    num_items = tl.sum(chunks, axis=0) * KV_HEADS

    tile_row = tl.arange(0, BLOCK_M)
    dim = tl.arange(0, BLOCK_DIM)
    in_tile = (tile_row < GROUP)[:, None] & (dim < HEAD_DIM)[None, :]
    in_head = (dim < HEAD_DIM)[None, :]

    for item in range(tl.program_id(0), num_items, tl.num_programs(0)):
        # Neighbouring programs read neighbouring heads of the same tokens.
        kv_head = item % KV_HEADS
        unit = item // KV_HEADS
        req = tl.sum((chunk_ends <= unit).to(tl.int32), axis=0)
        chunk_index = unit - tl.sum(tl.where(req_index < req, chunks, 0), axis=0)

        seq_len = tl.load(seq_lens + req)
        chunk = _chunk_tokens(seq_len, MIN_CHUNK, MAX_CHUNKS, MAX_DOUBLINGS)
        kv_start = chunk_index * chunk
        kv_end = tl.minimum(seq_len, kv_start + chunk)
        slot_row = slot_table + tl.load(rows + req).to(tl.int64) * slot_table_stride

        token = tl.load(new_starts + req).to(tl.int64)
        q_head = kv_head * GROUP + tile_row
        q_offset = token * q_token_stride + q_head * q_head_stride
        queries = tl.load(q + q_offset[:, None] + dim[None, :], mask=in_tile, other=0.0)
        keys = k_cache + kv_head * cache_head_stride + dim[None, :]
        values = v_cache + kv_head * cache_head_stride + dim[None, :]

        acc = tl.zeros([BLOCK_M, BLOCK_DIM], dtype=tl.float32)
        norm = tl.zeros([BLOCK_M], dtype=tl.float32)
        peak = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
        for start in range(kv_start, kv_end, BLOCK_N):
            col = start + tl.arange(0, BLOCK_N)
            in_chunk = col < kv_end
            slot = tl.load(slot_row + col, mask=in_chunk, other=0).to(tl.int64)
            offset = slot[:, None] * cache_slot_stride
            # Whatever lies in a slot that is not the request's own must not reach the sum: 0 * nan.
            in_block = in_chunk[:, None] & in_head
            k = tl.load(keys + offset, mask=in_block, other=0.0)
            v = tl.load(values + offset, mask=in_block, other=0.0)
            scores = tl.dot(queries, tl.trans(k), input_precision="ieee")
            scores = tl.where(in_chunk[None, :], scores, float("-inf"))
            acc, norm, peak = fold_block(acc, norm, peak, scores, v, scale_log2)

        result = tl.where(norm[:, None] > 0, acc / norm[:, None], 0.0)
        if seq_len <= chunk:
            out_offset = token * out_token_stride + q_head * out_head_stride
            tl.store(
                out + out_offset[:, None] + dim[None, :],
                result.to(out.dtype.element_ty),
                mask=in_tile,
            )
        else:
            part = unit.to(tl.int64) * (KV_HEADS * GROUP) + q_head
            tl.store(lse_scratch + part, peak + tl.log2(norm), mask=tile_row < GROUP)
            tl.store(
                acc_scratch + part[:, None] * HEAD_DIM + dim[None, :],
                result,
                mask=in_tile,
            )


@triton.jit(
    do_not_specialize=["num_reqs"],
    do_not_specialize_on_alignment=["seq_lens", "new_starts"],
)
def _merge_kernel(
    out,
    acc_scratch,
    lse_scratch,
    seq_lens,
    new_starts,
    num_reqs,
    out_token_stride,
    out_head_stride,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_CHUNKS: tl.constexpr,
    BLOCK_REQS: tl.constexpr,
    MIN_CHUNK: tl.constexpr,
    MAX_CHUNKS: tl.constexpr,
    MAX_DOUBLINGS: tl.constexpr,
):
    head = tl.program_id(0)
    req = tl.program_id(1)
    first_token = tl.load(new_starts + req)
    seq_len = tl.load(seq_lens + req)
    chunk = _chunk_tokens(seq_len, MIN_CHUNK, MAX_CHUNKS, MAX_DOUBLINGS)
    if seq_len <= chunk:
        return
    if tl.load(new_starts + req + 1) - first_token != 1:
        return
    num_chunks = tl.cdiv(seq_len, chunk)
    chunks = _chunks_of_reqs(
        seq_lens, new_starts, num_reqs, BLOCK_REQS, MIN_CHUNK, MAX_CHUNKS, MAX_DOUBLINGS
    )
    first_unit = tl.sum(tl.where(tl.arange(0, BLOCK_REQS) < req, chunks, 0), axis=0)

    dim = tl.arange(0, BLOCK_DIM)
    in_head = dim < HEAD_DIM
    acc = tl.zeros([BLOCK_DIM], dtype=tl.float32)
    norm = 0.0
    peak = float("-inf")
    for start in range(0, num_chunks, BLOCK_CHUNKS):
        index = start + tl.arange(0, BLOCK_CHUNKS)
        in_seq = index < num_chunks
        part = (first_unit + index).to(tl.int64) * HEADS + head
        lse = tl.load(lse_scratch + part, mask=in_seq, other=float("-inf"))
        parts = tl.load(
            acc_scratch + part[:, None] * HEAD_DIM + dim[None, :],
            mask=in_seq[:, None] & in_head[None, :],
            other=0.0,
        )
        new_peak = tl.maximum(peak, tl.max(lse, axis=0))
        shrink = tl.exp2(peak - new_peak)
        weights = tl.exp2(lse - new_peak)
        acc = acc * shrink + tl.sum(weights[:, None] * parts, axis=0)
        norm = norm * shrink + tl.sum(weights, axis=0)
        peak = new_peak

    out_offset = first_token.to(tl.int64) * out_token_stride + head * out_head_stride
    tl.store(out + out_offset + dim, (acc / norm).to(out.dtype.element_ty), mask=in_head)


def decode_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    batch: PagedBatch,
    out: torch.Tensor,
    scratch: DecodeScratch,
    *,
    scale: float,
    num_sms: int,
    max_seq_len: int,
) -> None:
    """Attends every request with exactly one new token; writes no other row of out.

    q, out [tokens, q_heads, head_dim]: f32, bf16 or f16; q may be strided over tokens and heads.
    k_cache, v_cache [slots, kv_heads, head_dim], of q's dtype; the new tokens are already in them.
    scratch: room for chunks_needed() of the lengths of those requests. scale: positive factor of
    the scores. num_sms: SMs of the lane; it sets the grid, never the result. max_seq_len: no
    sequence is longer; for a graph, at any replay.

    A sequence of length 0 yields zeros. Sums are f32, and so are products if q is. A token's
    result depends on its own sequence alone, bit for bit.
    Raises ValueError if shapes, dtypes or strides do not fit.
    """
    check_attention_args(q, k_cache, v_cache, out, batch)
    num_reqs = batch.num_reqs
    num_heads = q.shape[1]
    num_kv_heads, head_dim = k_cache.shape[1:]
    if num_reqs > _MAX_REQS:
        raise ValueError(f"a decode launch takes at most {_MAX_REQS} requests, got {num_reqs}")
    if scratch.acc.shape[1:] != (num_heads, head_dim):
        raise ValueError(
            f"scratch is for (heads, dim) {tuple(scratch.acc.shape[1:])}, q has {tuple(q.shape)}"
        )
    if num_reqs == 0:
        return
    group = num_heads // num_kv_heads
    block_dim = max(16, triton.next_power_of_2(head_dim))
    # Few distinct values: each is a compilation.
    block_reqs = max(128, triton.next_power_of_2(num_reqs))
    tile = _tile(q.dtype, block_dim)
    _chunk_kernel[(num_sms * tile.programs_per_sm,)](
        q,
        k_cache,
        v_cache,
        out,
        scratch.acc,
        scratch.lse,
        batch.slot_table,
        batch.rows,
        batch.seq_lens,
        batch.new_starts,
        num_reqs,
        scale * math.log2(math.e),
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
        BLOCK_M=max(16, triton.next_power_of_2(group)),
        BLOCK_N=tile.block_n,
        BLOCK_REQS=block_reqs,
        MIN_CHUNK=_MIN_CHUNK_TOKENS,
        MAX_CHUNKS=_MAX_CHUNKS,
        MAX_DOUBLINGS=_MAX_DOUBLINGS,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    if num_chunks(max_seq_len) == 1:
        return
    _merge_kernel[(num_heads, num_reqs)](
        out,
        scratch.acc,
        scratch.lse,
        batch.seq_lens,
        batch.new_starts,
        num_reqs,
        out.stride(0),
        out.stride(1),
        HEADS=num_heads,
        HEAD_DIM=head_dim,
        BLOCK_DIM=block_dim,
        BLOCK_CHUNKS=_MERGE_BLOCK,
        BLOCK_REQS=block_reqs,
        MIN_CHUNK=_MIN_CHUNK_TOKENS,
        MAX_CHUNKS=_MAX_CHUNKS,
        MAX_DOUBLINGS=_MAX_DOUBLINGS,
    )
