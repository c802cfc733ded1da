"""Log-probabilities between the device and a client: what was asked, and what travels.

They are natural logarithms. Arrays travel as the bytes of their values, row by row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from sglang.srt.errors import RequestError

OUTPUT_ONLY = -1
MAX_TOP = 1024
MAX_TOKEN_IDS = 4096

Floats = npt.NDArray[np.float32]


class LogprobWish(msgspec.Struct, frozen=True, kw_only=True):
    """What a client wants to know of each token beside its own log-probability.

    start: the first prompt position of the answer. From a client OUTPUT_ONLY, or less than the
    length of the prompt; `for_prompt` turns OUTPUT_ONLY into that length.
    top: so many of the likeliest tokens. token_ids: these tokens; None is not to be answered.
    texts: of all tokens in the answer.
    """

    start: int = OUTPUT_ONLY
    top: int = 0
    token_ids: list[int] | None = None
    texts: bool = False

    def check(self, vocab_size: int) -> None:
        """Raises RequestError naming the field."""
        if not 0 <= self.top <= min(MAX_TOP, vocab_size):
            problem = f"must be in [0, {min(MAX_TOP, vocab_size)}], got {self.top}"
            raise RequestError(f"top_logprobs_num: {problem}", "top_logprobs_num")
        ids = self.token_ids or ()
        if len(ids) > MAX_TOKEN_IDS:
            problem = f"takes at most {MAX_TOKEN_IDS} ids, got {len(ids)}"
            raise RequestError(f"token_ids_logprob: {problem}", "token_ids_logprob")
        for token in ids:
            if not 0 <= token < vocab_size:
                problem = f"{token} is outside the vocabulary [0, {vocab_size})"
                raise RequestError(f"token_ids_logprob: {problem}", "token_ids_logprob")
        if self.start < OUTPUT_ONLY:
            problem = f"must be {OUTPUT_ONLY} (output only) or at least 0, got {self.start}"
            raise RequestError(f"logprob_start_len: {problem}", "logprob_start_len")

    def for_prompt(self, prompt_tokens: int) -> LogprobWish:
        """Raises RequestError if `start` lies behind the prompt."""
        if self.start == OUTPUT_ONLY:
            return msgspec.structs.replace(self, start=prompt_tokens)
        if self.start >= prompt_tokens:
            raise RequestError(
                f"logprob_start_len: {self.start} must be less than the prompt's "
                f"{prompt_tokens} tokens, or {OUTPUT_ONLY} for output only",
                "logprob_start_len",
            )
        return self


class TokenScores(NamedTuple):
    """Log-probabilities of n tokens in a row, and of others in their places.

    chosen [n] f32; top_values [n, top] f32 and top_ids [n, top] i32, likeliest first;
    listed [n, token_ids] f32 of the ids asked for.
    """

    chosen: Floats
    top_values: Floats
    top_ids: npt.NDArray[np.int32]
    listed: Floats

    @classmethod
    def unknown(cls, wish: LogprobWish) -> TokenScores:
        """Of one token that nothing precedes."""
        count = len(wish.token_ids or ())
        return cls(
            np.full(1, np.nan, np.float32),
            np.full((1, wish.top), np.nan, np.float32),
            np.zeros((1, wish.top), np.int32),
            np.full((1, count), np.nan, np.float32),
        )

    @classmethod
    def joined(cls, parts: Sequence[TokenScores]) -> TokenScores:
        return cls(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


class BatchScores(NamedTuple):
    """Of one launch. samples: by place among its samples, of those that asked. prompts: of its
    parts of prompts that did, in their order."""

    samples: Mapping[int, TokenScores]
    prompts: Sequence[TokenScores]


NO_SCORES = BatchScores({}, ())


class LogprobRows(msgspec.Struct, frozen=True, kw_only=True):
    """TokenScores of the tokens `ids` [n] i32 as they travel; a NaN among `chosen` is unknown.

    texts, top_texts, listed_texts: of ids, top_ids and listed_ids where texts were asked for.
    """

    ids: bytes
    chosen: bytes
    top_values: bytes = b""
    top_ids: bytes = b""
    listed: bytes = b""
    listed_ids: list[int] | None = None
    wants_texts: bool = False
    texts: list[str] = []
    top_texts: list[str] = []
    listed_texts: list[str] = []

    @classmethod
    def of(cls, ids: Iterable[int], scores: TokenScores, wish: LogprobWish) -> LogprobRows:
        return cls(
            ids=np.fromiter(ids, np.int32).tobytes(),
            chosen=scores.chosen.tobytes(),
            top_values=scores.top_values.tobytes(),
            top_ids=scores.top_ids.tobytes(),
            listed=scores.listed.tobytes(),
            listed_ids=wish.token_ids,
            wants_texts=wish.texts,
        )

    def __len__(self) -> int:
        return len(self.chosen) // 4

    def first(self, count: int) -> LogprobRows:
        """Of the first tokens only; before texts are filled in."""
        if count >= len(self):
            return self
        changes: dict[str, Any] = {}
        for name in ("ids", "chosen", "top_values", "top_ids", "listed"):
            whole: bytes = getattr(self, name)
            changes[name] = whole[: count * (len(whole) // len(self))]
        return msgspec.structs.replace(self, **changes)

    def with_texts(self, decode: Callable[[list[int]], list[str]]) -> LogprobRows:
        """With the text of every token; `decode` gives that of each id alone."""
        ids, top_ids = (np.frombuffer(part, np.int32).tolist() for part in (self.ids, self.top_ids))
        listed_ids = self.listed_ids or []
        distinct = list({*ids, *top_ids, *listed_ids})
        text = dict(zip(distinct, decode(distinct), strict=True))
        return msgspec.structs.replace(
            self,
            texts=[text[token] for token in ids],
            top_texts=[text[token] for token in top_ids],
            listed_texts=[text[token] for token in listed_ids],
        )


class LogprobNews(msgspec.Struct, frozen=True, kw_only=True):
    """What a batch has of one request. prompt: once, with its first tokens or its end; None if
    none was asked for. output: of the new tokens, one for one."""

    prompt: LogprobRows | None = None
    output: LogprobRows | None = None
