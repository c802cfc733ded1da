"""Which tiles of the Triton kernel are worth measuring for a product."""

from __future__ import annotations

from collections.abc import Iterator

from sgl_kernel.tile import Tile

# Above this many tokens the product is bound by arithmetic on any lane.
DECODE_TOKENS = 128
_SPLIT_TOKENS = 512
_MAX_SPLIT = 8
# Blocks of k that a part of a split sum has at least: fewer do not fill the pipeline.
_MIN_PART_BLOCKS = 8
# Of a program on Hopper, less what barriers take.
_SHARED_BYTES = (227 << 10) - 256
# The share of its slots that a split must win to pay for the second kernel.
_WORTH_SPLITTING = 0.1

# 256 columns keep the tensor cores busiest; what is smaller leaves less of the last wave empty.
_LARGE = (
    Tile(128, 256, 64, 4, 8, store_parts=2),
    Tile(256, 128, 64, 4, 8, store_parts=2),
    Tile(128, 128, 64, 3, 4, programs_per_sm=2, store_parts=2),
    Tile(128, 128, 64, 6, 8),
    Tile(64, 256, 64, 4, 4),
)
_LARGE_RARE = (
    Tile(128, 256, 64, 3, 8),
    Tile(128, 256, 64, 3, 8, store_parts=2),
    Tile(128, 256, 64, 4, 8, group_m=16, store_parts=2),
    Tile(128, 256, 64, 4, 8, group_m=4, store_parts=2),
    Tile(128, 256, 128, 2, 8, store_parts=2),
    Tile(256, 128, 64, 3, 8),
    Tile(128, 128, 64, 4, 4),
    Tile(128, 128, 128, 3, 8),
    Tile(128, 64, 64, 4, 4, programs_per_sm=2),
)
# By block_m. The sums of a tile pass through shared memory as f32 when they are split.
_SMALL = {
    16: (
        Tile(16, 128, 128, 5, 4, weight_first=True),
        Tile(16, 64, 256, 4, 4, weight_first=True),
        Tile(16, 64, 128, 4, 4, weight_first=True, programs_per_sm=2),
    ),
    32: (
        Tile(32, 128, 128, 5, 4, weight_first=True),
        Tile(32, 64, 256, 4, 4, weight_first=True),
        Tile(32, 64, 128, 4, 4, weight_first=True, programs_per_sm=2),
    ),
    64: (
        Tile(64, 128, 128, 4, 4, weight_first=True),
        Tile(64, 64, 128, 3, 4, weight_first=True, programs_per_sm=2),
        Tile(64, 256, 64, 4, 4),
    ),
    128: (
        Tile(128, 256, 64, 3, 8, store_parts=2),
        Tile(128, 128, 64, 4, 8),
        Tile(128, 128, 64, 4, 4, weight_first=True),
        Tile(128, 64, 128, 4, 4),
    ),
}
_SMALL_RARE = {
    16: (
        Tile(16, 128, 64, 8, 4, weight_first=True),
        Tile(16, 256, 64, 5, 8, weight_first=True),
        Tile(16, 128, 128, 3, 4, weight_first=True, programs_per_sm=2),
    ),
    32: (
        Tile(32, 128, 64, 8, 4, weight_first=True),
        Tile(32, 256, 64, 5, 8, weight_first=True),
        Tile(32, 128, 64, 4, 4, weight_first=True, programs_per_sm=2),
    ),
    64: (
        Tile(64, 128, 64, 4, 4, weight_first=True, programs_per_sm=2),
        Tile(64, 128, 64, 8, 4, weight_first=True),
        Tile(64, 128, 128, 3, 4),
    ),
    128: (
        Tile(128, 256, 64, 4, 8, store_parts=2),
        Tile(128, 128, 64, 3, 4, programs_per_sm=2, store_parts=2),
        Tile(128, 128, 128, 3, 8),
        Tile(128, 64, 64, 4, 4, programs_per_sm=2),
    ),
}
# Rows that the tensor cores' left operand comes in.
_LEFT_ROWS = 64


def tiles_for(
    m: int, n: int, k: int, num_sms: int, *, fused: bool, rare: bool = False
) -> Iterator[Tile]:
    """Tiles for x [m, k] and a weight [n, k], each as it is and, where that fills the SMs clearly
    better, with its sums split.

    fused: the weight is a gate and an up projection. rare: also those that hardly ever win.
    """
    small = min((size for size in _SMALL if size >= m), default=None)
    if small is None:
        tiles = _LARGE + (_LARGE_RARE if rare else ())
    else:
        tiles = _SMALL[small] + (_SMALL_RARE[small] if rare else ())
    halves = 2 if fused else 1
    for tile in tiles:
        if tile.weight_first and tile.block_n < halves * _LEFT_ROWS:
            continue
        yield tile
        split = best_split(tile, m, n, k, num_sms) if m <= _SPLIT_TOKENS else 1
        if split > 1 and not (fused and tile.block_n < 128):
            yield _split(tile, split)


def _split(tile: Tile, split: int) -> Tile:
    """The tile with split sums, and no more stages than leave room for the f32 result."""
    result_bytes = 4 * tile.block_m * tile.block_n // tile.store_parts
    stage_bytes = 2 * (tile.block_m + tile.block_n) * tile.block_k
    stages = min(tile.stages, (_SHARED_BYTES - result_bytes) // stage_bytes)
    return tile._replace(split_k=split, stages=stages)


def best_split(tile: Tile, m: int, n: int, k: int, num_sms: int) -> int:
    """The smallest split_k that fills the last wave about as well as any; 1 if none is worth it."""
    tiles = -(-m // tile.block_m) * -(-n // tile.block_n)
    slots = num_sms * tile.programs_per_sm
    most = min(_MAX_SPLIT, max(1, k // tile.block_k // _MIN_PART_BLOCKS))

    def filled(split: int) -> float:
        items = tiles * split
        return items / (-(-items // slots) * slots)

    best = max(filled(split) for split in range(1, most + 1))
    if best < filled(1) + _WORTH_SPLITTING:
        return 1
    return next(s for s in range(1, most + 1) if filled(s) >= best - _WORTH_SPLITTING / 2)
