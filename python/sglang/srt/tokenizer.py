"""Loads the tokenizer that belongs to a model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from sglang.srt import converted_tokenizers
from sglang.srt.errors import ConfigError
from sglang.srt.model_source import ModelSource

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENIZER_MODES = ("auto", "slow")
_VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json")
_WAYS_OUT = "name another with --tokenizer-path, or pass --skip-tokenizer-init and send token ids"


def load_tokenizer(
    source: ModelSource | str | Path,
    *,
    tokenizer_path: str | None = None,
    tokenizer_mode: str = "auto",
    trust_remote_code: bool = False,
    chat_template: str | None = None,
    revision: str | None = None,
) -> PreTrainedTokenizerBase:
    """The tokenizer of `source`, or of `tokenizer_path`: folder, .gguf file or Hugging Face id.

    tokenizer_mode: "slow" asks for the pure Python implementation where one exists.
    chat_template: path of a Jinja file that replaces the tokenizer's own template.
    revision: version of a Hugging Face id. Raises ConfigError if there is no usable tokenizer.
    """
    if tokenizer_mode not in TOKENIZER_MODES:
        raise ConfigError(f"--tokenizer-mode {tokenizer_mode!r} is not one of auto, slow")
    template = None if chat_template is None else _read_template(chat_template)

    from transformers import AutoTokenizer

    where, arguments = _locate(tokenizer_path if tokenizer_path is not None else source)
    kept, tokenizer = None, None
    if tokenizer_mode == "slow":
        arguments["use_fast"] = False
    elif "gguf_file" in arguments:
        kept = converted_tokenizers.kept_at(Path(where, arguments["gguf_file"]))
        tokenizer = converted_tokenizers.read(kept)
    if revision is not None:
        arguments["revision"] = revision
    if tokenizer is None:
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                where, trust_remote_code=trust_remote_code, **arguments
            )
        # Absent, gated, malformed and unknown tokenizers fail in transformers in many ways.
        except Exception as error:
            reason = " ".join(str(error).split())
            raise ConfigError(
                f"No tokenizer could be loaded from {where} ({reason}); {_WAYS_OUT}"
            ) from error
        if kept is not None:
            converted_tokenizers.keep(tokenizer, kept)
    if template is not None:
        tokenizer.chat_template = template
    return tokenizer


def _locate(place: ModelSource | str | Path) -> tuple[str, dict[str, Any]]:
    """Arguments of AutoTokenizer.from_pretrained: (folder or hub id, further arguments)."""
    if isinstance(place, ModelSource):
        place = place.gguf_file or place.folder
    path = Path(place).expanduser()
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise ConfigError(f"{path} is no tokenizer: expected a folder or a .gguf file")
        return str(path.parent), {"gguf_file": path.name}
    if path.is_dir():
        gguf_files = sorted(path.glob("*.gguf"))
        if any((path / name).is_file() for name in _VOCABULARY_FILES):
            return str(path), {}
        if len(gguf_files) == 1:
            return str(path), {"gguf_file": gguf_files[0].name}
        raise ConfigError(
            f"{path} holds no tokenizer ({', '.join(_VOCABULARY_FILES)}); {_WAYS_OUT}"
        )
    return str(place), {}


def _read_template(path: str) -> str:
    try:
        return Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"--chat-template {path} must be the path of a Jinja file: {error}"
        ) from error
