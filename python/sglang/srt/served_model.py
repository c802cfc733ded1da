"""What the HTTP server and the detokenizer load of a model: everything but its weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sglang.srt.errors import ConfigError
from sglang.srt.server_args import ServerArgs, resolve_device

_GENERATION_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


@dataclass(frozen=True, slots=True)
class ServedModel:
    """The model as its clients see it.

    vocab_size and context_length are in tokens.
    tokenizer: a Hugging Face tokenizer; None with --skip-tokenizer-init.
    chat_defaults: sampling parameters of chat requests that leave them open.
    """

    vocab_size: int
    context_length: int
    model_type: str = ""
    architectures: tuple[str, ...] = ()
    tokenizer: Any | None = None
    chat_defaults: Mapping[str, Any] = field(default_factory=dict)


def load_served_model(args: ServerArgs) -> ServedModel:
    """Reads config and tokenizer. Raises ConfigError naming the flag at fault."""
    from sglang.srt.model_config import ModelConfig

    source = _source(args)
    config = ModelConfig.load(
        source,
        dtype=args.dtype,
        device=resolve_device(args),
        context_length=args.context_length,
        override_args=args.json_model_override_args,
        trust_remote_code=args.trust_remote_code,
    )
    return ServedModel(
        vocab_size=config.vocab_size,
        context_length=config.context_length,
        model_type=str(config.hf_config.model_type),
        architectures=(config.architecture,),
        tokenizer=None if args.skip_tokenizer_init else load_served_tokenizer(args),
        chat_defaults=(
            generation_defaults(source.folder) if args.sampling_defaults == "model" else {}
        ),
    )


def load_served_tokenizer(args: ServerArgs) -> Any:
    """The Hugging Face tokenizer that the flags ask for. Raises ConfigError."""
    from sglang.srt.tokenizer import load_tokenizer

    return load_tokenizer(
        _source(args),
        tokenizer_path=args.tokenizer_path,
        tokenizer_mode=args.tokenizer_mode,
        trust_remote_code=args.trust_remote_code,
        chat_template=args.chat_template,
        revision=args.revision,
    )


def generation_defaults(folder: Path) -> dict[str, Any]:
    """Sampling parameters that the model's generation_config.json recommends."""
    path = folder / "generation_config.json"
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    defaults = {k: config[k] for k in _GENERATION_DEFAULTS if config.get(k) is not None}
    if defaults.get("top_k") == 0:  # how Hugging Face writes "off"
        defaults["top_k"] = -1
    return defaults


def _source(args: ServerArgs) -> Any:
    from sglang.srt.model_source import resolve_model_source

    return resolve_model_source(
        args.model_path,
        load_format=args.load_format,
        revision=args.revision,
        download_dir=args.download_dir,
    )
