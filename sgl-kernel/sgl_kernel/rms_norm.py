# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc"
"""RMS norm of rows, alone or fused with the addition of the residual: one pass over memory.

References: rms_norm_ref and add_rms_norm_ref in elementwise_ref.

A program holds a whole row in registers. How it is spread over threads depends on the row's width
alone, so a token gets the same bits in a decode step as in a prefill of thousands.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sgl_kernel.launch import Launcher

_ELEMENTS_PER_THREAD = 16
_MAX_WARPS = 32
# 32 elements a thread at most: a wider row does not fit into registers.
_MAX_WIDTH = 32768


@triton.jit
def _normed(row, weight, eps, WIDTH: tl.constexpr):
    """row, weight [BLOCK] of the model's dtype, zero beyond WIDTH -> like row."""
    wide = row.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, axis=0) / WIDTH + eps)
    normed = (wide * scale).to(row.dtype)
    # A product of two 16-bit floats is exact in f32: rounding it once is multiplying in 16 bits.
    return (normed.to(tl.float32) * weight.to(tl.float32)).to(row.dtype)


@triton.jit
def _rms_norm_kernel(x, weight, out, eps, x_row_stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK)
    inside = col < WIDTH
    x_row = tl.load(x + row * x_row_stride + col, mask=inside, other=0.0)
    weights = tl.load(weight + col, mask=inside, other=0.0)
    tl.store(out + row * WIDTH + col, _normed(x_row, weights, eps, WIDTH), mask=inside)


@triton.jit
def _add_rms_norm_kernel(
    x,
    residual,
    weight,
    out,
    total,
    eps,
    x_row_stride,
    residual_row_stride,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK)
    inside = col < WIDTH
    x_row = tl.load(x + row * x_row_stride + col, mask=inside, other=0.0)
    residual_row = tl.load(residual + row * residual_row_stride + col, mask=inside, other=0.0)
    weights = tl.load(weight + col, mask=inside, other=0.0)
    total_row = (x_row.to(tl.float32) + residual_row.to(tl.float32)).to(x_row.dtype)
    tl.store(total + row * WIDTH + col, total_row, mask=inside)
    tl.store(out + row * WIDTH + col, _normed(total_row, weights, eps, WIDTH), mask=inside)


_rms_norm = Launcher(_rms_norm_kernel)
_add_rms_norm = Launcher(_add_rms_norm_kernel)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Normalises every row: [rows, width] contiguous, of x's dtype.

    x [rows, width] f32, bf16 or f16, of any row stride; weight [width], of x's dtype. Rounds where
    rms_norm_ref does; the sum of squares, taken in another order, may move a result to the next
    number of the dtype. Raises ValueError if shapes, dtypes or strides do not fit.
    """
    _check_rows("x", x, weight)
    rows, width = x.shape
    out = torch.empty((rows, width), dtype=x.dtype, device=x.device)
    if rows:
        block, num_warps = _tile(width)
        _rms_norm(
            (rows, 1, 1),
            (x, weight, out),
            (),
            (eps, x.stride(0)),
            (width, block),
            num_warps=num_warps,
        )
    return out


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(rms_norm(x + residual), x + residual), both [rows, width] contiguous, in one launch.

    Arguments as for rms_norm; x and residual, of one shape and dtype, are left as they are. The sum
    has the bits of add_rms_norm_ref's.
    """
    _check_rows("x", x, weight)
    _check_rows("residual", residual, weight)
    if x.shape != residual.shape:
        raise ValueError(f"x {tuple(x.shape)} and residual {tuple(residual.shape)} differ")
    rows, width = x.shape
    out = torch.empty((rows, width), dtype=x.dtype, device=x.device)
    total = torch.empty_like(out)
    if rows:
        block, num_warps = _tile(width)
        _add_rms_norm(
            (rows, 1, 1),
            (x, residual, weight, out, total),
            (),
            (eps, x.stride(0), residual.stride(0)),
            (width, block),
            num_warps=num_warps,
        )
    return out, total


def _tile(width: int) -> tuple[int, int]:
    """(elements a program holds, its warps)."""
    block = triton.next_power_of_2(width)
    return block, min(max(block // (32 * _ELEMENTS_PER_THREAD), 1), _MAX_WARPS)


def _check_rows(name: str, x: torch.Tensor, weight: torch.Tensor) -> None:
    if x.dim() != 2 or weight.shape != x.shape[1:] or not 0 < x.shape[1] <= _MAX_WIDTH:
        raise ValueError(
            f"{name} {tuple(x.shape)} with weight {tuple(weight.shape)}: must be [rows, width] and"
            f" [width], width up to {_MAX_WIDTH}"
        )
    if x.dtype != weight.dtype:
        raise ValueError(f"{name} is {x.dtype}, weight {weight.dtype}")
    if not x.stride(1) == weight.stride(0) == 1:
        raise ValueError(f"rows of {name} and weight must be contiguous")
