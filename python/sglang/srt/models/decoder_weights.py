"""The parameters of a decoder: allocated fused, addressed by their Hugging Face names."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch

from sglang.srt.errors import ConfigError
from sglang.srt.layers.linear import Linear, empty_linear
from sglang.srt.model_config import ModelConfig

_MAX_LISTED = 8


class LayerWeights(NamedTuple):
    """One decoder layer.

    qkv stacks the rows of the q, k and v projections, gate_up those of gate and up.
    The q and k norms, [head_dim], exist only if config.qk_norm.
    """

    input_norm: torch.Tensor
    qkv: Linear
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    output: Linear
    post_attention_norm: torch.Tensor
    gate_up: Linear
    down: Linear


class DecoderWeights(NamedTuple):
    """embedding and lm_head [vocab_size, hidden_size], one tensor if tied; final_norm [hidden]."""

    embedding: torch.Tensor
    layers: list[LayerWeights]
    final_norm: torch.Tensor
    lm_head: torch.Tensor


def allocate_weights(config: ModelConfig, device: torch.device) -> DecoderWeights:
    """Uninitialised parameters in config.dtype."""

    def vector(size: int) -> torch.Tensor:
        return torch.empty(size, dtype=config.dtype, device=device)

    def matrix(rows: int) -> torch.Tensor:
        return torch.empty((rows, config.hidden_size), dtype=config.dtype, device=device)

    embedding = matrix(config.vocab_size)
    return DecoderWeights(
        embedding=embedding,
        layers=[_allocate_layer(config, device) for _ in range(config.num_layers)],
        final_norm=vector(config.hidden_size),
        lm_head=embedding if config.tie_word_embeddings else matrix(config.vocab_size),
    )


def _allocate_layer(config: ModelConfig, device: torch.device) -> LayerWeights:
    def linear(out_features: int, in_features: int, bias: bool) -> Linear:
        return empty_linear(out_features, in_features, bias=bias, dtype=config.dtype, device=device)

    def vector(size: int) -> torch.Tensor:
        return torch.empty(size, dtype=config.dtype, device=device)

    hidden, width = config.hidden_size, config.intermediate_size
    q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    return LayerWeights(
        input_norm=vector(hidden),
        qkv=linear(q_size + 2 * kv_size, hidden, config.attention_bias),
        q_norm=vector(config.head_dim) if config.qk_norm else None,
        k_norm=vector(config.head_dim) if config.qk_norm else None,
        output=linear(hidden, q_size, config.attention_output_bias),
        post_attention_norm=vector(hidden),
        gate_up=linear(2 * width, hidden, config.mlp_bias),
        down=linear(hidden, width, config.mlp_bias),
    )


def named_parameters(weights: DecoderWeights, config: ModelConfig) -> dict[str, torch.Tensor]:
    """Hugging Face parameter name -> the view of the fused tensor where it belongs."""
    named = {
        "model.embed_tokens.weight": weights.embedding,
        "model.norm.weight": weights.final_norm,
    }
    if not config.tie_word_embeddings:
        named["lm_head.weight"] = weights.lm_head
    for index, layer in enumerate(weights.layers):
        prefix = f"model.layers.{index}."
        named.update((prefix + name, view) for name, view in _layer_parameters(layer, config))
    return named


def _layer_parameters(
    layer: LayerWeights, config: ModelConfig
) -> Iterator[tuple[str, torch.Tensor]]:
    yield "input_layernorm.weight", layer.input_norm
    yield "post_attention_layernorm.weight", layer.post_attention_norm
    if layer.q_norm is not None and layer.k_norm is not None:
        yield "self_attn.q_norm.weight", layer.q_norm
        yield "self_attn.k_norm.weight", layer.k_norm
    q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    width = config.intermediate_size
    yield from _split(
        "self_attn.", layer.qkv, {"q_proj": q_size, "k_proj": kv_size, "v_proj": kv_size}
    )
    yield from _split("self_attn.", layer.output, {"o_proj": config.hidden_size})
    yield from _split("mlp.", layer.gate_up, {"gate_proj": width, "up_proj": width})
    yield from _split("mlp.", layer.down, {"down_proj": config.hidden_size})


def _split(prefix: str, fused: Linear, rows: dict[str, int]) -> Iterator[tuple[str, torch.Tensor]]:
    sizes = list(rows.values())
    for name, view in zip(rows, fused.weight.split(sizes), strict=True):
        yield f"{prefix}{name}.weight", view
    if fused.bias is not None:
        for name, view in zip(rows, fused.bias.split(sizes), strict=True):
            yield f"{prefix}{name}.bias", view


def copy_weights(
    targets: dict[str, torch.Tensor], weights: Iterable[tuple[str, torch.Tensor]]
) -> None:
    """Copies each tensor to the target of its name, converting dtype and device.

    Ignored: rotary frequencies, which old checkpoints store, and an LM head that repeats tied
    embeddings. Raises ConfigError naming what is missing, unexpected or of the wrong shape.
    """
    missing = set(targets)
    unexpected: list[str] = []
    misfits: list[str] = []
    for name, tensor in weights:
        target = targets.get(name)
        if target is None:
            if not name.endswith("rotary_emb.inv_freq") and name != "lm_head.weight":
                unexpected.append(name)
            continue
        missing.discard(name)
        if target.shape != tensor.shape:
            misfits.append(f"{name} {list(tensor.shape)} instead of {list(target.shape)}")
            continue
        target.copy_(tensor)
    problems = [
        f"{kind}: {_listed(names)}"
        for kind, names in (
            ("missing", sorted(missing)),
            ("unexpected", unexpected),
            ("wrong shape", misfits),
        )
        if names
    ]
    if problems:
        raise ConfigError("The weights do not fit the model's config; " + "; ".join(problems))


def _listed(names: list[str]) -> str:
    more = len(names) - _MAX_LISTED
    return ", ".join(names[:_MAX_LISTED]) + (f" and {more} more" if more > 0 else "")
