# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc"
"""Stores the keys and values of new tokens at their slots in the pool."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_BLOCK_TOKENS = 8


def store_kv_ref(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
) -> None:
    """What store_kv does, in plain torch."""
    k_cache[slots] = k
    v_cache[slots] = v


# A batch's integers are parts of one upload: their alignment must not choose between compilations.
@triton.jit(do_not_specialize=["num_tokens"], do_not_specialize_on_alignment=["slots"])
def _store_kv_kernel(
    k,
    v,
    k_cache,
    v_cache,
    slots,
    num_tokens,
    k_token_stride,
    k_head_stride,
    v_token_stride,
    v_head_stride,
    cache_slot_stride,
    cache_head_stride,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
):
    token = tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    head = tl.program_id(1)
    dim = tl.arange(0, BLOCK_DIM)
    in_batch = token < num_tokens
    inside = in_batch[:, None] & (dim < HEAD_DIM)[None, :]
    # Pools pass 2^31 elements, and so does a fused projection of a very long prompt.
    token = token.to(tl.int64)
    slot = tl.load(slots + token, mask=in_batch, other=0).to(tl.int64)
    target = slot[:, None] * cache_slot_stride + head * cache_head_stride + dim[None, :]
    k_source = token[:, None] * k_token_stride + head * k_head_stride + dim[None, :]
    v_source = token[:, None] * v_token_stride + head * v_head_stride + dim[None, :]
    tl.store(k_cache + target, tl.load(k + k_source, mask=inside), mask=inside)
    tl.store(v_cache + target, tl.load(v + v_source, mask=inside), mask=inside)


def store_kv(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
) -> None:
    """Writes k_cache[slots] = k and v_cache[slots] = v in one launch.

    k, v [tokens, kv_heads, head_dim]: views with any token and head stride, such as parts of a
    fused projection. k_cache, v_cache [slots, kv_heads, head_dim], of one set of strides. One dtype
    for all four. slots [tokens] i64, all within the cache; a slot that occurs twice ends with one
    of its tokens, which one is not said. Raises ValueError if shapes, dtypes or strides do not fit.
    """
    num_tokens, num_kv_heads, head_dim = k.shape
    if v.shape != k.shape or k_cache.shape != v_cache.shape or k_cache.shape[1:] != k.shape[1:]:
        raise ValueError(
            f"k {tuple(k.shape)}, v {tuple(v.shape)}, caches {tuple(k_cache.shape)} and"
            f" {tuple(v_cache.shape)} do not fit together"
        )
    if slots.shape != (num_tokens,) or slots.dtype != torch.int64 or not slots.is_contiguous():
        raise ValueError(f"slots must be contiguous i64 [{num_tokens}], got {tuple(slots.shape)}")
    if not k.dtype == v.dtype == k_cache.dtype == v_cache.dtype:
        raise ValueError(f"k is {k.dtype}, v {v.dtype}, cache {k_cache.dtype}/{v_cache.dtype}")
    if not k.stride(2) == v.stride(2) == k_cache.stride(2) == 1:
        raise ValueError("the head dimension must be contiguous in k, v and the cache")
    if k_cache.stride() != v_cache.stride():
        raise ValueError("k_cache and v_cache must have one set of strides")
    if num_tokens == 0:
        return
    _store_kv_kernel[(triton.cdiv(num_tokens, _BLOCK_TOKENS), num_kv_heads)](
        k,
        v,
        k_cache,
        v_cache,
        slots,
        num_tokens,
        k.stride(0),
        k.stride(1),
        v.stride(0),
        v.stride(1),
        k_cache.stride(0),
        k_cache.stride(1),
        HEAD_DIM=head_dim,
        BLOCK_DIM=triton.next_power_of_2(head_dim),
        BLOCK_TOKENS=_BLOCK_TOKENS,
    )
