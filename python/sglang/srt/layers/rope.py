"""Rotary position embeddings, the two halves of a head rotated against each other."""

from __future__ import annotations

from typing import NamedTuple

import torch

from sglang.srt.model_config import ModelConfig


class Rotation(NamedTuple):
    """Cosine and sine per position, each [positions, head_dim / 2] f32."""

    cos: torch.Tensor
    sin: torch.Tensor

    def at(self, positions: torch.Tensor) -> Rotation:
        """Picks the rows of `positions` [tokens] i64."""
        return Rotation(self.cos.index_select(0, positions), self.sin.index_select(0, positions))


def build_rotation(config: ModelConfig, device: torch.device) -> Rotation:
    """The read-only table of all positions below config.context_length."""
    inv_freq, attention_factor = _inverse_frequencies(config)
    positions = torch.arange(config.context_length, dtype=torch.float32)
    angles = torch.outer(positions, inv_freq.float())
    cos = (angles.cos() * attention_factor).to(device)
    sin = (angles.sin() * attention_factor).to(device)
    return Rotation(cos, sin)


def rotate(heads: torch.Tensor, rotation: Rotation) -> torch.Tensor:
    """heads [tokens, heads, head_dim], rotation one row a token -> like heads; float32 inside."""
    cos, sin = rotation.cos.unsqueeze(1), rotation.sin.unsqueeze(1)
    first, second = heads.chunk(2, dim=-1)
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return rotated.to(heads.dtype)


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
