# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc"
"""Matrix products sized for a lane's SMs, alone or fused with the gated activation of an MLP.

References: matmul_ref, and silu_and_mul_ref of elementwise_ref behind it.

One persistent kernel serves prefill and decode: as many programs as the lane holds at once take
output tiles in turn, and load the next tile's operands while they finish the last. Operands and
results move by TMA, which clips at the edges of a matrix: any number of tokens goes through the
same compiled kernel, and what lies behind the last row is neither read nor written.

An element is one sum over k in a fixed order that the tile alone decides: neither num_sms nor the
other tokens of a batch change its bits. Another tile may, in the last place.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from sgl_kernel.launch import Launcher
from sgl_kernel.tile import Tile

# TMA wants addresses and strides at multiples of 16 bytes: 8 elements of 16 bits.
_ALIGNED_BYTES = 16
_ALIGNED_ELEMENTS = 8
# Rows of the tensor cores' left operand come in so many.
_LEFT_ROWS = 64
_DTYPES = (torch.bfloat16, torch.float16)
_SUM_BLOCK = 1024
_SUM_WARPS = 4


def matmul_ref(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x [m, k], weight [n, k] -> x @ weight.T, [m, n] float64."""
    return x.double() @ weight.double().T


@triton.jit
def _place(item, m, width, BLOCK_M: tl.constexpr, OUT_N: tl.constexpr, GROUP_M: tl.constexpr):
    """(row of tiles, column of tiles, part of the sum) of a piece of work: down a group of rows
    first, then on to the next column."""
    rows = tl.cdiv(m, BLOCK_M)
    columns = tl.cdiv(width, OUT_N)
    part = item // (rows * columns)
    tile = item % (rows * columns)
    first = tile // (GROUP_M * columns) * GROUP_M
    height = min(rows - first, GROUP_M)
    within = tile % (GROUP_M * columns)
    return first + within % height, within // height, part


@triton.jit
def _silu_and_mul(gate, up):
    """gate, up of a 16-bit dtype -> silu(gate) * up, rounded where silu_and_mul_ref rounds."""
    wide = gate.to(tl.float32)
    activated = (wide / (1.0 + tl.exp(-wide))).to(gate.dtype)
    return (activated.to(tl.float32) * up.to(tl.float32)).to(gate.dtype)


@triton.jit(do_not_specialize=["m", "width", "k", "parts"])
def _matmul_kernel(
    x,
    weight,
    out,
    m,
    width,
    k,
    parts,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HALVES: tl.constexpr,
    GROUP_M: tl.constexpr,
    WEIGHT_FIRST: tl.constexpr,
    STORE_PARTS: tl.constexpr,
):
    """Descriptors of x [m, k], weight [HALVES, width, k] and out [parts, m, width]."""
    OUT_N: tl.constexpr = BLOCK_N // HALVES
    STORE_N: tl.constexpr = OUT_N // STORE_PARTS
    items = tl.cdiv(m, BLOCK_M) * tl.cdiv(width, OUT_N) * parts
    # The last part may reach behind k, where TMA reads zeros.
    part_blocks = tl.cdiv(tl.cdiv(k, BLOCK_K), parts)
    tl.assume(part_blocks > 0)
    for item in tl.range(tl.program_id(0), items, tl.num_programs(0), flatten=True):
        row, column, part = _place(item, m, width, BLOCK_M, OUT_N, GROUP_M)
        if WEIGHT_FIRST:
            sums = tl.zeros((OUT_N, BLOCK_M), tl.float32)
            up_sums = tl.zeros((OUT_N, BLOCK_M), tl.float32)
        else:
            sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for block in range(part_blocks):
            at = (part * part_blocks + block) * BLOCK_K
            tokens = x.load([row * BLOCK_M, at])
            if WEIGHT_FIRST:
                weights = weight.load([0, column * OUT_N, at]).reshape(OUT_N, BLOCK_K)
                sums = tl.dot(weights, tokens.T, sums)
                if HALVES == 2:
                    up_weights = weight.load([1, column * OUT_N, at]).reshape(OUT_N, BLOCK_K)
                    up_sums = tl.dot(up_weights, tokens.T, up_sums)
            else:
                # Gate and up rows become one operand, for instructions as wide as without halves.
                weights = weight.load([0, column * OUT_N, at]).reshape(BLOCK_N, BLOCK_K)
                sums = tl.dot(tokens, weights.T, sums)

        values = sums.to(out.dtype)
        if HALVES == 2:
            if WEIGHT_FIRST:
                gate, up = values, up_sums.to(out.dtype)
            else:
                # A thread holds both halves of its columns: nothing moves between threads.
                gate, up = values.reshape(BLOCK_M, 2, OUT_N).permute(0, 2, 1).split()
            values = _silu_and_mul(gate, up)
        if WEIGHT_FIRST:
            values = values.T
        top = row * BLOCK_M
        left = column * OUT_N
        if STORE_PARTS == 2:
            near, far = values.reshape(BLOCK_M, 2, STORE_N).permute(0, 2, 1).split()
            out.store([part, top, left], near.reshape(1, BLOCK_M, STORE_N))
            out.store([part, top, left + STORE_N], far.reshape(1, BLOCK_M, STORE_N))
        else:
            out.store([part, top, left], values.reshape(1, BLOCK_M, OUT_N))


