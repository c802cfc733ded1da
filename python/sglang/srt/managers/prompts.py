"""From a client's prompt to checked token ids."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np

from sglang.srt.errors import RequestError
from sglang.srt.logprobs import LogprobWish
from sglang.srt.messages import TokenIds, token_ids
from sglang.srt.sampling_params import SamplingParams
from sglang.srt.service_levels import NOTHING_ASKED, ServiceLevel

logger = logging.getLogger(__name__)

# Tokenising this much takes half a millisecond; more would hold up other requests' streams.
_INLINE_CHARS = 2_000


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt of a client: either `text` or `input_ids`.

    field: the request's field it came from, for error messages.
    add_special_tokens: whether the tokenizer puts its begin-of-text marks; not after a template.
    """

    sampling: SamplingParams
    text: str | None = None
    input_ids: list[int] | None = None
    namespace: str = ""
    field: str = "text"
    add_special_tokens: bool = True
    level: ServiceLevel = NOTHING_ASKED
    logprobs: LogprobWish | None = None
    rank: int = 0


@dataclass(frozen=True, slots=True)
class TokenizedPrompt:
    """Ids that fit the model, and sampling parameters whose max_new_tokens is a number."""

    input_ids: TokenIds
    sampling: SamplingParams
    namespace: str
    level: ServiceLevel = NOTHING_ASKED
    logprobs: LogprobWish | None = None
    rank: int = 0


@dataclass(frozen=True, slots=True)
class Limits:
    """What the model can take, in tokens."""

    vocab_size: int
    context_length: int
    auto_truncate: bool = False


def namespace_of(extra_key: str | None, cache_salt: str | None) -> str:
    """Folds both keys into one, so that no two different pairs share a prefix cache."""
    if not extra_key and not cache_salt:
        return ""
    return json.dumps([extra_key or "", cache_salt or ""])


class PromptEncoder:
    """Tokenises and checks prompts without holding up the event loop.

    `tokenizer` is a Hugging Face tokenizer, None for a server that takes ids only.
    """

    def __init__(self, tokenizer: Any | None, limits: Limits) -> None:
        self.limits = limits
        self._tokenizer = tokenizer
        # One worker: Hugging Face tokenizers must not be reconfigured from two threads at once.
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="tokenize")

    def close(self) -> None:
        self._worker.shutdown(wait=False, cancel_futures=True)

    async def encode(self, prompts: Sequence[Prompt]) -> list[TokenizedPrompt]:
        """Raises RequestError naming the field of the first prompt that cannot be served."""
        rows: list[list[int] | None] = [prompt.input_ids for prompt in prompts]
        for special in (True, False):
            texts = {
                i: prompt.text
                for i, prompt in enumerate(prompts)
                if prompt.text is not None and prompt.add_special_tokens == special
            }
            if texts:
                encoded = await self.tokenize(list(texts.values()), special)
                for i, ids in zip(texts, encoded, strict=True):
                    rows[i] = ids
        return [self._checked(p, ids or []) for p, ids in zip(prompts, rows, strict=True)]

    async def tokenize(self, texts: list[str], add_special_tokens: bool = True) -> list[list[int]]:
        """Token ids of each text, all in one call of the tokenizer."""
        if sum(map(len, texts)) <= _INLINE_CHARS:
            return self._tokenize(texts, add_special_tokens)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._worker, self._tokenize, texts, add_special_tokens)

    def decode(
        self, ids: list[int], skip_special_tokens: bool = True, *, field: str = "input_ids"
    ) -> str:
        """Text of a whole id list. Raises RequestError naming `field` for an id out of range."""
        self._packed(ids, field)
        text: str = self._required_tokenizer().decode(
            ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
        )
        return text

    def _required_tokenizer(self) -> Any:
        if self._tokenizer is None:
            raise RequestError(
                "text: this server runs with --skip-tokenizer-init and takes input_ids only", "text"
            )
        return self._tokenizer

    def _tokenize(self, texts: list[str], add_special_tokens: bool) -> list[list[int]]:
        tokenizer = self._required_tokenizer()
        if not texts:  # no texts at all fail inside it
            return []
        encoded = tokenizer(
            texts, add_special_tokens=add_special_tokens, return_attention_mask=False
        )
        ids: list[list[int]] = encoded["input_ids"]
        return ids

    def _checked(self, prompt: Prompt, ids: list[int]) -> TokenizedPrompt:
        field, sampling, limits = prompt.field, prompt.sampling, self.limits
        if not ids:
            raise RequestError(f"{field}: the prompt is empty, it has no tokens", field)
        packed = self._packed(ids, field)
        if len(ids) >= limits.context_length:
            if not limits.auto_truncate:
                raise RequestError(
                    f"{field}: the prompt has {len(ids)} tokens, the model's context of "
                    f"{limits.context_length} takes at most {limits.context_length - 1}",
                    field,
                )
            logger.warning("a prompt of %d tokens is cut to fit the context", len(ids))
            packed = packed[: limits.context_length - 1]

        room = limits.context_length - len(packed)
        wanted = sampling.max_new_tokens
        if wanted is None or (wanted > room and limits.auto_truncate):
            shortest = min(sampling.min_new_tokens, room)
            sampling = msgspec.structs.replace(
                sampling, max_new_tokens=room, min_new_tokens=shortest
            )
        elif wanted > room:
            raise RequestError(
                f"sampling_params.max_new_tokens {wanted} and the prompt's {len(packed)} tokens "
                f"exceed the context of {limits.context_length}: ask for at most {room}",
                "max_new_tokens",
            )
        asked = prompt.logprobs
        wish = None if asked is None else asked.for_prompt(len(packed))
        return TokenizedPrompt(packed, sampling, prompt.namespace, prompt.level, wish, prompt.rank)

    def _packed(self, ids: list[int], field: str) -> TokenIds:
        """A prompt may have many thousand ids, and the streams of others wait for this check."""
        size = self.limits.vocab_size
        with suppress(OverflowError):
            packed = token_ids(ids)
            values = np.frombuffer(packed, np.int32) if packed else np.zeros(1, np.int32)
            if values.min() >= 0 and values.max() < size:
                return packed
        bad = next(i for i in ids if not 0 <= i < size)
        raise RequestError(f"{field}: token id {bad} is outside the vocabulary [0, {size})", field)
