# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc"
"""Rotary embedding of a fused projection, in place; with the norm of its heads, if a model has one.

    heads of a token   [ q 0 | q 1 | ... | k 0 | k 1 | ... | v 0 | v 1 | ... ]
                         '--- a program --'                  '- untouched -'

Reference: rotate_heads_ref in elementwise_ref.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sgl_kernel.elementwise_ref import HeadNorm

_ELEMENTS_PER_PROGRAM = 1024
_NUM_WARPS = 2


# A batch's integers are parts of one upload: their alignment must not choose between compilations.
@triton.jit(do_not_specialize_on_alignment=["positions"])
def _rotate_heads_kernel(
    heads,
    cos,
    sin,
    positions,
    q_weight,
    k_weight,
    eps,
    token_stride,
    head_stride,
    Q_HEADS: tl.constexpr,
    ROTATED_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    HAS_NORM: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):
    # One grid dimension, the heads of a token side by side: the others end at 65535.
    token = (tl.program_id(0) // BLOCKS).to(tl.int64)
    head = (tl.program_id(0) % BLOCKS * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS))[:, None]
    dim = tl.broadcast_to(tl.arange(0, BLOCK_HALF)[None, :], [BLOCK_HEADS, BLOCK_HALF])
    inside = (head < ROTATED_HEADS) & (dim < HALF)
    target = heads + token * token_stride + head * head_stride + dim
    first = tl.load(target, mask=inside, other=0.0)
    second = tl.load(target + HALF, mask=inside, other=0.0)
    dtype: tl.constexpr = first.dtype
    wide_first = first.to(tl.float32)
    wide_second = second.to(tl.float32)

    if HAS_NORM:
        is_q = head < Q_HEADS
        weight_first = _weight_of_head(q_weight, k_weight, dim, is_q, inside)
        weight_second = _weight_of_head(q_weight + HALF, k_weight + HALF, dim, is_q, inside)
        square_sum = tl.sum(wide_first * wide_first + wide_second * wide_second, axis=1)
        scale = tl.rsqrt(square_sum / (2 * HALF) + eps)[:, None]
        # The model rounds twice: the normed head, and its product with the weight.
        wide_first = (wide_first * scale).to(dtype).to(tl.float32) * weight_first
        wide_second = (wide_second * scale).to(dtype).to(tl.float32) * weight_second
        wide_first = wide_first.to(dtype).to(tl.float32)
        wide_second = wide_second.to(dtype).to(tl.float32)

    row = tl.load(positions + token) * HALF
    cosine = tl.load(cos + row + dim, mask=inside, other=0.0)
    sine = tl.load(sin + row + dim, mask=inside, other=0.0)
    tl.store(target, (wide_first * cosine - wide_second * sine).to(dtype), mask=inside)
    tl.store(target + HALF, (wide_second * cosine + wide_first * sine).to(dtype), mask=inside)


@triton.jit
def _weight_of_head(q_weight, k_weight, dim, is_q, inside):
    """Half of each head's norm weight, [heads, dims] f32."""
    of_q = tl.load(q_weight + dim, mask=inside & is_q, other=0.0)
    of_k = tl.load(k_weight + dim, mask=inside & ~is_q, other=0.0)
    return tl.where(is_q, of_q, of_k).to(tl.float32)


def rotate_heads(
    heads: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    *,
    num_heads: int,
    num_kv_heads: int,
    norm: HeadNorm | None,
) -> None:
    """Norms, if norm is given, and rotates the q and k heads of a fused projection, in place.

    heads [tokens, num_heads q | num_kv_heads k | any others, head_dim] f32, bf16 or f16, of any
    token and head stride. cos, sin [positions, head_dim / 2] f32, contiguous. positions [tokens]
    i64, below the tables' rows. norm's weights are of heads' dtype.

    Without a norm the result has the bits of rotate_heads_ref's; with one it may be off by a step
    of the dtype, see rms_norm. Raises ValueError if shapes, dtypes or strides do not fit.
    """
    num_tokens, _, head_dim = heads.shape
    rotated_heads = num_heads + num_kv_heads
    if rotated_heads > heads.shape[1] or cos.shape != sin.shape or 2 * cos.shape[1] != head_dim:
        raise ValueError(
            f"heads {tuple(heads.shape)}, cos {tuple(cos.shape)} and sin {tuple(sin.shape)} do not"
            f" fit {num_heads} + {num_kv_heads} rotated heads"
        )
    if not cos.dtype == sin.dtype == torch.float32:
        raise ValueError(f"cos and sin must be float32, got {cos.dtype} and {sin.dtype}")
    if not (cos.is_contiguous() and sin.is_contiguous() and heads.stride(2) == 1):
        raise ValueError("cos, sin and the head dimension must be contiguous")
    _check_vector("positions", positions, num_tokens, torch.int64)
    if norm is not None:
        _check_vector("q_weight", norm.q_weight, head_dim, heads.dtype)
        _check_vector("k_weight", norm.k_weight, head_dim, heads.dtype)
    if num_tokens == 0:
        return
    half = head_dim // 2
    block_half = triton.next_power_of_2(half)
    block_heads = min(
        max(_ELEMENTS_PER_PROGRAM // (2 * block_half), 1), triton.next_power_of_2(rotated_heads)
    )
    blocks = triton.cdiv(rotated_heads, block_heads)
    _rotate_heads_kernel[(num_tokens * blocks,)](
        heads,
        cos,
        sin,
        positions,
        None if norm is None else norm.q_weight,
        None if norm is None else norm.k_weight,
        0.0 if norm is None else norm.eps,
        heads.stride(0),
        heads.stride(1),
        Q_HEADS=num_heads,
        ROTATED_HEADS=rotated_heads,
        HALF=half,
        HAS_NORM=norm is not None,
        BLOCKS=blocks,
        BLOCK_HEADS=block_heads,
        BLOCK_HALF=block_half,
        num_warps=_NUM_WARPS,
        # Torch rounds both products before it adds them; a fused multiply-add would not.
        enable_fp_fusion=False,
    )


def _check_vector(name: str, vector: torch.Tensor, size: int, dtype: torch.dtype) -> None:
    if vector.shape != (size,) or vector.dtype != dtype or not vector.is_contiguous():
        raise ValueError(
            f"{name} must be contiguous {dtype} [{size}], got {vector.dtype} {tuple(vector.shape)}"
        )
