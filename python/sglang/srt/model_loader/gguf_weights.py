"""Weights of a GGUF file, dequantised and renamed to Hugging Face names."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from sglang.srt.gguf_file import GgufFile
from sglang.srt.gguf_metadata import ROPE_FACTORS
from sglang.srt.model_config import ModelConfig

_MODEL_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_LAYER_TENSOR = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")


def iterate_gguf(path: Path, config: ModelConfig) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields (Hugging Face name, float32 CPU tensor) one at a time.

    Raises ConfigError for a quantisation that cannot be decoded.
    """
    file = GgufFile(path)
    heads_by_name = _interleaved_heads(config)
    for tensor in file.tensors.values():
        if tensor.name == ROPE_FACTORS:  # read with the config
            continue
        values = file.read(tensor)
        name = hf_name(tensor.name)
        for suffix, num_heads in heads_by_name.items():
            if f".{suffix}." in name:
                values = _deinterleave(values, num_heads)
        yield name, torch.from_numpy(np.ascontiguousarray(values))


def hf_name(gguf_name: str) -> str:
    """The Hugging Face parameter name, or `gguf_name` itself if there is none."""
    match = _LAYER_TENSOR.fullmatch(gguf_name)
    if match and match[2] in _LAYER_NAMES:
        return f"model.layers.{match[1]}.{_LAYER_NAMES[match[2]]}.{match[3]}"
    stem, _, kind = gguf_name.rpartition(".")
    return f"{_MODEL_NAMES[stem]}.{kind}" if stem in _MODEL_NAMES else gguf_name


def _interleaved_heads(config: ModelConfig) -> dict[str, int]:
    """Projections whose rows llama.cpp reorders, with their head counts.

    For the llama architecture it rotates neighbouring dimensions instead of the halves of a head.
    """
    if config.architecture not in ("LlamaForCausalLM", "MistralForCausalLM"):
        return {}
    return {"q_proj": config.num_heads, "k_proj": config.num_kv_heads}


def _deinterleave(values: npt.NDArray[np.float32], num_heads: int) -> npt.NDArray[np.float32]:
    """Rows 0, 2, 4 ... of each head first, then 1, 3, 5 ...; values [heads * head_dim, ...]."""
    pairs = values.reshape(num_heads, -1, 2, *values.shape[1:])
    return pairs.swapaxes(1, 2).reshape(values.shape)
