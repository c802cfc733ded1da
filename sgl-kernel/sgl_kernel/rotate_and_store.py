# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc"
"""From a fused projection to attention's input: norm, rotary embedding and KV store in one launch.

    heads of a token   [ q 0 | q 1 | ... | k 0 | k 1 | ... | v 0 | v 1 | ... ]
                         norm, rotate      norm, rotate      |
                              |                 |            |
                              v                 v            v
                         q, contiguous    k cache, heads   v cache

Reference: rotate_and_store_ref in elementwise_ref.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sgl_kernel.elementwise_ref import HeadNorm
from sgl_kernel.launch import Launcher

_ELEMENTS_PER_PROGRAM = 1024
_NUM_WARPS = 2


# A batch's integers are parts of one upload: their alignment must not choose between compilations.
@triton.jit(do_not_specialize_on_alignment=["positions", "slots"])
def _rotate_and_store_kernel(
    heads,
    q,
    k_cache,
    v_cache,
    slots,
    positions,
    cos,
    sin,
    q_weight,
    k_weight,
    eps,
    token_stride,
    head_stride,
    slot_stride,
    cache_head_stride,
    Q_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
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
    inside = (head < Q_HEADS + 2 * KV_HEADS) & (dim < HALF)
    source = heads + token * token_stride + head * head_stride + dim
    first = tl.load(source, mask=inside, other=0.0)
    second = tl.load(source + HALF, mask=inside, other=0.0)
    dtype: tl.constexpr = first.dtype
    wide_first = first.to(tl.float32)
    wide_second = second.to(tl.float32)
    is_q = inside & (head < Q_HEADS)
    is_k = inside & (head >= Q_HEADS) & (head < Q_HEADS + KV_HEADS)
    is_v = inside & (head >= Q_HEADS + KV_HEADS)

    if HAS_NORM:
        weight_first = _weight_of_head(q_weight, k_weight, dim, is_q, is_k)
        weight_second = _weight_of_head(q_weight + HALF, k_weight + HALF, dim, is_q, is_k)
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
    rotated_first = (wide_first * cosine - wide_second * sine).to(dtype)
    rotated_second = (wide_second * cosine + wide_first * sine).to(dtype)

    q_target = q + (token * Q_HEADS + head) * (2 * HALF) + dim
    tl.store(q_target, rotated_first, mask=is_q)
    tl.store(q_target + HALF, rotated_second, mask=is_q)
    tl.store(source, rotated_first, mask=is_k)
    tl.store(source + HALF, rotated_second, mask=is_k)
    slot = tl.load(slots + token).to(tl.int64) * slot_stride + dim
    k_target = k_cache + slot + (head - Q_HEADS) * cache_head_stride
    tl.store(k_target, rotated_first, mask=is_k)
    tl.store(k_target + HALF, rotated_second, mask=is_k)
    v_target = v_cache + slot + (head - Q_HEADS - KV_HEADS) * cache_head_stride
    tl.store(v_target, first, mask=is_v)
    tl.store(v_target + HALF, second, mask=is_v)


@triton.jit
def _weight_of_head(q_weight, k_weight, dim, is_q, is_k):
    """Half of each head's norm weight, [heads, dims] f32."""
    of_q = tl.load(q_weight + dim, mask=is_q, other=0.0)
    of_k = tl.load(k_weight + dim, mask=is_k, other=0.0)
    return tl.where(is_q, of_q, of_k).to(tl.float32)


_rotate_and_store = Launcher(_rotate_and_store_kernel)


