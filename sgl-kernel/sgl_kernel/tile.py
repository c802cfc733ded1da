"""How the work of a matrix product is cut; see matmul. Needs neither torch nor Triton."""

from __future__ import annotations

from typing import NamedTuple


class Tile(NamedTuple):
    """How the work is cut. A program computes [block_m, block_n] from pieces of block_k.

    Of a fused product, block_n counts gate and up columns: the tile has block_n // 2 results a row.
    weight_first: the weight is the tensor cores' left operand, whose rows come in 64s; then few
    tokens leave none of them unused. split_k: so many programs share the sums of a tile, and a
    second kernel adds their f32 parts in order. programs_per_sm: that fit side by side. group_m:
    rows of tiles taken together, so that the last-level cache serves both operands. store_parts: 2
    halves the shared memory that the result passes through.
    """

    block_m: int
    block_n: int
    block_k: int
    stages: int
    warps: int
    weight_first: bool = False
    split_k: int = 1
    programs_per_sm: int = 1
    group_m: int = 8
    store_parts: int = 1

    def __str__(self) -> str:
        """Such as 128x256x64 stages4 warps8 store_parts2; what is as by default is left out."""
        words = ["x".join(str(size) for size in self[:3])]
        for name in ("stages", "warps", *self._field_defaults):
            value = getattr(self, name)
            if value != self._field_defaults.get(name):
                words.append(name if value is True else f"{name}{value}")
        return " ".join(words)