@triton.jit
def _sum_of_parts(at, part_stride, inside, PARTS: tl.constexpr):
    total = tl.load(at, mask=inside, other=0.0)
    for part in tl.static_range(1, PARTS):
        total += tl.load(at + part * part_stride, mask=inside, other=0.0)
    return total


@triton.jit(do_not_specialize=["m", "width"])
def _sum_kernel(
    partial, out, m, width, PARTS: tl.constexpr, HALVES: tl.constexpr, BLOCK: tl.constexpr
):
    """partial [PARTS, m, HALVES * width] f32 -> out [m, width]."""
    size = m.to(tl.int64) * width
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < size
    at = partial + index // width * (width * HALVES) + index % width
    values = _sum_of_parts(at, size * HALVES, inside, PARTS).to(out.dtype.element_ty)
    if HALVES == 2:
        up = _sum_of_parts(at + width, size * HALVES, inside, PARTS).to(out.dtype.element_ty)
        values = _silu_and_mul(values, up)
    tl.store(out + index, values, mask=inside)


def matmul(
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    num_sms: int,
    tile: Tile,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """x @ weight.T, [m, n] contiguous, of x's dtype; summed in f32.

    x [m, k] bf16 or f16, of any row stride that is a multiple of 8; weight [n, k] contiguous, of
    x's dtype; n and k multiples of 8. num_sms: of the lane, which bounds the programs launched.
    out: to be written and returned, instead of a new tensor. Raises ValueError if shapes, dtypes,
    strides or the tile do not fit.
    """
    return _launch(x, weight, num_sms, tile, out, halves=1)


def matmul_silu_and_mul(
    x: torch.Tensor,
    gate_up: torch.Tensor,
    *,
    num_sms: int,
    tile: Tile,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """silu(x @ gate.T) * (x @ up.T), [m, width] contiguous, of x's dtype.

    gate_up [2 * width, k], gate first, width a multiple of 8. Rounded where matmul and silu_and_mul
    round, one after the other. Arguments and errors are otherwise matmul's.
    """
    if gate_up.dim() != 2 or gate_up.shape[0] % 2:
        raise ValueError(f"gate_up must be [2 * width, k], got {tuple(gate_up.shape)}")
    return _launch(x, gate_up, num_sms, tile, out, halves=2)


def _launch(
    x: torch.Tensor,
    weight: torch.Tensor,
    num_sms: int,
    tile: Tile,
    out: torch.Tensor | None,
    halves: int,
) -> torch.Tensor:
    _check(x, weight, num_sms, tile, halves)
    m, k = x.shape
    width = weight.shape[0] // halves
    if out is None:
        out = torch.empty((m, width), dtype=x.dtype, device=x.device)
    elif out.shape != (m, width) or out.dtype != x.dtype or not out.is_contiguous():
        raise ValueError(
            f"out must be contiguous, {x.dtype}, {(m, width)}; got {out.dtype},"
            f" {tuple(out.shape)}, strides {out.stride()}"
        )
    if m == 0:
        return out
    split = tile.split_k > 1
    # Parts are sums that nothing has been rounded or applied to: all columns, halves side by side.
    kernel_halves = 1 if split else halves
    columns = weight.shape[0] // kernel_halves
    shape = [tile.split_k, m, columns]
    sums = torch.empty(shape, dtype=torch.float32, device=x.device) if split else out
    out_n = tile.block_n // kernel_halves
    box_halves = 1 if tile.weight_first else kernel_halves
    items = -(-m // tile.block_m) * -(-columns // out_n) * tile.split_k
    descriptors = (
        TensorDescriptor(x, [m, k], [x.stride(0), 1], [tile.block_m, tile.block_k]),
        TensorDescriptor(
            weight,
            [kernel_halves, columns, k],
            [columns * k, k, 1],
            [box_halves, out_n, tile.block_k],
        ),
        TensorDescriptor(
            sums, shape, [m * columns, columns, 1], [1, tile.block_m, out_n // tile.store_parts]
        ),
    )
    grid = (min(num_sms * tile.programs_per_sm, items), 1, 1)
    _products(grid, descriptors, (m, columns, k, tile.split_k), tile, kernel_halves)
    if split:
        blocks = -(-m * width // _SUM_BLOCK)
        constants = (tile.split_k, halves, _SUM_BLOCK)
        _sum((blocks, 1, 1), (sums, out), (m, width), (), constants, num_warps=_SUM_WARPS)
    return out


class _ProductLauncher:
    """Launcher for _matmul_kernel: asks Triton once for each tile, dtype and device."""

    def __init__(self) -> None:
        self._compiled: dict[tuple[Any, ...], Any] = {}

    def __call__(
        self,
        grid: tuple[int, int, int],
        descriptors: tuple[TensorDescriptor, TensorDescriptor, TensorDescriptor],
        counts: tuple[int, int, int, int],
        tile: Tile,
        halves: int,
    ) -> None:
        x = descriptors[0].base
        # A split has f32 parts: split_k itself is not compiled in, whether there is one is.
        key = (x.get_device(), x.dtype, halves, tile.split_k > 1, tile._replace(split_k=1))
        constants = (
            tile.block_m,
            tile.block_n,
            tile.block_k,
            halves,
            tile.group_m,
            tile.weight_first,
            tile.store_parts,
        )
        compiled = self._compiled.get(key)
        if compiled is not None:
            compiled[grid](*descriptors, *counts, *constants)
            return
        self._compiled[key] = _matmul_kernel[grid](
            *descriptors, *counts, *constants, num_stages=tile.stages, num_warps=tile.warps
        )


_products = _ProductLauncher()
_sum = Launcher(_sum_kernel)


def _check(x: torch.Tensor, weight: torch.Tensor, num_sms: int, tile: Tile, halves: int) -> None:
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(
            f"x {tuple(x.shape)} and weight {tuple(weight.shape)} must be [m, k] and [n, k]"
        )
    if x.dtype not in _DTYPES or weight.dtype != x.dtype:
        raise ValueError(f"x is {x.dtype}, weight {weight.dtype}: must be bfloat16 or float16 both")
    width, k = weight.shape[0] // halves, weight.shape[1]
    if width == 0 or k == 0 or width % _ALIGNED_ELEMENTS or k % _ALIGNED_ELEMENTS:
        raise ValueError(
            f"weight {tuple(weight.shape)}: columns of the result ({width}) and k must be positive"
            f" multiples of {_ALIGNED_ELEMENTS}"
        )
    # The stride of a row that has no next one is arbitrary, and the hardware still wants it so.
    if x.stride(1) != 1 or x.stride(0) % _ALIGNED_ELEMENTS or x.data_ptr() % _ALIGNED_BYTES:
        raise ValueError(
            f"x must have contiguous rows that start at multiples of {_ALIGNED_BYTES} bytes, got"
            f" strides {x.stride()}"
        )
    if not weight.is_contiguous() or weight.data_ptr() % _ALIGNED_BYTES:
        raise ValueError(
            f"weight must be contiguous and start at a multiple of {_ALIGNED_BYTES} bytes"
        )
    if num_sms < 1:
        raise ValueError(f"num_sms must be at least 1, got {num_sms}")
    if tile.weight_first and tile.block_n < _LEFT_ROWS * halves:
        raise ValueError(
            f"tile {tile}: weight_first needs block_n of {_LEFT_ROWS * halves} or more"
        )
    if tile.split_k < 1 or tile.programs_per_sm < 1 or tile.store_parts not in (1, 2):
        raise ValueError(f"tile {tile}: split_k, programs_per_sm or store_parts out of range")
