"""Field types with alternatives, whose errors are one sentence instead of one for each case."""

from __future__ import annotations

from typing import Annotated, Any, TypeGuard

from pydantic import PlainValidator


def _texts(value: Any) -> str | list[str]:
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return value
    raise ValueError("must be a string or a list of strings")


def _ids(value: Any) -> list[int] | list[list[int]]:
    if isinstance(value, list) and (_is_row(value) or all(_is_row(row) for row in value)):
        return value
    raise ValueError("must be a list of token ids or a list of such lists")


def _prompt(value: Any) -> str | list[str] | list[int] | list[list[int]]:
    for alternative in (_texts, _ids):
        try:
            return alternative(value)
        except ValueError:
            continue
    raise ValueError("must be a string, a list of strings, token ids, or a list of token id lists")


def _is_row(value: Any) -> bool:
    # Faster than a test of each item, which takes as long as parsing did.
    return isinstance(value, list) and set(map(type, value)) <= {int}


def is_batch_of_ids(value: Any) -> TypeGuard[list[list[int]]]:
    """True for [[1, 2], [3]], false for [1, 2] and []."""
    return isinstance(value, list) and bool(value) and isinstance(value[0], list)


_Texts = str | list[str]
_Ids = list[int] | list[list[int]]
OneOrManyTexts = Annotated[_Texts, PlainValidator(_texts, json_schema_input_type=_Texts)]
OneOrManyIds = Annotated[_Ids, PlainValidator(_ids, json_schema_input_type=_Ids)]
AnyPrompt = Annotated[_Texts | _Ids, PlainValidator(_prompt, json_schema_input_type=_Texts | _Ids)]
