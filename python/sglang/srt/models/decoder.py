"""Decoder: the forward pass that Llama, Mistral, Qwen2 and Qwen3 share, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch.nn.functional import embedding

from sgl_kernel.elementwise_ref import HeadNorm
from sglang.srt.layers.norm import add_rms_norm, rms_norm
from sglang.srt.layers.rope import build_rotation, rotate_and_store
from sglang.srt.model_config import ModelConfig
from sglang.srt.models.base import HiddenState, LayerContext, LayerLinears
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
        context: LayerContext,
        first: int,
        last: int,
    ) -> HiddenState:
        """Runs layers first..last-1. Positions are below config.context_length."""
        for index in range(first, last):
            state = self._layer(index, self._weights.layers[index], state, context)
        return state

    def logits(
        self, state: HiddenState, tokens: torch.Tensor | None, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """See CausalLM.logits."""
        weight, eps = self._weights.final_norm, self.config.rms_norm_eps
        hidden, residual = state
        if tokens is not None:
            hidden = hidden.index_select(0, tokens)
            residual = None if residual is None else residual.index_select(0, tokens)
        if residual is None:
            normed = rms_norm(hidden, weight, eps)
        else:
            normed, _ = add_rms_norm(hidden, residual, weight, eps)
        return torch.matmul(normed, self._weights.lm_head.t(), out=out)

    def layer_linears(self) -> LayerLinears:
        """See CausalLM.layer_linears."""
        layer = self._weights.layers[0]
        return LayerLinears(
            (layer.qkv, layer.output, layer.gate_up, layer.down), gate_ups=(layer.gate_up,)
        )

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
        context: LayerContext,
    ) -> HiddenState:
        eps = self.config.rms_norm_eps
        if state.residual is None:
            residual = state.hidden
            hidden = rms_norm(residual, weights.input_norm, eps)
        else:
            hidden, residual = add_rms_norm(state.hidden, state.residual, weights.input_norm, eps)
        hidden = self._attention(index, weights, hidden, context)
        hidden, residual = add_rms_norm(hidden, residual, weights.post_attention_norm, eps)
        activated = context.matmul.gate_up_silu(hidden, weights.gate_up)
        hidden = context.matmul(activated, weights.down)
        return HiddenState(hidden, residual)

    def _attention(
        self, index: int, weights: LayerWeights, hidden: torch.Tensor, context: LayerContext
    ) -> torch.Tensor:
        config, batch = self.config, context.batch
        num_tokens = hidden.shape[0]
        norm = None
        if weights.q_norm is not None and weights.k_norm is not None:
            norm = HeadNorm(weights.q_norm, weights.k_norm, config.rms_norm_eps)
        # [tokens, q heads | k heads | v heads, head_dim], ours alone: k is rotated where it lies.
        heads = context.matmul(hidden, weights.qkv).view(num_tokens, -1, config.head_dim)
        keys, values = context.kv_pool.layer(index)
        q = rotate_and_store(
            heads,
            self._rotation,
            batch.positions,
            keys,
            values,
            batch.token_slots,
            num_heads=config.num_heads,
            norm=norm,
        )
        k, v = heads[:, config.num_heads :].split(config.num_kv_heads, dim=1)
        attended = context.attention.attend(index, q, k, v, batch)
        return context.matmul(attended.view(num_tokens, -1), weights.output)