def rotate_and_store(
    heads: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
    *,
    num_heads: int,
    norm: HeadNorm | None,
) -> torch.Tensor:
    """Rotated queries [tokens, num_heads, head_dim], contiguous; keys and values go to the caches.

    heads [tokens, num_heads q | kv_heads k | kv_heads v, head_dim] f32, bf16 or f16, of any token
    and head stride; its keys are rotated in place too. cos, sin [positions, head_dim / 2] f32,
    contiguous. positions, slots [tokens] i64, within the tables and the caches; a slot that occurs
    twice ends with one of its tokens, which one is not said. k_cache, v_cache
    [slots, kv_heads, head_dim] of heads' dtype and one set of strides. norm's weights are of heads'
    dtype; queries and keys are normed before they are rotated.

    Without a norm the result has the bits of rotate_and_store_ref's; with one it may be off by a
    step of the dtype, see rms_norm. Raises ValueError if shapes, dtypes or strides do not fit.
    """
    num_tokens, all_heads, head_dim = heads.shape
    num_kv_heads = k_cache.shape[1]
    token_stride, head_stride, element_stride = heads.stride()
    cache_strides = k_cache.stride()
    if all_heads != num_heads + 2 * num_kv_heads or k_cache.shape[2] != head_dim:
        raise ValueError(
            f"heads {tuple(heads.shape)} and cache {tuple(k_cache.shape)} do not fit {num_heads}"
            " query heads"
        )
    if v_cache.shape != k_cache.shape or v_cache.stride() != cache_strides:
        raise ValueError("k_cache and v_cache must have one shape and one set of strides")
    if not heads.dtype == k_cache.dtype == v_cache.dtype:
        raise ValueError(f"heads are {heads.dtype}, cache {k_cache.dtype}/{v_cache.dtype}")
    if cos.shape != sin.shape or 2 * cos.shape[1] != head_dim:
        raise ValueError(
            f"cos {tuple(cos.shape)} and sin {tuple(sin.shape)} do not fit heads of {head_dim}"
        )
    if not cos.dtype == sin.dtype == torch.float32:
        raise ValueError(f"cos and sin must be float32, got {cos.dtype} and {sin.dtype}")
    if not (cos.is_contiguous() and sin.is_contiguous()):
        raise ValueError("cos and sin must be contiguous")
    if not element_stride == cache_strides[2] == 1:
        raise ValueError("the head dimension must be contiguous in heads and caches")
    _check_vector("positions", positions, num_tokens, torch.int64)
    _check_vector("slots", slots, num_tokens, torch.int64)
    if norm is not None:
        _check_vector("q_weight", norm.q_weight, head_dim, heads.dtype)
        _check_vector("k_weight", norm.k_weight, head_dim, heads.dtype)
    q = torch.empty((num_tokens, num_heads, head_dim), dtype=heads.dtype, device=heads.device)
    if num_tokens == 0:
        return q
    half = head_dim // 2
    block_half = triton.next_power_of_2(half)
    block_heads = min(
        max(_ELEMENTS_PER_PROGRAM // (2 * block_half), 1), triton.next_power_of_2(all_heads)
    )
    blocks = -(-all_heads // block_heads)
    _rotate_and_store(
        (num_tokens * blocks, 1, 1),
        (
            heads,
            q,
            k_cache,
            v_cache,
            slots,
            positions,
            cos,
            sin,
            None if norm is None else norm.q_weight,
            None if norm is None else norm.k_weight,
        ),
        (),
        (
            0.0 if norm is None else norm.eps,
            token_stride,
            head_stride,
            *cache_strides[:2],
        ),
        (
            num_heads,
            num_kv_heads,
            half,
            norm is not None,
            blocks,
            block_heads,
            block_half,
        ),
        num_warps=_NUM_WARPS,
        # Torch rounds both products before it adds them; a fused multiply-add would not.
        enable_fp_fusion=False,
    )
    return q


def _check_vector(name: str, vector: torch.Tensor, size: int, dtype: torch.dtype) -> None:
    if vector.shape != (size,) or vector.dtype != dtype or not vector.is_contiguous():
        raise ValueError(
            f"{name} must be contiguous {dtype} [{size}], got {vector.dtype} {tuple(vector.shape)}"
        )
