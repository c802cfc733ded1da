"""What an answer must look like: the request's words for it, and SamplingParams's.

All constraints of all surfaces come through here; a request has at most one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sglang.srt.errors import RequestError

# As fields of SamplingParams, and of requests that write a constraint themselves.
CONSTRAINTS = ("json_schema", "regex", "ebnf", "structural_tag")

_ANY_OBJECT: Mapping[str, Any] = {"type": "object"}


@dataclass(frozen=True, slots=True)
class Constraint:
    """`field`: the request's field it came from; `name` and `value`: SamplingParams's."""

    field: str
    name: str
    value: str


def schema_constraint(field: str, schema: Any) -> Constraint:
    return Constraint(field, "json_schema", json.dumps(schema, ensure_ascii=False))


def response_format_constraint(
    response_format: Mapping[str, Any] | None, field: str = "response_format"
) -> Constraint | None:
    """None if any text will do. Raises RequestError naming the field."""
    if response_format is None:
        return None
    match response_format.get("type"):
        case "text":
            return None
        case "json_object":
            return schema_constraint(field, _ANY_OBJECT)
        case "json_schema":
            inner = response_format.get("json_schema")
            if not isinstance(inner, Mapping):
                raise _bad(f"{field}.json_schema", "must be an object with a name and a schema")
            schema = inner.get("schema")
            if not isinstance(schema, Mapping | bool):
                raise _bad(f"{field}.json_schema.schema", "must be a JSON schema")
            return schema_constraint(field, schema)
        case "structural_tag":
            return Constraint(field, "structural_tag", json.dumps(response_format))
        case None:
            raise _bad(f"{field}.type", "is required")
        case other:
            raise _bad(
                f"{field}.type",
                f"must be text, json_object, json_schema or structural_tag, got {other!r}",
            )


def only_constraint(written: Mapping[str, Any], *others: Constraint | None) -> Constraint | None:
    """The request's one constraint: `written` in its fields, or made of others.

    Raises RequestError naming the second if there are two.
    """
    found = [Constraint(name, name, written[name]) for name in CONSTRAINTS if written.get(name)] + [
        other for other in others if other is not None
    ]
    if len(found) > 1:
        first, second = found[:2]
        raise _bad(second.field, f"cannot be combined with {first.field}, give one")
    return found[0] if found else None


def _bad(field: str, problem: str) -> RequestError:
    return RequestError(f"{field}: {problem}", field)
