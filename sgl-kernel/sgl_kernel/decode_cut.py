# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc"
"""How decode attention cuts sequences into chunks, and a batch's line of blocks into runs.

A sequence's chunks depend on its own length only; see decode_attention for what is made of them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import triton
import triton.language as tl

# A short sequence is cut finer, since it may be alone and should still reach many SMs.
_SHORT_SEQ_TOKENS = 1024
_SHORT_CHUNK_TOKENS = 128
_MIN_CHUNK_TOKENS = 512
_MAX_CHUNKS = 64
# Chunks double until at most _MAX_CHUNKS remain; the kernel unrolls this many doublings, enough
# for 67 million tokens. Later chunks would only become more numerous, not wrong.
_MAX_DOUBLINGS = 12


def num_chunks(seq_len: int) -> int:
    """Into how many chunks a sequence of that length is cut; at least 1."""
    chunk = _MIN_CHUNK_TOKENS if seq_len > _SHORT_SEQ_TOKENS else _SHORT_CHUNK_TOKENS
    for _ in range(_MAX_DOUBLINGS):
        if seq_len > chunk * _MAX_CHUNKS:
            chunk *= 2
    return max(1, -(-seq_len // chunk))


def most_chunks(max_seq_len: int) -> int:
    """The most chunks that any sequence up to that length is cut into: a longer one may be cut
    into fewer."""
    borders = (_SHORT_SEQ_TOKENS, _MIN_CHUNK_TOKENS * _MAX_CHUNKS, max_seq_len)
    return max(num_chunks(seq_len) for seq_len in borders if seq_len <= max_seq_len)


def chunks_needed(seq_lens: Iterable[int]) -> int:
    """Chunks of all the given sequences together: the scratch that one launch over them takes."""
    return sum(map(num_chunks, seq_lens))


class Cut(NamedTuple):
    """How the kernel cuts sequences: what num_chunks() reads, handed over as one constant."""

    short_seq: int
    short_chunk: int
    min_chunk: int
    max_chunks: int
    max_doublings: int


CUT_RULE = Cut(
    _SHORT_SEQ_TOKENS, _SHORT_CHUNK_TOKENS, _MIN_CHUNK_TOKENS, _MAX_CHUNKS, _MAX_DOUBLINGS
)


@triton.jit
def chunk_tokens(seq_len, CUT: tl.constexpr):
    """What num_chunks() divides by."""
    chunk = tl.where(seq_len > CUT.short_seq, CUT.min_chunk, CUT.short_chunk)
    for _ in tl.static_range(tl.constexpr(CUT.max_doublings)):
        chunk = tl.where(seq_len > chunk * CUT.max_chunks, chunk * 2, chunk)
    return chunk


@triton.jit
def request_of(block, block_ends, chunk_ends):
    """The request that a block of the line belongs to, its first block, and its first chunk."""
    before = block_ends <= block
    req = tl.sum(before.to(tl.int32), axis=0)
    first_block = tl.max(tl.where(before, block_ends, 0), axis=0)
    first_chunk = tl.max(tl.where(before, chunk_ends, 0), axis=0)
    return req, first_block, first_chunk


@triton.jit
def cut_at(
    block, num_blocks, block_ends, chunk_ends, seq_lens, BLOCK_N: tl.constexpr, CUT: tl.constexpr
):
    """The first chunk border at or behind a block of the line."""
    cut = num_blocks
    if block < num_blocks:
        req, first_block, _ = request_of(block, block_ends, chunk_ends)
        seq_len = tl.load(seq_lens + req)
        chunk_blocks = chunk_tokens(seq_len, CUT) // BLOCK_N
        in_req = tl.cdiv(block - first_block, chunk_blocks) * chunk_blocks
        cut = first_block + tl.minimum(in_req, tl.maximum(tl.cdiv(seq_len, BLOCK_N), 1))
    return cut


@triton.jit
def even_teams(teams, reqs):
    """How many teams share the line: as many for each request, if nearly all then have work.

    Requests of like length are then cut where they meet, if at all: nothing has to be merged.
    """
    even = teams // tl.maximum(reqs, 1) * reqs
    return tl.where(even * 10 >= teams * 9, even, teams)
