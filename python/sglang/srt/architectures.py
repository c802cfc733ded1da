"""The decoder-only architectures that the shared decoder serves, and how they differ."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from sglang.srt.errors import ConfigError


class DecoderTraits(NamedTuple):
    """Which optional parameters a decoder layer has."""

    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False


def _llama(hf_config: Any) -> DecoderTraits:
    bias = bool(getattr(hf_config, "attention_bias", False))
    mlp_bias = bool(getattr(hf_config, "mlp_bias", False))
    return DecoderTraits(qkv_bias=bias, output_bias=bias, mlp_bias=mlp_bias)


def _mistral(hf_config: Any) -> DecoderTraits:
    return DecoderTraits()


def _qwen2(hf_config: Any) -> DecoderTraits:
    return DecoderTraits(qkv_bias=True)


def _qwen3(hf_config: Any) -> DecoderTraits:
    bias = bool(getattr(hf_config, "attention_bias", False))
    return DecoderTraits(qkv_bias=bias, output_bias=bias, qk_norm=True)


_TRAITS: dict[str, Callable[[Any], DecoderTraits]] = {
    "LlamaForCausalLM": _llama,
    "MistralForCausalLM": _mistral,
    "Qwen2ForCausalLM": _qwen2,
    "Qwen3ForCausalLM": _qwen3,
}

SUPPORTED_ARCHITECTURES = tuple(_TRAITS)


def decoder_traits(architecture: str, hf_config: Any) -> DecoderTraits:
    """Raises ConfigError listing what is supported if `architecture` is not."""
    check_supported(architecture)
    return _TRAITS[architecture](hf_config)


def check_supported(architecture: str) -> None:
    """Raises ConfigError listing what is supported if `architecture` is not."""
    if architecture not in _TRAITS:
        raise ConfigError(
            f"The architecture {architecture} is not supported; "
            f"supported are {', '.join(SUPPORTED_ARCHITECTURES)}"
        )
