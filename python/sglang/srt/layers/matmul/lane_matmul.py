"""LaneMatmul: a lane's matrix products, each by the kernel that was fastest there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch

from sglang.srt.layers.activation import silu_and_mul
from sglang.srt.layers.linear import Linear
from sglang.srt.layers.matmul.choice import (
    Backend,
    Choice,
    Product,
    deep_gemm_piece,
    product_of,
)
from sglang.srt.layers.matmul.scratch import NO_SCRATCH, Scratch
from sglang.srt.layers.matmul.table import LaneTable, rung


class _Kernel(NamedTuple):
    """piece: rows that a launch must have exactly; 0: as many as there are."""

    product: Product
    piece: int


class _Ladder(NamedTuple):
    """Kernels by rising number of tokens; None: torch, or not fused."""

    tokens: tuple[int, ...]
    kernels: tuple[_Kernel | None, ...]

    def at(self, m: int) -> _Kernel | None:
        return self.kernels[rung(self.tokens, m)]


class LaneMatmul:
    """A Matmul (see base.py) for a lane of `num_sms` SMs.

    Shapes, dtypes and layouts that the table was not made for are left to torch.
    """

    def __init__(self, num_sms: int, table: LaneTable, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._products = {
            tuple(shape): ladder
            for shape, choices in table.products.items()
            if (ladder := _ladder(choices, num_sms, fused=False)) is not None
        }
        self._fused = {
            tuple(shape): ladder
            for shape, choices in table.fused.items()
            if (ladder := _ladder(choices, num_sms, fused=True)) is not None
        }

    def __call__(self, x: torch.Tensor, linear: Linear) -> torch.Tensor:
        """See Matmul."""
        weight, bias = linear
        kernel = self._find(self._products, x, weight)
        if kernel is None:
            return linear(x)
        out = x.new_empty((x.shape[0], weight.shape[0]))
        self._fill(kernel, x, weight, out)
        return out if bias is None else out.add_(bias)

    def gate_up_silu(
        self, x: torch.Tensor, linear: Linear, scratch: Scratch = NO_SCRATCH
    ) -> torch.Tensor:
        """See ScratchMatmul."""
        weight, bias = linear
        if bias is not None:
            return silu_and_mul(self(x, linear))
        activated = scratch.activated(x, weight)
        fused = self._find(self._fused, x, weight)
        if fused is not None:
            fused.product(x, weight, activated)
            return activated
        gate_up = scratch.gate_up(x, weight)
        self._into(x, weight, gate_up)
        return silu_and_mul(gate_up, activated)

    def _into(self, x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
        kernel = self._find(self._products, x, weight)
        if kernel is None:
            torch.mm(x, weight.t(), out=out)
        else:
            self._fill(kernel, x, weight, out)

    def _find(
        self, ladders: Mapping[tuple[int, ...], _Ladder], x: torch.Tensor, weight: torch.Tensor
    ) -> _Kernel | None:
        ladder = ladders.get(weight.shape)
        if ladder is None or x.dim() != 2 or x.shape[0] == 0:
            return None
        if x.dtype != self._dtype or weight.dtype != self._dtype or not x.is_contiguous():
            return None
        return ladder.at(x.shape[0])

    def _fill(
        self, kernel: _Kernel, x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor
    ) -> None:
        m = x.shape[0]
        piece = kernel.piece or m
        whole = m - m % piece
        for first in range(0, whole, piece):
            last = first + piece
            kernel.product(x[first:last], weight, out[first:last])
        if whole == m:
            return
        # Fewer rows than a piece: a lower rung, or torch where that one's pieces are too large.
        rest = self._find(self._products, x[whole:], weight)
        if rest is None or rest.piece > m - whole:
            torch.mm(x[whole:], weight.t(), out=out[whole:])
        else:
            self._fill(rest, x[whole:], weight, out[whole:])


def _ladder(choices: Mapping[int, Choice | None], num_sms: int, *, fused: bool) -> _Ladder | None:
    """None if torch, or nothing fused, is best throughout."""
    tokens = tuple(sorted(choices))
    kernels = tuple(_kernel(choices[m], m, num_sms, fused) for m in tokens)
    return _Ladder(tokens, kernels) if any(kernels) else None


def _kernel(choice: Choice | None, m: int, num_sms: int, fused: bool) -> _Kernel | None:
    if choice is None or choice.backend is Backend.TORCH:
        return None
    piece = deep_gemm_piece(m) if choice.backend is Backend.DEEP_GEMM else 0
    return _Kernel(product_of(choice, num_sms, fused=fused), piece)
