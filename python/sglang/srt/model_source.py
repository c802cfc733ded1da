"""Where a model's files are: a local folder, one GGUF file, or a Hugging Face id."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sglang.srt.errors import ConfigError

logger = logging.getLogger(__name__)

WeightFormat = Literal["safetensors", "gguf", "dummy"]

LOAD_FORMATS = ("auto", "safetensors", "gguf", "dummy")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_SMALL_FILES = ["*.json", "*.txt", "*.model", "*.tiktoken", "*.jinja", "*.py"]
# Mistral and Meta publish the same weights a second time under these names.
_SECOND_COPIES = ["original/*", "consolidated*"]


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A model found on disk.

    name: what the user asked for. folder: holds config.json, tokenizer and safetensors files,
    or the GGUF file. gguf_file: set if config, tokenizer and weights come from one GGUF file.
    weight_format: how the weights are read; "dummy" reads none.
    """

    name: str
    folder: Path
    gguf_file: Path | None
    weight_format: WeightFormat


def resolve_model_source(
    model_path: str,
    *,
    load_format: str = "auto",
    revision: str | None = None,
    download_dir: str | None = None,
) -> ModelSource:
    """Finds the files of `model_path`, downloading them if it is a Hugging Face id.

    Raises ConfigError if nothing usable is there, or if a download is not possible.
    """
    if load_format not in LOAD_FORMATS:
        raise ConfigError(
            f"--load-format {load_format!r} is not supported; use one of {', '.join(LOAD_FORMATS)}"
        )
    path = Path(model_path).expanduser()
    if path.exists():
        if revision is not None:
            raise ConfigError(
                f"--revision selects a version on the Hugging Face hub, "
                f"but --model-path {model_path} is a local path"
            )
        return _from_local(model_path, path, load_format)
    if not _HUB_ID.fullmatch(model_path):
        raise ConfigError(
            f"--model-path {model_path} does not exist and is not a Hugging Face id (owner/name)"
        )
    if load_format == "gguf":
        raise ConfigError(
            f"--load-format gguf needs a local file: download one .gguf file of {model_path} "
            f"and pass it as --model-path"
        )
    folder = _download(model_path, load_format, revision, download_dir)
    return _from_local(model_path, folder, load_format)


def _from_local(name: str, path: Path, load_format: str) -> ModelSource:
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise ConfigError(f"--model-path {name} is a file, but not a .gguf file")
        if load_format == "safetensors":
            raise ConfigError(
                f"--model-path {name} is a GGUF file, but --load-format says safetensors"
            )
        return ModelSource(name, path.parent, path, "dummy" if load_format == "dummy" else "gguf")

    has_config = (path / "config.json").is_file()
    if has_config and load_format == "dummy":
        return ModelSource(name, path, None, "dummy")
    if has_config and load_format in ("auto", "safetensors") and any(path.glob("*.safetensors")):
        return ModelSource(name, path, None, "safetensors")
    if load_format != "safetensors":
        gguf_files = sorted(path.glob("*.gguf"))
        if len(gguf_files) == 1:
            weight_format: WeightFormat = "dummy" if load_format == "dummy" else "gguf"
            return ModelSource(name, path, gguf_files[0], weight_format)
        if gguf_files:
            listed = ", ".join(file.name for file in gguf_files)
            raise ConfigError(
                f"{name} holds several GGUF files; pass one as --model-path: {listed}"
            )
    raise ConfigError(_nothing_usable(name, path, has_config, load_format))


def _nothing_usable(name: str, folder: Path, has_config: bool, load_format: str) -> str:
    if load_format == "gguf":
        return f"{name} holds no .gguf file, which --load-format gguf needs"
    if not has_config:
        return f"{name} holds neither config.json nor a .gguf file"
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")) or any(folder.glob("*.pth")):
        return (
            f"{name} holds only pickled PyTorch weights, which are not loaded because they can run "
            f"code; convert them to safetensors"
        )
    return (
        f"{name} holds config.json but no .safetensors file; --load-format dummy needs no weights"
    )


def _download(
    hub_id: str, load_format: str, revision: str | None, download_dir: str | None
) -> Path:
    from huggingface_hub import snapshot_download

    patterns = _SMALL_FILES if load_format == "dummy" else [*_SMALL_FILES, "*.safetensors"]
    logger.info("Fetching %s from the Hugging Face hub", hub_id)
    try:
        folder = snapshot_download(
            hub_id,
            revision=revision,
            cache_dir=download_dir,
            allow_patterns=patterns,
            ignore_patterns=_SECOND_COPIES,
        )
    # Not found, gated, offline and malformed ids are all OSError or ValueError in huggingface_hub.
    except (OSError, ValueError) as error:
        wanted = hub_id if revision is None else f"{hub_id} at --revision {revision}"
        raise ConfigError(
            f"--model-path {wanted} is no local path and could not be fetched from the "
            f"Hugging Face hub ({type(error).__name__}: {_first_line(error)})"
        ) from error
    return Path(folder)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "no details")
