"""Decoder: the forward pass that Llama, Mistral, Qwen2 and Qwen3 share, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch.nn.functional import embedding, linear

from sglang.srt.layers.activation import silu_and_mul
from sglang.srt.layers.norm import add_rms_norm, rms_norm
from sglang.srt.layers.rope import Rotation, build_rotation, rotate
from sglang.srt.model_config import ModelConfig
from sglang.srt.models.base import Attend, HiddenState
from sglang.srt.models.decoder_weights import (
    LayerWeights,
    allocate_weights,
    copy_weights,
    named_parameters,
)


class Decoder:
    """A CausalLM (see base.py). What varies between architectures is in the config.

    Parameters are only read after loading and every call allocates what it needs, so two lanes may
    run the model at the same time.
    """

    def __init__(self, config: ModelConfig, device: torch.device | str) -> None:
        self.config = config
        self.device = torch.device(device)
        self._weights = allocate_weights(config, self.device)
        self._rotation = build_rotation(config, self.device)

    def embed(self, input_ids: torch.Tensor) -> HiddenState:
        """input_ids [tokens] i64."""
        return HiddenState(embedding(input_ids, self._weights.embedding), None)

    def run_layers(
        self,
        state: HiddenState,
        positions: torch.Tensor,
        attend: Attend,
        first: int,
        last: int,
    ) -> HiddenState:
        """Runs layers first..last-1. positions [tokens] i64, below config.context_length."""
        rotation = self._rotation.at(positions)
        for index in range(first, last):
            state = self._layer(index, self._weights.layers[index], state, rotation, attend)
        return state

    def logits(self, state: HiddenState, tokens: torch.Tensor) -> torch.Tensor:
        """Final norm and LM head at the given token indices [n] i64 -> [n, vocab_size] f32."""
        hidden = state.hidden.index_select(0, tokens)
        if state.residual is not None:
            hidden = hidden + state.residual.index_select(0, tokens)
        normed = rms_norm(hidden, self._weights.final_norm, self.config.rms_norm_eps)
        return linear(normed, self._weights.lm_head).float()

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Takes (Hugging Face parameter name, tensor) pairs, one at a time, any order.

        Raises ConfigError naming parameters that are missing or do not fit.
        """
        copy_weights(self.named_parameters(), weights)

    def named_parameters(self) -> dict[str, torch.Tensor]:
        """Hugging Face parameter name -> view of the parameter; writing to it changes the model."""
        return named_parameters(self._weights, self.config)

    def _layer(
        self,
        index: int,
        weights: LayerWeights,
        state: HiddenState,
        rotation: Rotation,
        attend: Attend,
    ) -> HiddenState:
        eps = self.config.rms_norm_eps
        if state.residual is None:
            residual = state.hidden
            hidden = rms_norm(residual, weights.input_norm, eps)
        else:
            hidden, residual = add_rms_norm(state.hidden, state.residual, weights.input_norm, eps)
        hidden = self._attention(index, weights, hidden, rotation, attend)
        hidden, residual = add_rms_norm(hidden, residual, weights.post_attention_norm, eps)
        hidden = weights.down(silu_and_mul(weights.gate_up(hidden)))
        return HiddenState(hidden, residual)

    def _attention(
        self,
        index: int,
        weights: LayerWeights,
        hidden: torch.Tensor,
        rotation: Rotation,
        attend: Attend,
    ) -> torch.Tensor:
        config = self.config
        num_tokens = hidden.shape[0]
        # [tokens, q heads | k heads | v heads, head_dim]: q and k, side by side, rotate as one.
        heads = weights.qkv(hidden).view(num_tokens, -1, config.head_dim)
        num_rotated = config.num_heads + config.num_kv_heads
        qk, v = heads[:, :num_rotated], heads[:, num_rotated:]
        if weights.q_norm is not None and weights.k_norm is not None:
            q, k = qk.split((config.num_heads, config.num_kv_heads), dim=1)
            q = rms_norm(q, weights.q_norm, config.rms_norm_eps)
            k = rms_norm(k, weights.k_norm, config.rms_norm_eps)
            qk = torch.cat((q, k), dim=1)
        q, k = rotate(qk, rotation).split((config.num_heads, config.num_kv_heads), dim=1)
        attended = attend(index, q, k, v)
        return weights.output(attended.reshape(num_tokens, -1))
