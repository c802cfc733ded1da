"""Rotary position embeddings, the two halves of a head rotated against each other."""

from __future__ import annotations

from typing import NamedTuple

import torch

from sgl_kernel.elementwise_ref import HeadNorm, rotate_and_store_ref
from sglang.srt.layers.fused import use_kernels
from sglang.srt.model_config import ModelConfig


class Rotation(NamedTuple):
    """Cosine and sine per position, each [positions, head_dim / 2] f32."""

    cos: torch.Tensor
    sin: torch.Tensor


def build_rotation(config: ModelConfig, device: torch.device) -> Rotation:
    """The read-only table of all positions below config.context_length."""
    inv_freq, attention_factor = _inverse_frequencies(config)
    positions = torch.arange(config.context_length, dtype=torch.float32)
    angles = torch.outer(positions, inv_freq.float())
    cos = (angles.cos() * attention_factor).to(device)
    sin = (angles.sin() * attention_factor).to(device)
    return Rotation(cos, sin)


def rotate_and_store(
    heads: torch.Tensor,
    rotation: Rotation,
    positions: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    slots: torch.Tensor,
    *,
    num_heads: int,
    norm: HeadNorm | None,
) -> torch.Tensor:
    """Norms, if norm is given, and rotates q and k of a fused projection; float32 inside.

    heads [tokens, q heads | k heads | v heads, head_dim], whose k is rotated in place. keys, values
    [slots, kv heads, head_dim] get k and v at slots. positions, slots [tokens] i64.
    Returns q [tokens, q heads, head_dim], contiguous.
    """
    if use_kernels(heads):
        from sgl_kernel import rotate_and_store as kernels

        run = kernels.rotate_and_store
    else:
        run = rotate_and_store_ref
    return run(
        heads,
        rotation.cos,
        rotation.sin,
        positions,
        keys,
        values,
        slots,
        num_heads=num_heads,
        norm=norm,
    )


def _inverse_frequencies(config: ModelConfig) -> tuple[torch.Tensor, float]:
    """([head_dim / 2] radians per position, factor of cosine and sine)."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = config.hf_config.rope_parameters
    rope_type = rope["rope_type"]
    if rope_type == "default":
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
        inv_freq, attention_factor = 1.0 / rope["rope_theta"] ** exponents, 1.0
    else:
        inv_freq, attention_factor = ROPE_INIT_FUNCTIONS[rope_type](config.hf_config, None)
    if config.rope_freq_factors is not None:
        inv_freq = inv_freq / torch.tensor(config.rope_freq_factors)
    return inv_freq, attention_factor
