"""OpenAI's names for sampling parameters, there and back."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from sglang.srt.entrypoints.openai.output_format import Constraint
from sglang.srt.entrypoints.openai.protocol import SamplingFields
from sglang.srt.errors import RequestError
from sglang.srt.sampling_params import SamplingParams

RENAMED = {"min_tokens": "min_new_tokens", "seed": "sampling_seed"}


def sampling_of(
    body: SamplingFields,
    *,
    max_new_tokens: int | None,
    vocab_size: int,
    defaults: Mapping[str, Any] | None = None,
    constraint: Constraint | None = None,
    keep_special_tokens: bool = False,
) -> SamplingParams:
    """Checked parameters: the body's, else `defaults`, else SamplingParams's own.

    keep_special_tokens: whatever the body says, since its answers cannot be read without.
    Raises RequestError with SamplingParams's names; see `openai_names`.
    """
    given = body.model_dump(include=set(SamplingFields.model_fields), exclude_none=True)
    named = {RENAMED.get(name, name): value for name, value in given.items()}
    fields = {**(defaults or {}), **named, "max_new_tokens": max_new_tokens}
    if keep_special_tokens:
        fields["skip_special_tokens"] = False
    if constraint is not None:
        fields[constraint.name] = constraint.value
    try:
        return SamplingParams.parse(fields, vocab_size=vocab_size)
    except RequestError as error:
        if constraint is None or error.field != constraint.name:
            raise
        text = str(error).replace(f"sampling_params.{constraint.name}", constraint.field)
        raise RequestError(text, constraint.field) from None


@contextmanager
def openai_names(max_tokens: str = "max_tokens", **others: str) -> Iterator[None]:
    """Rewrites a RequestError inside in the names that the client used.

    others: further names, ours to theirs, of surfaces that are not OpenAI's.
    """
    names = {ours: theirs for theirs, ours in RENAMED.items()} | {"max_new_tokens": max_tokens}
    names |= others
    try:
        yield
    except RequestError as error:
        text = str(error).replace("sampling_params.", "")
        for ours, theirs in names.items():
            text = re.sub(rf"\b{ours}\b", theirs, text)
        field = names.get(error.field, error.field) if error.field else None
        raise type(error)(text, field) from None
