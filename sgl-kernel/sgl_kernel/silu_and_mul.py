# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc"
"""The gated activation of an MLP. Reference: silu_and_mul_ref in elementwise_ref."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sgl_kernel.launch import Launcher

_BLOCK = 2048
_NUM_WARPS = 4


@triton.jit
def _silu_and_mul_kernel(
    gate_up, out, row_stride, WIDTH: tl.constexpr, BLOCKS: tl.constexpr, BLOCK: tl.constexpr
):
    # One grid dimension, blocks of a row side by side: the others end at 65535.
    row = (tl.program_id(0) // BLOCKS).to(tl.int64)
    col = tl.program_id(0) % BLOCKS * BLOCK + tl.arange(0, BLOCK)
    inside = col < WIDTH
    source = gate_up + row * row_stride + col
    gate = tl.load(source, mask=inside, other=0.0)
    up = tl.load(source + WIDTH, mask=inside, other=0.0)
    wide = gate.to(tl.float32)
    activated = (wide / (1.0 + tl.exp(-wide))).to(gate.dtype)
    product = (activated.to(tl.float32) * up.to(tl.float32)).to(gate.dtype)
    tl.store(out + row * WIDTH + col, product, mask=inside)


_silu_and_mul = Launcher(_silu_and_mul_kernel)


def silu_and_mul(gate_up: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """gate_up [tokens, 2 * width], gate first -> silu(gate) * up, [tokens, width] contiguous, in
    `out` if given.

    f32, bf16 or f16, of any token stride. f32 inside, rounded where silu_and_mul_ref rounds; the
    exponential is within 1e-6 of exact where it matters to the result. Raises ValueError if shape
    or strides do not fit.
    """
    if gate_up.dim() != 2 or gate_up.shape[1] % 2 or gate_up.shape[1] == 0:
        raise ValueError(f"gate_up must be [tokens, 2 * width], got {tuple(gate_up.shape)}")
    if gate_up.stride(1) != 1:
        raise ValueError("rows of gate_up must be contiguous")
    tokens, width = gate_up.shape[0], gate_up.shape[1] // 2
    if out is None:
        out = torch.empty((tokens, width), dtype=gate_up.dtype, device=gate_up.device)
    elif out.shape != (tokens, width) or out.dtype != gate_up.dtype or not out.is_contiguous():
        raise ValueError(
            f"out must be contiguous {gate_up.dtype} [{tokens}, {width}], got {out.dtype} "
            f"{tuple(out.shape)}"
        )
    if tokens:
        block = min(_BLOCK, triton.next_power_of_2(width))
        blocks = -(-width // block)
        _silu_and_mul(
            (tokens * blocks, 1, 1),
            (gate_up, out),
            (),
            (gate_up.stride(0),),
            (width, blocks, block),
            num_warps=_NUM_WARPS,
        )
    return out
