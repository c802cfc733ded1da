"""Fields that SGLang or OpenAI clients may send and that this server does not act on.

Two kinds. A neutral table lists what asks for nothing, so that clients which always send a
field are served; any other value is refused rather than ignored. Informational fields describe
the request and never change the answer.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from sglang.srt.errors import RequestError

Neutral = Mapping[str, tuple[Any, ...]]

OFF: tuple[Any, ...] = (None, False)
ABSENT: tuple[Any, ...] = (None, "", [], {})


def without_unsupported(
    body: Mapping[str, Any], neutral: Neutral, informational: Collection[str] = ()
) -> dict[str, Any]:
    """The fields that remain to be understood.

    Raises RequestError naming a field of `neutral` that asks for something. A list is neutral if
    each of its elements is.
    """
    rest: dict[str, Any] = {}
    for name, value in body.items():
        if name in neutral:
            if not _is_neutral(value, neutral[name]):
                raise RequestError(f"{name}: {name} is not supported by this server yet", name)
        elif name not in informational:
            rest[name] = value
    return rest


def _is_neutral(value: Any, neutral: tuple[Any, ...]) -> bool:
    if value in neutral:
        return True
    return isinstance(value, list) and all(item in neutral for item in value)
