"""The element-wise part of a decoder layer in plain torch.

What rms_norm, rotate_and_store and silu_and_mul compute, rounding steps included. Unlike the other
references these also serve models, where there is no GPU; so they live apart from the kernels and
need no Triton.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn import functional


class HeadNorm(NamedTuple):
    """RMS norm of every query and key head before it is rotated.

    q_weight, k_weight [head_dim], of the model's dtype.
    """

    q_weight: torch.Tensor
    k_weight: torch.Tensor
    eps: float


def rms_norm_ref(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Normalises the last dimension. x [..., width], weight [width] -> like x.

    float32 inside, rounded to x's dtype before the weight is applied in that dtype.
    """
    return functional.rms_norm(x.float(), weight.shape, eps=eps).to(x.dtype) * weight


def add_rms_norm_ref(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(rms_norm(x + residual), x + residual); the sum is rounded before it is normalised."""
    total = x + residual
    return rms_norm_ref(total, weight, eps), total


def rotate_and_store_ref(
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
    """Rotated queries, contiguous; see rotate_and_store. The caches may be of another dtype."""
    num_kv_heads = k_cache.shape[1]
    qk, v = heads.split((num_heads + num_kv_heads, num_kv_heads), dim=1)
    normed = qk
    if norm is not None:
        q, k = qk.split((num_heads, num_kv_heads), dim=1)
        q = rms_norm_ref(q, norm.q_weight, norm.eps)
        normed = torch.cat((q, rms_norm_ref(k, norm.k_weight, norm.eps)), dim=1)
    cosine = cos.index_select(0, positions).unsqueeze(1)
    sine = sin.index_select(0, positions).unsqueeze(1)
    first, second = normed.chunk(2, dim=-1)
    # The products are float32 whatever the heads are, and new: the sums may reuse their memory.
    rotated_first = (first * cosine).sub_(second * sine)
    rotated_second = (second * cosine).add_(first * sine)
    rotated = torch.cat((rotated_first, rotated_second), dim=-1).to(heads.dtype)
    k = rotated[:, num_heads:]
    heads[:, num_heads : num_heads + num_kv_heads] = k
    k_cache.index_copy_(0, slots, k.to(k_cache.dtype))
    v_cache.index_copy_(0, slots, v.to(v_cache.dtype))
    return rotated[:, :num_heads].contiguous()


def silu_and_mul_ref(gate_up: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """gate_up [tokens, 2 * width], gate first -> silu(gate) * up, [tokens, width], in `out` if
    given."""
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.mul(functional.silu(gate), up, out=out)
