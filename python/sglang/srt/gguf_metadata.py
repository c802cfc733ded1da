"""Reads a GGUF file's metadata into the words of a Hugging Face config."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sglang.srt.errors import ConfigError
from sglang.srt.gguf_file import GgufFile

# GGUF architecture -> (model_type, architecture). llama.cpp writes Mistral files as "llama".
_ARCHITECTURES = {
    "llama": ("llama", "LlamaForCausalLM"),
    "qwen2": ("qwen2", "Qwen2ForCausalLM"),
    "qwen3": ("qwen3", "Qwen3ForCausalLM"),
}
ROPE_FACTORS = "rope_freqs.weight"
_END_TOKEN_KEYS = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id")


@dataclass(frozen=True, slots=True)
class GgufMetadata:
    """config: keyword arguments of the equivalent transformers config, "model_type" included.

    eos_token_ids: tokens that end a sequence or a turn. rope_freq_factors: divisors of the rope
    frequencies, [head_dim / 2], as Llama 3 files carry them; None if the file has none.
    """

    config: dict[str, Any]
    eos_token_ids: frozenset[int]
    rope_freq_factors: tuple[float, ...] | None


def read_gguf_metadata(path: Path) -> GgufMetadata:
    """Raises ConfigError if the file is broken or its architecture is not supported."""
    file = GgufFile(path)
    gguf_architecture = file.require("general.architecture")
    if gguf_architecture not in _ARCHITECTURES:
        raise ConfigError(
            f"{path} has the GGUF architecture {gguf_architecture!r}; "
            f"supported are {', '.join(_ARCHITECTURES)}"
        )
    if int(file.metadata.get("split.count", 1)) > 1:
        raise ConfigError(
            f"{path} is one part of a split GGUF; join the parts with gguf-split first"
        )
    end_tokens = {int(file.metadata[key]) for key in _END_TOKEN_KEYS if key in file.metadata}
    factors = None
    if ROPE_FACTORS in file.tensors:
        factors = tuple(file.read(file.tensors[ROPE_FACTORS]).tolist())
    return GgufMetadata(_config(file, gguf_architecture), frozenset(end_tokens), factors)


def _config(file: GgufFile, gguf_architecture: str) -> dict[str, Any]:
    model_type, architecture = _ARCHITECTURES[gguf_architecture]

    def key(suffix: str) -> str:
        return f"{gguf_architecture}.{suffix}"

    if "token_embd.weight" not in file.tensors:
        raise ConfigError(f"{file.path} has no tensor token_embd.weight")
    hidden_size = int(file.require(key("embedding_length")))
    num_heads = int(file.require(key("attention.head_count")))
    head_dim = int(file.metadata.get(key("attention.key_length"), hidden_size // num_heads))
    rotary_dim = int(file.metadata.get(key("rope.dimension_count"), head_dim))
    if rotary_dim != head_dim:
        raise ConfigError(
            f"{file.path} rotates {rotary_dim} of {head_dim} dimensions of a head; "
            f"partial rotary embeddings are not supported"
        )
    sliding_window = file.metadata.get(key("attention.sliding_window"))
    if sliding_window:
        raise ConfigError(f"{file.path} uses a sliding window, which is not supported for GGUF")
    return {
        "model_type": model_type,
        "architectures": [architecture],
        "hidden_size": hidden_size,
        "num_hidden_layers": int(file.require(key("block_count"))),
        "num_attention_heads": num_heads,
        "num_key_value_heads": int(file.metadata.get(key("attention.head_count_kv"), num_heads)),
        "head_dim": head_dim,
        "intermediate_size": int(file.require(key("feed_forward_length"))),
        "vocab_size": file.tensors["token_embd.weight"].shape[0],
        "max_position_embeddings": int(file.require(key("context_length"))),
        "rms_norm_eps": float(file.require(key("attention.layer_norm_rms_epsilon"))),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in file.tensors,
        "bos_token_id": file.metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": file.metadata.get("tokenizer.ggml.eos_token_id"),
        "rope_parameters": _rope_parameters(file, key),
    }


def _rope_parameters(file: GgufFile, key: Callable[[str], str]) -> dict[str, Any]:
    parameters: dict[str, Any] = {
        "rope_type": "default",
        "rope_theta": float(file.metadata.get(key("rope.freq_base"), 10_000.0)),
    }
    linear_factor = file.metadata.get(key("rope.scale_linear"))  # older files
    scaling = file.metadata.get(key("rope.scaling.type"), "linear" if linear_factor else "none")
    if scaling == "none":
        return parameters
    parameters["rope_type"] = scaling
    parameters["factor"] = float(
        file.metadata.get(key("rope.scaling.factor"), linear_factor or 1.0)
    )
    original_length = file.metadata.get(key("rope.scaling.original_context_length"))
    if original_length is not None:
        parameters["original_max_position_embeddings"] = int(original_length)
    return parameters
