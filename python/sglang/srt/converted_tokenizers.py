"""Keeps tokenizers of GGUF files as tokenizer.json, which transformers reads in a fraction of the
seconds that it takes to convert them: every process of a server does so at start."""

from __future__ import annotations

import hashlib
import importlib.metadata
import logging
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from sglang.srt.cache_folder import default_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


def kept_at(gguf_file: Path) -> Path:
    """Where the tokenizer of this file is kept, or would be. Another place for a changed file, or
    another version of transformers."""
    file = gguf_file.resolve()
    state = file.stat()
    key = (str(file), state.st_size, state.st_mtime_ns, importlib.metadata.version("transformers"))
    return default_folder() / f"tokenizer-{hashlib.sha256(repr(key).encode()).hexdigest()[:16]}"


def read(place: Path) -> PreTrainedTokenizerBase | None:
    """What is kept there; None if that is nothing, or nothing of use, which is removed."""
    if not place.is_dir():
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(place))
    # Damaged files fail in transformers in many ways.
    except Exception as error:
        logger.warning("A kept tokenizer is left aside, %s: %s", place, error)
        shutil.rmtree(place, ignore_errors=True)
        return None


def keep(tokenizer: PreTrainedTokenizerBase, place: Path) -> None:
    """All of it or nothing, whatever other processes do; a folder that cannot be written to is
    no error."""
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        unfinished = tempfile.mkdtemp(prefix=f"{place.name}-", dir=place.parent)
        try:
            tokenizer.save_pretrained(unfinished)
            if not place.is_dir():
                os.rename(unfinished, place)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    except OSError as error:
        logger.debug("The tokenizer is not kept in %s: %s", place, error)
