"""Field types with alternatives, whose errors are one sentence instead of one for each case."""

from __future__ import annotations

from typing import Annotated, Any, TypeGuard

from pydantic import PlainValidator

_EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")


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


def _effort(value: Any) -> str | float:
    if isinstance(value, str) and value in _EFFORTS:
        return value
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 0.99:
        return value
    raise ValueError(f"must be one of {', '.join(_EFFORTS)}, or a number in [0, 0.99]")


def _is_row(value: Any) -> bool:
    # Faster than a test of each item, which takes as long as parsing did.
    return isinstance(value, list) and set(map(type, value)) <= {int}


def _bools(value: Any) -> bool | list[bool]:
    if isinstance(value, bool):
        return value
    if isinstance(value, list) and set(map(type, value)) <= {bool}:
        return value
    raise ValueError("must be true, false or a list of these")


def _ints(value: Any) -> int | list[int]:
    if type(value) is int:
        return value
    if _is_row(value):
        rows: list[int] = value
        return rows
    raise ValueError("must be an integer or a list of integers")


def is_batch_of_ids(value: Any) -> TypeGuard[list[list[int]]]:
    """True for [[1, 2], [3]], false for [1, 2] and []."""
    return isinstance(value, list) and bool(value) and isinstance(value[0], list)


_Texts = str | list[str]
_Ids = list[int] | list[list[int]]
_Bools = bool | list[bool]
_Ints = int | list[int]
_Effort = str | float
Effort = Annotated[_Effort, PlainValidator(_effort, json_schema_input_type=_Effort)]
OneOrManyTexts = Annotated[_Texts, PlainValidator(_texts, json_schema_input_type=_Texts)]
OneOrManyIds = Annotated[_Ids, PlainValidator(_ids, json_schema_input_type=_Ids)]
OneOrManyBools = Annotated[_Bools, PlainValidator(_bools, json_schema_input_type=_Bools)]
OneOrManyInts = Annotated[_Ints, PlainValidator(_ints, json_schema_input_type=_Ints)]
AnyPrompt = Annotated[_Texts | _Ids, PlainValidator(_prompt, json_schema_input_type=_Texts | _Ids)]
