# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc"
"""Attention of one new token a request over a paged cache, split over the keys.

A sequence is cut into chunks, a chunk into blocks. All blocks of a batch stand in one line, cut at
chunk borders into one run for each team of programs, one program a kv head:

    request      |        0        |   1   |            2            |
    chunk        | 0 | 1 | 2 | 3 |4| 0 | 1 | 0 | 1 | 2 | 3 | 4 | 5 |6|
    team         |   0   |     1     |     2     |     3     |   4   |

A program folds the chunks of a request one after the other. Where a request is shared out, the
program with its first chunk leaves its fold in the scratch, the others leave each chunk by itself,
and the last to arrive goes on folding in the same order. So it is always the same operations on the
same numbers: neither the batch nor the number of programs changes a result, not in its last bit.
How a sequence is cut depends on its own length only.

The loop over blocks runs across chunks and requests, and its loads are always some blocks ahead: a
small lane has few programs, each of which must keep its SM's share of the bandwidth busy.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from sgl_kernel.decode_cut import CUT_RULE, chunk_tokens, cut_at, even_teams, request_of
from sgl_kernel.launch import Launcher
from sgl_kernel.online_softmax import combine, first_columns, fold_columns
from sgl_kernel.paged_batch import PagedBatch, check_attention_args

# Elements that a program loads at one time to merge: as many as its registers hold.
_MERGE_ELEMENTS = 4096
_MERGE_UNROLL = 8
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


@dataclass(slots=True)
class DecodeScratch:
    """Where programs leave what another one finishes; belongs to one lane: launches overwrite it.

    acc [chunks, q_heads, head_dim] f32, norm and peak [chunks, q_heads] f32: states of a running
    softmax. folded [chunks, q_heads] i32: how many chunks the fold of a request's first program
    covers. arrived [chunks, q_heads] i32: how many chunks of a request are in the scratch. A kernel
    finds it all 0 and leaves it all 0; nothing else may write it, and a launch that was cut off
    takes the scratch with it. A request's entries of the last two are those of its first chunk.
    """

    acc: torch.Tensor
    norm: torch.Tensor
    peak: torch.Tensor
    folded: torch.Tensor
    arrived: torch.Tensor

    @classmethod
    def allocate(
        cls, chunks: int, num_heads: int, head_dim: int, device: torch.device
    ) -> DecodeScratch:
        """Room for so many chunks, all requests of a batch together.

        `arrived` is zeroed on the current stream: launches on others must wait for that.
        """
        per_head = (chunks, num_heads)
        return cls(
            acc=torch.empty((*per_head, head_dim), dtype=torch.float32, device=device),
            norm=torch.empty(per_head, dtype=torch.float32, device=device),
            peak=torch.empty(per_head, dtype=torch.float32, device=device),
            folded=torch.empty(per_head, dtype=torch.int32, device=device),
            arrived=torch.zeros(per_head, dtype=torch.int32, device=device),
        )

    @property
    def chunks(self) -> int:
        return int(self.norm.shape[0])


class _Tile(NamedTuple):
    """block_n: tokens of a block; it divides every chunk. num_stages: blocks in shared memory, one
    of them at work. programs_per_sm: as shared memory allows."""

    block_n: int
    num_warps: int
    num_stages: int
    programs_per_sm: int


def _tile(dtype: torch.dtype, block_dim: int) -> _Tile:
    """A fixed choice, so that no request waits for a tuner and none changes a result."""
    if dtype == torch.float32:
        return _Tile(block_n=32, num_warps=4, num_stages=3, programs_per_sm=2)
    if block_dim <= 64:
        return _Tile(block_n=128, num_warps=4, num_stages=3, programs_per_sm=2)
    if block_dim <= 128:
        return _Tile(block_n=64, num_warps=4, num_stages=3, programs_per_sm=2)
    return _Tile(block_n=64, num_warps=4, num_stages=3, programs_per_sm=1)


@triton.jit
def _own_token(token, seq_len):
    """The token; behind the sequence, its last one, to be read again with a weight of 0.

    Whatever lies in a slot that is not the request's own must not reach a sum: 0 * nan is nan.
    """
    return tl.maximum(tl.minimum(token, seq_len - 1), 0)


@triton.jit
def _merge(
    out_row,
    acc_scratch,
    norm_scratch,
    peak_scratch,
    first_chunk,
    begin,
    end,
    kv_head,
    out_head_stride,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_GROUP: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """Folds the parts begin .. end - 1 of a request, and writes the rows of out of a kv head."""
    # In one dimension, and with its head's norm and peak in every element, no value moves between
    # threads: nothing keeps the loads of UNROLL parts from being under way together.
    element = tl.arange(0, BLOCK_GROUP * BLOCK_DIM)
    head = kv_head * GROUP + element // BLOCK_DIM
    dim = element % BLOCK_DIM
    in_tile = (element < GROUP * BLOCK_DIM) & (dim < HEAD_DIM)
    first_part = first_chunk.to(tl.int64) * HEADS + head
    acc = tl.zeros([BLOCK_GROUP * BLOCK_DIM], dtype=tl.float32)
    norm = tl.zeros([BLOCK_GROUP * BLOCK_DIM], dtype=tl.float32)
    peak = tl.full([BLOCK_GROUP * BLOCK_DIM], float("-inf"), dtype=tl.float32)
    for start in range(begin, end, UNROLL):
        for i in tl.static_range(UNROLL):
            part = first_part + (start + i) * HEADS
            mask = in_tile & (start + i < end)
            # Other SMs wrote them a moment ago: .cg looks past this SM's own cache.
            part_norm = tl.load(norm_scratch + part, mask=mask, other=0.0, cache_modifier=".cg")
            part_peak = tl.load(
                peak_scratch + part, mask=mask, other=float("-inf"), cache_modifier=".cg"
            )
            part_acc = tl.load(
                acc_scratch + part * HEAD_DIM + dim, mask=mask, other=0.0, cache_modifier=".cg"
            )
            acc, norm, peak = combine(acc, norm, peak, part_acc, part_norm, part_peak)
    result = acc * (1.0 / norm)
    out_element = out_row + head * out_head_stride + dim
    tl.store(out_element, result.to(out_row.dtype.element_ty), mask=in_tile)


@triton.jit(
    do_not_specialize=["num_reqs"],
    do_not_specialize_on_alignment=["rows", "seq_lens", "new_starts"],
)
def _decode_kernel(
    q,
    k_cache,
    v_cache,
    out,
    acc_scratch,
    norm_scratch,
    peak_scratch,
    folded_scratch,
    arrived_scratch,
    slot_table,
    rows,
    seq_lens,
    new_starts,
    num_reqs,
    scale_log2,
    q_token_stride,
    q_head_stride,
    out_token_stride,
    out_head_stride,
    slot_table_stride,
    CACHE_SLOT_STRIDE: tl.constexpr,
    CACHE_HEAD_STRIDE: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_GROUP: tl.constexpr,
    COLUMNS: tl.constexpr,
    DOT_COLUMNS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_REQS: tl.constexpr,
    CUT: tl.constexpr,
    MERGE_UNROLL: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    # Every program derives the line of blocks from the lengths on the device, so that one launch,
    # and one captured graph, serves any lengths.
    req_index = tl.arange(0, BLOCK_REQS)
    in_batch = req_index < num_reqs
    lens = tl.load(seq_lens + req_index, mask=in_batch, other=0)
    first_tokens = tl.load(new_starts + req_index, mask=in_batch, other=0)
    end_tokens = tl.load(new_starts + req_index + 1, mask=in_batch, other=0)
    decoding = end_tokens - first_tokens == 1
    # An empty sequence keeps one masked block, so that its row of out is written: with zeros.
    blocks = tl.where(decoding, tl.maximum(tl.cdiv(lens, BLOCK_N), 1), 0)
    chunks = tl.where(decoding, tl.maximum(tl.cdiv(lens, chunk_tokens(lens, CUT)), 1), 0)
    block_ends = tl.cumsum(blocks, axis=0)
    chunk_ends = tl.cumsum(chunks, axis=0)
    num_blocks = tl.sum(blocks, axis=0)

    # Neighbouring programs read neighbouring heads of the same tokens at about the same time.
    kv_head = tl.program_id(0) % KV_HEADS
    team = tl.program_id(0) // KV_HEADS
    teams = even_teams(tl.num_programs(0) // KV_HEADS, tl.sum(decoding.to(tl.int32), axis=0))
    share = num_blocks // teams
    spare = num_blocks % teams
    begin = cut_at(
        team * share + tl.minimum(team, spare),
        num_blocks,
        block_ends,
        chunk_ends,
        seq_lens,
        BLOCK_N,
        CUT,
    )
    end = cut_at(
        (team + 1) * share + tl.minimum(team + 1, spare),
        num_blocks,
        block_ends,
        chunk_ends,
        seq_lens,
        BLOCK_N,
        CUT,
    )
    if begin >= end:
        return

    dim = tl.arange(0, BLOCK_DIM)
    in_head = (dim < HEAD_DIM)[None, :]
    dot_column = tl.arange(0, DOT_COLUMNS)
    is_query = (dot_column < GROUP)[:, None] & in_head
    column = tl.arange(0, COLUMNS)
    in_group = column < GROUP
    in_tile = (dim < HEAD_DIM)[:, None] & in_group[None, :]
    q_head = kv_head * GROUP + column
    query = q + (kv_head * GROUP + dot_column[:, None]) * q_head_stride + dim[None, :]
    keys = k_cache + kv_head * CACHE_HEAD_STRIDE + dim[None, :]
    values = v_cache + kv_head * CACHE_HEAD_STRIDE + dim[None, :]

    # Of the chunk at hand:
    acc = tl.zeros([BLOCK_DIM, DOT_COLUMNS], dtype=tl.float32)
    norms = tl.zeros([BLOCK_N, COLUMNS], dtype=tl.float32)
    peak = tl.full([COLUMNS], float("-inf"), dtype=tl.float32)
    # Of its request's chunks so far, if this program has the first one:
    fold_acc = tl.zeros([BLOCK_DIM, COLUMNS], dtype=tl.float32)
    fold_norm = tl.zeros([1, COLUMNS], dtype=tl.float32)
    fold_peak = tl.full([1, COLUMNS], float("-inf"), dtype=tl.float32)

    tokens = tl.arange(0, BLOCK_N)
    req, first_block, shared_chunk = request_of(begin, block_ends, chunk_ends)
    seq_len = tl.load(seq_lens + req)
    chunk_blocks = chunk_tokens(seq_len, CUT) // BLOCK_N
    queries_at = query + tl.load(new_starts + req).to(tl.int64) * q_token_stride
    slot_row = slot_table + tl.load(rows + req).to(tl.int64) * slot_table_stride
    slot = tl.load(slot_row + _own_token((begin - first_block) * BLOCK_N + tokens, seq_len))
    # The loads of a block, with the slots of the block behind it, run ahead of the rest of the
    # body. The pipeliner can arrange that as long as they depend on no more than the first `if`,
    # and the body has no loop and no barrier of its own.
    for block in tl.range(begin, end, num_stages=NUM_STAGES):
        queries = tl.load(queries_at, mask=is_query, other=0.0)
        req_end = first_block + tl.maximum(tl.cdiv(seq_len, BLOCK_N), 1)
        next_req = req
        next_first_block = first_block
        next_seq_len = seq_len
        next_chunk_blocks = chunk_blocks
        if (block + 1 == req_end) & (block + 1 < end):
            next_req, next_first_block, _ = request_of(block + 1, block_ends, chunk_ends)
            next_seq_len = tl.load(seq_lens + next_req)
            next_chunk_blocks = chunk_tokens(next_seq_len, CUT) // BLOCK_N
            queries_at = query + tl.load(new_starts + next_req).to(tl.int64) * q_token_stride
            slot_row = slot_table + tl.load(rows + next_req).to(tl.int64) * slot_table_stride
        next_col = (block + 1 - next_first_block) * BLOCK_N + tokens
        next_slot = tl.load(slot_row + _own_token(next_col, next_seq_len))

        offset = slot.to(tl.int64)[:, None] * CACHE_SLOT_STRIDE
        if HEAD_DIM == BLOCK_DIM:
            k = tl.load(keys + offset)
            v = tl.load(values + offset)
        else:
            k = tl.load(keys + offset, mask=in_head, other=0.0)
            v = tl.load(values + offset, mask=in_head, other=0.0)
        scores = first_columns(tl.dot(k, tl.trans(queries), input_precision="ieee"), COLUMNS)
        in_seq = (block - first_block) * BLOCK_N + tokens < seq_len
        scores = tl.where(in_seq[:, None], scores, float("-inf"))
        acc, norms, peak = fold_columns(acc, norms, peak, scores, v, scale_log2)

        done_blocks = block + 1 - first_block
        req_done = block + 1 == req_end
        if req_done | (done_blocks & (chunk_blocks - 1) == 0):
            chunk_acc = first_columns(acc, COLUMNS)
            norm = tl.sum(norms, axis=0)
            if first_block >= begin:
                fold_acc, fold_norm, fold_peak = combine(
                    fold_acc, fold_norm, fold_peak, chunk_acc, norm[None, :], peak[None, :]
                )
                if req_done:
                    result = tl.where(seq_len > 0, fold_acc * (1.0 / fold_norm), 0.0)
                    token = tl.load(new_starts + req).to(tl.int64)
                    out_row = out + token * out_token_stride
                    tl.store(
                        out_row + q_head[None, :] * out_head_stride + dim[:, None],
                        result.to(out.dtype.element_ty),
                        mask=in_tile,
                    )
                    fold_acc = tl.zeros([BLOCK_DIM, COLUMNS], dtype=tl.float32)
                    fold_norm = tl.zeros([1, COLUMNS], dtype=tl.float32)
                    fold_peak = tl.full([1, COLUMNS], float("-inf"), dtype=tl.float32)
            else:
                chunk = shared_chunk + tl.cdiv(done_blocks, chunk_blocks) - 1
                part = chunk.to(tl.int64) * HEADS + q_head
                acc_part = acc_scratch + part[None, :] * HEAD_DIM + dim[:, None]
                tl.store(acc_part, chunk_acc, mask=in_tile)
                tl.store(norm_scratch + part, norm, mask=in_group)
                tl.store(peak_scratch + part, peak, mask=in_group)
            acc = tl.zeros([BLOCK_DIM, DOT_COLUMNS], dtype=tl.float32)
            norms = tl.zeros([BLOCK_N, COLUMNS], dtype=tl.float32)
            peak = tl.full([COLUMNS], float("-inf"), dtype=tl.float32)

        req = next_req
        first_block = next_first_block
        seq_len = next_seq_len
        chunk_blocks = next_chunk_blocks
        slot = next_slot

    # The run's first and last request may be shared with other teams.
    for side in range(2):
        req, first_block, first_chunk = request_of(
            tl.where(side == 0, begin, end - 1), block_ends, chunk_ends
        )
        seq_len = tl.load(seq_lens + req)
        chunk_blocks = chunk_tokens(seq_len, CUT) // BLOCK_N
        req_end = first_block + tl.maximum(tl.cdiv(seq_len, BLOCK_N), 1)
        shared = (first_block < begin) | (req_end > end)
        seen = (side == 1) & (first_block <= begin)
        if shared & (seen == 0):
            count = tl.cdiv(req_end - first_block, chunk_blocks)
            before = tl.maximum(begin - first_block, 0) // chunk_blocks
            here = tl.cdiv(tl.minimum(end, req_end) - first_block, chunk_blocks) - before
            head = first_chunk * HEADS + kv_head
            if first_block >= begin:
                part = (first_chunk + here - 1).to(tl.int64) * HEADS + q_head
                acc_part = acc_scratch + part[None, :] * HEAD_DIM + dim[:, None]
                tl.store(acc_part, fold_acc, mask=in_tile)
                part_of_row = part[None, :]
                tl.store(norm_scratch + part_of_row, fold_norm, mask=in_group[None, :])
                tl.store(peak_scratch + part_of_row, fold_peak, mask=in_group[None, :])
                tl.store(folded_scratch + head, here)
            # All threads have stored; then one of them releases that and acquires what the others
            # of the request released; then all may load it.
            tl.debug_barrier()
            arrived = here + tl.atomic_add(arrived_scratch + head, here, sem="acq_rel", scope="gpu")
            if arrived == count:
                tl.store(arrived_scratch + head, 0)
                folded = tl.load(folded_scratch + head, cache_modifier=".cg")
                token = tl.load(new_starts + req).to(tl.int64)
                _merge(
                    out + token * out_token_stride,
                    acc_scratch,
                    norm_scratch,
                    peak_scratch,
                    first_chunk,
                    folded - 1,
                    count,
                    kv_head,
                    out_head_stride,
                    GROUP,
                    HEADS,
                    HEAD_DIM,
                    BLOCK_GROUP,
                    BLOCK_DIM,
                    MERGE_UNROLL,
                )


_decode = Launcher(_decode_kernel)


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
) -> None:
    """Attends every request with exactly one new token; writes no other row of out.

    q, out [tokens, q_heads, head_dim]: f32, bf16 or f16; q may be strided over tokens and heads.
    k_cache, v_cache [slots, kv_heads, head_dim], of q's dtype; the new tokens are already in them.
    scratch: room for chunks_needed() of the lengths of those requests. scale: positive factor of
    the scores. num_sms: SMs of the lane; it sets the grid, never the result.

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
    block_dim = max(16, triton.next_power_of_2(head_dim))
    block_group = triton.next_power_of_2(num_heads // num_kv_heads)
    columns = max(8, block_group)
    tile = _tile(q.dtype, block_dim)
    teams = max(1, num_sms * tile.programs_per_sm // num_kv_heads)
    _decode(
        (teams * num_kv_heads, 1, 1),
        (
            q,
            k_cache,
            v_cache,
            out,
            scratch.acc,
            scratch.norm,
            scratch.peak,
            scratch.folded,
            scratch.arrived,
            batch.slot_table,
            batch.rows,
            batch.seq_lens,
            batch.new_starts,
        ),
        (num_reqs,),
        (
            scale * math.log2(math.e),
            q.stride(0),
            q.stride(1),
            out.stride(0),
            out.stride(1),
            batch.slot_table.stride(0),
        ),
        (
            k_cache.stride(0),
            k_cache.stride(1),
            num_kv_heads,
            num_heads // num_kv_heads,
            num_heads,
            head_dim,
            block_dim,
            block_group,
            columns,
            # Tensor cores take 16 columns at least, exact products as many as there are.
            columns if q.dtype == torch.float32 else max(16, columns),
            tile.block_n,
            # Few distinct values: each is a compilation.
            max(128, triton.next_power_of_2(num_reqs)),
            CUT_RULE,
            max(1, min(_MERGE_UNROLL, _MERGE_ELEMENTS // (block_group * block_dim))),
            tile.num_stages,
        ),
        num_warps=tile.num_warps,
    )
