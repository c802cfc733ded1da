"""Log-probabilities in /generate: what its fields ask for, and what meta_info says of them."""

from __future__ import annotations

from typing import Any

import pydantic

from sglang.srt.entrypoints.value_types import (
    OneOrManyBools,
    OneOrManyIds,
    OneOrManyInts,
    is_batch_of_ids,
)
from sglang.srt.errors import RequestError
from sglang.srt.logprobs import OUTPUT_ONLY, LogprobWish
from sglang.srt.managers.answer_logprobs import AnswerLogprobs


class LogprobFields(pydantic.BaseModel):
    """One value for all prompts or a list with one for each; without return_logprob the others
    say how, but ask for nothing."""

    return_logprob: OneOrManyBools | None = None
    logprob_start_len: OneOrManyInts | None = None
    top_logprobs_num: OneOrManyInts | None = None
    token_ids_logprob: OneOrManyIds | None = None
    return_text_in_logprobs: OneOrManyBools | None = None


def wishes_of(
    body: LogprobFields, count: int, *, vocab_size: int, has_tokenizer: bool
) -> list[LogprobWish | None]:
    """One for each of `count` prompts. Raises RequestError naming the field."""
    asked = _each("return_logprob", body.return_logprob, count, False)
    starts = _each("logprob_start_len", body.logprob_start_len, count, OUTPUT_ONLY)
    tops = _each("top_logprobs_num", body.top_logprobs_num, count, 0)
    texts = _each("return_text_in_logprobs", body.return_text_in_logprobs, count, False)
    ids: Any = body.token_ids_logprob
    if not is_batch_of_ids(ids):
        ids = [ids] * count
    ids = _each("token_ids_logprob", ids, count, [])
    wishes: list[LogprobWish | None] = []
    for i in range(count):
        wish = LogprobWish(
            start=starts[i], top=tops[i], token_ids=list(ids[i] or []) or None, texts=texts[i]
        )
        wish.check(vocab_size)
        if asked[i] and wish.texts and not has_tokenizer:
            raise RequestError(
                "return_text_in_logprobs: this server runs with --skip-tokenizer-init and has "
                "no texts",
                "return_text_in_logprobs",
            )
        wishes.append(wish if asked[i] else None)
    return wishes


def logprob_info(logprobs: AnswerLogprobs, wish: LogprobWish, output_tokens: int) -> dict[str, Any]:
    """For meta_info. logprobs: all there are, or the new ones only; output_tokens: all of them."""
    info: dict[str, Any] = {
        "input_token_logprobs": logprobs.prompt.tokens,
        "output_token_logprobs": logprobs.output.tokens,
        "output_token_logprobs_length": output_tokens,
    }
    if wish.top:
        info["input_top_logprobs"] = logprobs.prompt.top
        info["output_top_logprobs"] = logprobs.output.top
    if wish.token_ids is not None:
        info["input_token_ids_logprobs"] = logprobs.prompt.listed
        info["output_token_ids_logprobs"] = logprobs.output.listed
    return info


def _each(field: str, value: Any, count: int, default: Any) -> list[Any]:
    values = value if isinstance(value, list) else [value] * count
    if len(values) != count:
        raise RequestError(f"{field}: got {len(values)} values for {count} prompts", field)
    return [default if item is None else item for item in values]
