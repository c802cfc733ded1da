"""Loads the tokenizer of the served model, only where one is needed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, cast

from sglang.bench.errors import BenchError


class Tokenizer(Protocol):
    """The part of a Hugging Face tokenizer that prompts are made with."""

    all_special_ids: list[int]
    bos_token: str | None

    def __len__(self) -> int: ...

    def get_added_vocab(self) -> dict[str, int]: ...

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]: ...

    def decode(self, token_ids: Sequence[int]) -> str: ...

    def apply_chat_template(
        self, conversation: list[dict[str, str]], *, tokenize: bool, add_generation_prompt: bool
    ) -> Any: ...


def load_tokenizer(path: str) -> Tokenizer:
    """`path` is a folder, a .gguf file or a model name. Raises BenchError if it holds none."""
    from transformers import AutoTokenizer  # seconds to import

    try:
        if path.endswith(".gguf"):
            file = Path(path)
            loaded = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
        else:
            loaded = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError, ImportError) as error:
        first_line = next(iter(str(error).splitlines()), type(error).__name__)
        raise BenchError(f"no tokenizer in {path}: {first_line}") from error
    return cast(Tokenizer, loaded)
