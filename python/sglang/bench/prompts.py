"""PromptMaker: from drawn token ids or text to what the backend is sent."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import orjson

from sglang.bench.errors import BenchError
from sglang.bench.tokenizer import Tokenizer
from sglang.bench.workload import TokenIds


class PromptMaker:
    """Knows the vocabulary and whether prompts travel as token ids.

    ordinary_ids [n] i32: the ids prompts are drawn from; special tokens are not among them when
    a tokenizer is at hand. Without a tokenizer only synthetic prompts of ids can be made.
    """

    def __init__(
        self, ordinary_ids: TokenIds | None, tokenizer: Tokenizer | None, *, send_ids: bool
    ) -> None:
        self._ordinary_ids = ordinary_ids
        self._tokenizer = tokenizer
        self._send_ids = send_ids

    @property
    def ordinary_ids(self) -> TokenIds:
        if self._ordinary_ids is None:
            raise BenchError(
                "the vocabulary is unknown: give --tokenizer, or --vocab-size with --backend sglang"
            )
        return self._ordinary_ids

    @property
    def tokenizer(self) -> Tokenizer:
        """Raises BenchError when there is none."""
        if self._tokenizer is None:
            raise BenchError("this data set needs a tokenizer: give --tokenizer")
        return self._tokenizer

    @property
    def has_tokenizer(self) -> bool:
        return self._tokenizer is not None

    def draw(self, rng: np.random.Generator, count: int) -> TokenIds:
        """[count] ordinary token ids."""
        return rng.choice(self.ordinary_ids, size=count)

    def from_ids(self, *parts: TokenIds) -> str | TokenIds:
        """Parts are decoded one by one, so equal leading parts are equal leading text."""
        if self._send_ids:
            return np.concatenate(parts).astype(np.int32, copy=False)
        return "".join(self.tokenizer.decode(part.tolist()) for part in parts)

    def from_text(self, text: str) -> str | TokenIds:
        """Text travels as text unless ids are asked for and can be made."""
        if not self._send_ids or self._tokenizer is None:
            return text
        ids = self._tokenizer.encode(text, add_special_tokens=True)
        return np.asarray(ids, dtype=np.int32)

    def encode(self, text: str) -> TokenIds:
        """[tokens] i32 of the text, special ones not added."""
        return np.asarray(self.tokenizer.encode(text, add_special_tokens=False), dtype=np.int32)

    def count(self, text: str) -> int:
        """Tokens of the text, special ones not added."""
        return len(self.tokenizer.encode(text, add_special_tokens=False))


def ordinary_ids_of(tokenizer: Tokenizer) -> TokenIds:
    """All ids but the special and the added ones, such as the marks of a chat template."""
    special = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    ids = [token for token in range(len(tokenizer)) if token not in special]
    return np.asarray(ids, dtype=np.int32)


def vocab_size_of_config(model_path: str) -> int | None:
    """vocab_size in a model folder's config.json; None if there is no such file or entry."""
    try:
        config = orjson.loads((Path(model_path) / "config.json").read_bytes())
        size = config.get("vocab_size") or config.get("text_config", {}).get("vocab_size")
    except (OSError, ValueError, AttributeError):
        return None
    return size if isinstance(size, int) and size > 0 else None
