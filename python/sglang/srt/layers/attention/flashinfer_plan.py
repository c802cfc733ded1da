"""Which CTA computes which tile: the work lists of FlashInfer's persistent SM90 prefill kernels.

A tile is up to tile_rows new tokens of one request for one query head. The kernel is launched with
one CTA for every SM of the device, and CTA c goes through items cta_starts[c] .. cta_starts[c + 1].
FlashInfer's own planner gives work to all of them, so that on a lane with fewer SMs some start
when others have finished, and the lane takes nearly twice its time. Here only as many CTAs as the
lane has SMs get work; the hardware starts those first, and the others find nothing and leave.

Tiles are dealt heaviest first, each to the CTA with least work so far. Heads whose keys and values
fit the L2 cache together come before the next ones, unless that would unbalance the CTAs.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int32]

# Keys and values that CTAs read at one time: a third of an H100's L2, which decode also streams
# its weights through.
L2_SECTION_BYTES = 16 << 20

# How much longer than a perfect division the longest CTA may take for the sake of the cache.
_IMBALANCE_FOR_CACHE = 1.03

_ALIGNMENT_BYTES = 16


class PrefillShape(NamedTuple):
    """What of a batch the planner looks at; all lists have one entry a request.

    new_lens, seq_lens: new tokens, and new plus cached ones, at least as many.
    kv_starts: where the kernel finds the request's first key: an index into the key rows, or into
    the table of slots.
    first_token: row of q where the first request's new tokens begin; the others follow.
    """

    new_lens: Sequence[int]
    seq_lens: Sequence[int]
    kv_starts: Sequence[int]
    first_token: int = 0


class Heads(NamedTuple):
    """num_kv_heads divides num_heads. kv_bytes: one token's key and value of one kv head."""

    num_heads: int
    num_kv_heads: int
    kv_bytes: int


@dataclass(frozen=True, slots=True)
class WorkLists:
    """Items of all CTAs, one CTA's after the other's; in the order in which the kernel's plan
    names them, [items] i32 each but cta_starts [num_ctas + 1].

    tiles: which tile of its request, counted in tile_rows. token_starts: the request's first row
    of q. requests: the request's place in the batch.
    """

    tiles: Ints
    token_starts: Ints
    kv_starts: Ints
    new_lens: Ints
    seq_lens: Ints
    heads: Ints
    cta_starts: Ints
    requests: Ints


class PackedWork(NamedTuple):
    """WorkLists in one array for one copy to the device.

    info: the kernel's plan: byte offsets of the eight lists in order, then 0, which says that
    heads have schedules of their own. kv_starts, requests: where these lists lie in `ints`.
    """

    ints: Ints
    info: list[int]
    kv_starts: slice
    requests: slice


def deal(
    shape: PrefillShape,
    heads: Heads,
    *,
    tile_rows: int,
    num_sms: int,
    num_ctas: int,
    section_bytes: int = L2_SECTION_BYTES,
) -> WorkLists:
    """Deals every tile of every head to one of the first num_sms CTAs, causal attention assumed.

    num_ctas: how many the kernel is launched with, at least num_sms: the device's SMs.
    """
    new_lens = np.asarray(shape.new_lens, dtype=np.int64)
    seq_lens = np.asarray(shape.seq_lens, dtype=np.int64)
    token_starts = shape.first_token + np.cumsum(new_lens) - new_lens
    tiles_per_req = -(-new_lens // tile_rows)
    requests = np.repeat(np.arange(len(new_lens)), tiles_per_req)
    first_tiles = np.cumsum(tiles_per_req) - tiles_per_req
    tiles = np.arange(len(requests)) - first_tiles[requests]
    seen = np.minimum(seq_lens[requests], (seq_lens - new_lens)[requests] + (tiles + 1) * tile_rows)
    # Loading queries and storing results takes about as long as attending two tiles of keys.
    costs = seen + 2 * tile_rows

    head = np.tile(np.arange(heads.num_heads), len(tiles))
    tile = np.repeat(np.arange(len(tiles)), heads.num_heads)
    cost = costs[tile]
    section = head // _section_heads(heads, int(seq_lens.sum()), section_bytes)
    order = np.lexsort((head, -cost, section))
    owner, longest = _deal_in_order(cost[order], num_sms)
    if longest * num_sms > _IMBALANCE_FOR_CACHE * cost.sum() and section.any():
        order = np.argsort(-cost, kind="stable")
        owner, _ = _deal_in_order(cost[order], num_sms)
    item = order[np.argsort(owner, kind="stable")]

    cta_starts = np.zeros(num_ctas + 1, dtype=np.int32)
    counts = np.bincount(owner, minlength=num_ctas)
    np.cumsum(counts, out=cta_starts[1:])
    request = requests[tile[item]]
    return WorkLists(
        tiles=_i32(tiles[tile[item]]),
        token_starts=_i32(token_starts[request]),
        kv_starts=_i32(np.asarray(shape.kv_starts, dtype=np.int64)[request]),
        new_lens=_i32(new_lens[request]),
        seq_lens=_i32(seq_lens[request]),
        heads=_i32(head[item]),
        cta_starts=cta_starts,
        requests=_i32(request),
    )


def max_items(tokens: int, requests: int, num_heads: int, tile_rows: int) -> int:
    """No batch of so many tokens and requests, at least one token each, has more items."""
    return (tokens // tile_rows + min(requests, tokens)) * num_heads


def pack(work: WorkLists, capacity: int = 0) -> PackedWork:
    """Lays the lists out one after the other, each on a boundary of 16 bytes.

    With a capacity every list has room for so many items, so that the layout does not depend on
    the batch.
    """
    lists = (
        work.tiles,
        work.token_starts,
        work.kv_starts,
        work.new_lens,
        work.seq_lens,
        work.heads,
        work.cta_starts,
        work.requests,
    )
    step = _ALIGNMENT_BYTES // np.dtype(np.int32).itemsize
    places: list[slice] = []
    end = 0
    for values in lists:
        places.append(slice(end, end + len(values)))
        end += -(-max(len(values), capacity) // step) * step
    ints = np.zeros(end, dtype=np.int32)
    for place, values in zip(places, lists, strict=True):
        ints[place] = values
    info = [place.start * ints.itemsize for place in places]
    return PackedWork(ints, [*info, 0], kv_starts=places[2], requests=places[7])


def _section_heads(heads: Heads, kv_tokens: int, section_bytes: int) -> int:
    """Query heads that one section of the cache serves; whole groups."""
    kv_heads = max(1, section_bytes // max(1, kv_tokens * heads.kv_bytes))
    return min(kv_heads, heads.num_kv_heads) * (heads.num_heads // heads.num_kv_heads)


def _deal_in_order(cost: npt.NDArray[np.int64], num_sms: int) -> tuple[npt.NDArray[np.int64], int]:
    """Each item to the CTA with least work so far: (owner [items], work of the longest CTA)."""
    if len(cost) <= num_sms:
        return np.arange(len(cost)), int(cost.max(initial=0))
    # A CTA is the number work * num_sms + index, so that the heap holds plain integers: a third
    # of the time that tuples take, and there are 2,048 items in 8,192 tokens of 32 heads.
    heap = list(range(num_sms))
    replace = heapq.heapreplace
    scaled = (cost * num_sms).tolist()
    owner = [replace(heap, heap[0] + work) % num_sms for work in scaled]
    return np.asarray(owner, dtype=np.int64), max(heap) // num_sms


def _i32(values: npt.NDArray[np.int64]) -> Ints:
    return values.astype(np.int32)
