"""Counted repetitions in the patterns of a JSON schema, written out.

XGrammar 0.2.8 reads a pattern such as `^[a-z]{2,4}(-[a-z]{2,4})?$` as if the counts were not there
where an optional part or an alternative is near: strings of any length match. The same pattern
without counts is read as it is meant.
"""

from __future__ import annotations

import json
import re
from typing import Any

# Of a pattern that is written out; a longer one is left as it is.
MAX_CHARS = 4096
_COUNTS = re.compile(r"\{(\d{1,6})(,)?(\d{0,6})\}")
_CLASS = re.compile(r"\[\^?\]?(?:\\.|[^\]\\])*\]", re.DOTALL)
_ESCAPE = re.compile(r"\\(?:u[0-9a-fA-F]{4}|x[0-9a-fA-F]{2}|[pP]\{[^}]*\}|.)", re.DOTALL)
# Their values are data, whatever keys they have.
_DATA = frozenset({"const", "enum", "default", "examples"})


def with_plain_patterns(schema: str) -> str:
    """The same schema; what is no JSON is left as it is."""
    if '"pattern"' not in schema:
        return schema
    try:
        return json.dumps(_plain(json.loads(schema)), ensure_ascii=False)
    except (ValueError, RecursionError):
        return schema


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(part) for part in value]
    if not isinstance(value, dict):
        return value
    return {key: part if key in _DATA else _plain_pattern(key, part) for key, part in value.items()}


def _plain_pattern(key: str, part: Any) -> Any:
    if key != "pattern" or not isinstance(part, str):
        return _plain(part)
    written = without_counts(part)
    return part if written is None else written


def without_counts(pattern: str) -> str | None:
    """None if it is not understood, or would become too long."""
    written, end = _sequence(pattern, 0)
    return written if end == len(pattern) and len(written) <= MAX_CHARS else None


def _sequence(pattern: str, at: int) -> tuple[str, int]:
    """From `at` to the end of the group, or of the pattern."""
    parts: list[str] = []
    length = 0
    while at < len(pattern) and pattern[at] != ")":
        atom, at = _atom(pattern, at)
        counts = _COUNTS.match(pattern, at)
        if counts:
            at = counts.end()
            # Laziness changes nothing of what matches.
            at += pattern[at : at + 1] == "?"
            atom = _repeated(atom, *counts.groups())
        parts.append(atom)
        length += len(atom)
        if length > MAX_CHARS:
            break
    return "".join(parts), at


def _atom(pattern: str, at: int) -> tuple[str, int]:
    if pattern[at] == "(":
        inner, end = _sequence(pattern, at + 1)
        return f"({inner})", end + 1
    found = (_CLASS if pattern[at] == "[" else _ESCAPE).match(pattern, at)
    end = found.end() if found else at + 1
    return pattern[at:end], end


def _repeated(atom: str, least: str, comma: str | None, most: str) -> str:
    low = int(least)
    if len(atom) * max(low, int(most or 0)) > MAX_CHARS:
        return " " * (MAX_CHARS + 1)
    if not comma:
        return f"({atom * low})"
    if not most:
        return f"({atom * low}{atom}*)"
    optional = int(most) - low
    return "(" + atom * low + f"({atom}" * optional + ")?" * optional + ")"
