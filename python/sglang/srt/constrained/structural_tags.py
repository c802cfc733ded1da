"""The older form of structural tags: {"structures": [{"begin", "schema", "end"}], "triggers"}."""

from __future__ import annotations

import json
from typing import Any

import msgspec

from sglang.srt.constrained.grammar import GrammarError


class Tag(msgspec.Struct, frozen=True):
    """Behind `begin` comes JSON of `schema`, then `end`."""

    begin: str
    end: str
    schema: dict[str, Any] = {}


class LegacyTags(msgspec.Struct, frozen=True):
    """A tag is entered where the text has one of the triggers, each the beginning of some tag."""

    structures: list[Tag]
    triggers: list[str]


def legacy_tags(text: str) -> LegacyTags | None:
    """None if it is not in the older form. Raises GrammarError."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise GrammarError(f"not JSON: {error}") from None
    if not isinstance(value, dict):
        raise GrammarError("must be a JSON object")
    if "structures" not in value:
        return None
    try:
        tags = msgspec.convert(value, LegacyTags)
    except msgspec.ValidationError as error:
        raise GrammarError(str(error)) from None
    if not tags.structures or not tags.triggers:
        raise GrammarError("structures and triggers must not be empty")
    for tag in tags.structures:
        if not any(trigger and tag.begin.startswith(trigger) for trigger in tags.triggers):
            raise GrammarError(f"no trigger begins {tag.begin!r}")
    return tags
