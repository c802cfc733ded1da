"""Which parts of a JSON schema XGrammar passes over in silence.

It reads a schema by its first decisive keyword and ignores what stands beside it. An answer that
the grammar allows could then be one that the schema forbids, so such schemas are refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

# Never looked at, or not as meant.
_IGNORED = frozenset(
    {"not", "if", "contains", "minContains", "maxContains"}
    | {"dependentRequired", "dependentSchemas", "dependencies", "$dynamicRef", "$recursiveRef"}
)
_RANGE = frozenset(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"))
# Those that it knows; of others a schema only says what they are for.
_FORMATS = frozenset(
    {"date", "time", "date-time", "duration", "email", "uuid", "ipv4", "ipv6", "hostname"}
    | {"json-pointer", "relative-json-pointer", "uri", "uri-reference", "uri-template"}
)
# What asserts something, by the type of value that it speaks of.
_OF_TYPE: Mapping[str, frozenset[str]] = {
    "object": frozenset(
        {"properties", "required", "additionalProperties", "patternProperties", "propertyNames"}
        | {"minProperties", "maxProperties", "unevaluatedProperties"}
    ),
    "array": frozenset(
        {"items", "prefixItems", "minItems", "maxItems", "uniqueItems"}
        | {"unevaluatedItems", "additionalItems"}
    ),
    "string": frozenset(("minLength", "maxLength", "pattern", "format")),
    "number": _RANGE | {"multipleOf"},
}
_ASSERTIONS: frozenset[str] = frozenset().union(*_OF_TYPE.values())
# One of these decides alone, in this order.
_DECISIVE = ("$ref", "const", "enum", "anyOf", "oneOf", "allOf")


def unenforced_keyword(schema: str) -> str | None:
    """The first keyword, with its place, whose constraint would be ignored; None if all count.

    What is no schema at all is left to the library to complain of.
    """
    try:
        root = json.loads(schema)
        return next(_problems(root, ""), None)
    except (ValueError, RecursionError):
        return None


def _problems(schema: Any, path: str) -> Iterator[str]:
    if not isinstance(schema, dict):
        return
    for keyword in schema.keys() & _IGNORED:
        yield _at(path, keyword)
    if schema.get("uniqueItems") is True:
        yield _at(path, "uniqueItems")
    decisive = next((keyword for keyword in _DECISIVE if keyword in schema), None)
    if decisive is None:
        yield from _typed_problems(schema, path)
    else:
        yield from _siblings(schema, decisive, path)
    yield from _inner_problems(schema, path)


def _siblings(schema: Mapping[str, Any], decisive: str, path: str) -> Iterator[str]:
    ignored = (schema.keys() & (_ASSERTIONS | {*_DECISIVE})) - {decisive}
    for keyword in sorted(ignored):
        yield _at(path, keyword, f"beside {decisive}")
    values = [schema["const"]] if decisive == "const" else schema.get("enum")
    if "type" in schema and not (
        decisive in ("const", "enum")
        and isinstance(values, list)
        and all(_has_type(value, schema["type"]) for value in values)
    ):
        yield _at(path, "type", f"beside {decisive}")
    if decisive == "allOf" and isinstance(schema["allOf"], list) and len(schema["allOf"]) > 1:
        yield _at(path, "allOf", "of several schemas")


def _typed_problems(schema: Mapping[str, Any], path: str) -> Iterator[str]:
    kinds = schema.get("type")
    named: set[str] = {*kinds} if isinstance(kinds, list) else set()
    if isinstance(kinds, str):
        named = {kinds}
    counted: set[str] = set().union(*(_OF_TYPE.get(_family(kind), frozenset()) for kind in named))
    for keyword in sorted((schema.keys() & _ASSERTIONS) - counted):
        # Only what speaks of no type that is allowed is no constraint.
        if not named and not _implies_type(schema, keyword):
            yield _at(path, keyword, "without type")
    if "multipleOf" in schema and {"integer", "number"} & named:
        if "number" in named:
            yield _at(path, "multipleOf", "of type number")
        for keyword in sorted(schema.keys() & _RANGE):
            yield _at(path, keyword, "beside multipleOf")
    if "string" in named:
        has_format = schema.get("format") in _FORMATS
        for keyword in sorted(schema.keys() & {"minLength", "maxLength"}):
            if "pattern" in schema or has_format:
                yield _at(path, keyword, "beside pattern or format")
        if "pattern" in schema and has_format:
            yield _at(path, "format", "beside pattern")
    if "object" in named:
        properties = schema.get("properties")
        known = properties.keys() if isinstance(properties, dict) else set()
        required = schema.get("required")
        for name in required if isinstance(required, list) else ():
            if name not in known:
                yield _at(path, "required", f"for {name!r}, which is not among the properties")


def _implies_type(schema: Mapping[str, Any], keyword: str) -> bool:
    """Where only objects or arrays can be meant, they alone are written."""
    return ("properties" in schema and keyword in _OF_TYPE["object"]) or (
        ("items" in schema or "prefixItems" in schema) and keyword in _OF_TYPE["array"]
    )


def _inner_problems(schema: Mapping[str, Any], path: str) -> Iterator[str]:
    for keyword in ("properties", "patternProperties", "$defs", "definitions"):
        inner = schema.get(keyword)
        for name, part in inner.items() if isinstance(inner, dict) else ():
            yield from _problems(part, f"{path}/{keyword}/{name}")
    for keyword in ("anyOf", "oneOf", "allOf", "prefixItems"):
        inner = schema.get(keyword)
        for i, part in enumerate(inner if isinstance(inner, list) else ()):
            yield from _problems(part, f"{path}/{keyword}/{i}")
    for keyword in ("items", "additionalProperties", "propertyNames"):
        yield from _problems(schema.get(keyword), f"{path}/{keyword}")


def _family(kind: Any) -> str:
    return "number" if kind == "integer" else str(kind)


def _has_type(value: Any, kinds: Any) -> bool:
    kinds = kinds if isinstance(kinds, list) else [kinds]
    if isinstance(value, bool):
        return "boolean" in kinds
    if isinstance(value, int) or (isinstance(value, float) and value.is_integer()):
        return "integer" in kinds or "number" in kinds
    names = {float: "number", str: "string", list: "array", dict: "object", type(None): "null"}
    return names[type(value)] in kinds


def _at(path: str, keyword: str, how: str = "") -> str:
    place = f" (in {path})" if path else ""
    return f"{keyword}{' ' + how if how else ''}{place}"
