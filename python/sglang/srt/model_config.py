"""ModelConfig: the numbers and switches of one model, the same for every weight format."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from sglang.srt.architectures import decoder_traits
from sglang.srt.errors import ConfigError
from sglang.srt.gguf_metadata import read_gguf_metadata
from sglang.srt.model_source import ModelSource, resolve_model_source

__all__ = ["ModelConfig", "ModelSource", "resolve_model_source"]

logger = logging.getLogger(__name__)

_DTYPES = {
    "half": torch.float16,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float": torch.float32,
    "float32": torch.float32,
}
_ROPE_TYPES = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """What models, KV pool and scheduler need to know about a model.

    context_length: longest sequence in tokens, prompt and answer together. eos_token_ids: ids that
    end a sequence, from generation_config.json, config.json or GGUF metadata.
    attention_bias: q, k and v projections have a bias; attention_output_bias: so has the output
    projection. qk_norm: every q and k head is RMS-normalised. sliding_window: window in tokens if
    any layer has one; context_length is never longer, so attention may ignore it.
    rope_freq_factors: divisors of the rope frequencies, [head_dim / 2], which GGUF files may carry.
    hf_config: the transformers config that the rest was read from.
    """

    architecture: str
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    rms_norm_eps: float
    context_length: int
    dtype: torch.dtype
    eos_token_ids: frozenset[int]
    tie_word_embeddings: bool
    attention_bias: bool
    attention_output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    sliding_window: int | None
    rope_freq_factors: tuple[float, ...] | None
    hf_config: Any = field(repr=False, compare=False)

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of keys and values of one token over all layers, stored in the model's dtype."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.dtype.itemsize

    @property
    def num_parameters(self) -> int:
        """Parameters of all matrices; norms and biases, below a thousandth, are left out."""
        attention = 2 * (self.num_heads + self.num_kv_heads) * self.head_dim * self.hidden_size
        mlp = 3 * self.intermediate_size * self.hidden_size
        embeddings = (1 if self.tie_word_embeddings else 2) * self.vocab_size * self.hidden_size
        return self.num_layers * (attention + mlp) + embeddings

    @classmethod
    def load(
        cls,
        source: ModelSource,
        *,
        dtype: str = "auto",
        device: str | torch.device = "cpu",
        context_length: int | None = None,
        override_args: dict[str, Any] | None = None,
        trust_remote_code: bool = False,
    ) -> ModelConfig:
        """Reads the config of `source`.

        dtype: "auto" on CPU is float32, which is exact and which every CPU computes well; a CPU
        with bfloat16 instructions is faster in bfloat16, if asked for. On other devices "auto" is
        the dtype that the config names, or bfloat16 where it names none (GGUF).
        override_args: top-level keys of config.json to replace.
        Raises ConfigError if the model is not supported or a setting does not fit it.
        """
        raw, eos_token_ids, rope_freq_factors = _read_raw_config(source)
        raw = _apply_overrides(raw, override_args or {})
        hf_config = _build_hf_config(source, raw, trust_remote_code)
        architecture = _architecture(source, hf_config)
        traits = decoder_traits(architecture, hf_config)
        _check_supported(source, hf_config)

        num_heads = int(hf_config.num_attention_heads)
        num_kv_heads = int(getattr(hf_config, "num_key_value_heads", None) or num_heads)
        if num_heads % num_kv_heads:
            raise ConfigError(
                f"{source.name}: {num_heads} attention heads cannot share {num_kv_heads} KV heads"
            )
        head_dim = getattr(hf_config, "head_dim", None) or hf_config.hidden_size // num_heads
        sliding_window = _active_sliding_window(hf_config)
        return cls(
            architecture=architecture,
            hidden_size=int(hf_config.hidden_size),
            num_layers=int(hf_config.num_hidden_layers),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=int(head_dim),
            intermediate_size=int(hf_config.intermediate_size),
            vocab_size=int(hf_config.vocab_size),
            rms_norm_eps=float(hf_config.rms_norm_eps),
            context_length=_context_length(source, hf_config, context_length, sliding_window),
            dtype=_dtype(dtype, torch.device(device), hf_config),
            eos_token_ids=eos_token_ids | _token_ids(getattr(hf_config, "eos_token_id", None)),
            tie_word_embeddings=bool(hf_config.tie_word_embeddings),
            attention_bias=traits.qkv_bias,
            attention_output_bias=traits.output_bias,
            mlp_bias=traits.mlp_bias,
            qk_norm=traits.qk_norm,
            sliding_window=sliding_window,
            rope_freq_factors=rope_freq_factors,
            hf_config=hf_config,
        )


def _read_raw_config(
    source: ModelSource,
) -> tuple[dict[str, Any], frozenset[int], tuple[float, ...] | None]:
    """(config keys, end-of-sequence ids from beside the config, rope factors)."""
    if source.gguf_file is not None:
        metadata = read_gguf_metadata(source.gguf_file)
        return metadata.config, metadata.eos_token_ids, metadata.rope_freq_factors
    raw = _read_json(source.folder / "config.json")
    generation_file = source.folder / "generation_config.json"
    generation = _read_json(generation_file) if generation_file.is_file() else {}
    return raw, _token_ids(generation.get("eos_token_id")), None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path} must hold a JSON object")
    return value


def _apply_overrides(raw: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    merged = {**raw, **overrides}
    scaling_keys = [key for key in ("rope_parameters", "rope_scaling") if key in overrides]
    if not scaling_keys and "rope_theta" not in overrides:
        return merged
    # Rope settings have an old spelling (rope_theta beside rope_scaling) and a new one (both in
    # rope_parameters). An override in one must replace the other, and a mere scaling keeps theta.
    rope = {"rope_theta": raw["rope_theta"]} if "rope_theta" in raw else {}
    rope.update(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
    if scaling_keys:
        scaling = overrides[scaling_keys[0]] or {}
        if not isinstance(scaling, dict):
            raise ConfigError(f"{scaling_keys[0]} must be a JSON object, got {scaling!r}")
        theta = {"rope_theta": rope["rope_theta"]} if "rope_theta" in rope else {}
        rope = {**theta, **scaling}
    if "rope_theta" in overrides:
        rope["rope_theta"] = overrides["rope_theta"]
    merged.pop("rope_scaling", None)
    merged["rope_parameters"] = rope
    return merged


def _build_hf_config(source: ModelSource, raw: dict[str, Any], trust_remote_code: bool) -> Any:
    from transformers import CONFIG_MAPPING, AutoConfig

    model_type = raw.get("model_type")
    try:
        if isinstance(model_type, str) and model_type in CONFIG_MAPPING:
            return CONFIG_MAPPING[model_type].from_dict(raw)
        if "auto_map" in raw and trust_remote_code:
            class_config = AutoConfig.from_pretrained(source.folder, trust_remote_code=True)
            return type(class_config).from_dict(raw)
    # transformers validates configs with exceptions of several kinds, all about the file's content.
    except Exception as error:
        raise ConfigError(f"{source.name}: config.json is not valid: {error}") from error
    if "auto_map" in raw:
        raise ConfigError(
            f"{source.name} brings its own config code (model_type {model_type!r}); "
            f"pass --trust-remote-code to run it"
        )
    raise ConfigError(f"{source.name}: model_type {model_type!r} in config.json is unknown")


def _architecture(source: ModelSource, hf_config: Any) -> str:
    architectures = getattr(hf_config, "architectures", None)
    if not architectures:
        raise ConfigError(f"{source.name}: config.json names no architecture under `architectures`")
    return str(architectures[0])


def _check_supported(source: ModelSource, hf_config: Any) -> None:
    quantization = getattr(hf_config, "quantization_config", None)
    if quantization:
        method = (
            quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        )
        raise ConfigError(f"{source.name} is quantised ({method}), which is not supported")
    if hf_config.hidden_act != "silu":
        raise ConfigError(f"{source.name}: hidden_act {hf_config.hidden_act!r} is not supported")
    rope = _rope_parameters(hf_config)
    if rope["rope_type"] not in _ROPE_TYPES:
        raise ConfigError(
            f"{source.name}: rope type {rope['rope_type']!r} is not supported; "
            f"supported are {', '.join(_ROPE_TYPES)}"
        )
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ConfigError(f"{source.name}: partial rotary embeddings are not supported")


def _rope_parameters(hf_config: Any) -> dict[str, Any]:
    rope = getattr(hf_config, "rope_parameters", None) or {}
    return {"rope_type": "default", **rope}


def _active_sliding_window(hf_config: Any) -> int | None:
    """The window in tokens if at least one layer uses it."""
    window = getattr(hf_config, "sliding_window", None)
    if not window:
        return None
    layer_types = getattr(hf_config, "layer_types", None)
    if layer_types is not None and "sliding_attention" not in layer_types:
        return None
    return int(window)


def _context_length(
    source: ModelSource, hf_config: Any, asked: int | None, sliding_window: int | None
) -> int:
    longest = int(hf_config.max_position_embeddings)
    rope = _rope_parameters(hf_config)
    if rope["rope_type"] == "yarn":
        # Checkpoints differ in whether max_position_embeddings counts the extension already.
        longest = max(longest, int(rope["original_max_position_embeddings"] * rope["factor"]))
    reason = "the model's longest context"
    if sliding_window is not None and sliding_window < longest:
        # Up to the window's length, windowed and full attention are the same: this is exact.
        longest, reason = sliding_window, "the model's sliding window, beyond which we do not serve"
        if asked is None:
            logger.warning(
                "%s uses sliding-window attention: the context is limited to its window, %d tokens",
                source.name,
                sliding_window,
            )
    if asked is None:
        return longest
    if asked < 1:
        raise ConfigError(f"--context-length must be at least 1, got {asked}")
    if asked > longest:
        raise ConfigError(f"--context-length {asked} exceeds {longest}, {reason} ({source.name})")
    return asked


def _dtype(name: str, device: torch.device, hf_config: Any) -> torch.dtype:
    if name in _DTYPES:
        return _DTYPES[name]
    if name != "auto":
        raise ConfigError(f"--dtype {name!r} is not one of auto, {', '.join(_DTYPES)}")
    if device.type == "cpu":
        return torch.float32
    configured = getattr(hf_config, "dtype", None)
    if isinstance(configured, str):
        configured = _DTYPES.get(configured)
    return configured if isinstance(configured, torch.dtype) else torch.bfloat16


def _token_ids(value: int | list[int] | None) -> frozenset[int]:
    if value is None:
        return frozenset()
    return frozenset([value] if isinstance(value, int) else value)
