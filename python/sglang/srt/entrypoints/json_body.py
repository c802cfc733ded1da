"""Request bodies: JSON objects, whose errors say where."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any, TypeVar

import orjson
import pydantic
from fastapi import Request

from sglang.srt.errors import RequestError

B = TypeVar("B", bound=pydantic.BaseModel)


async def read_object(request: Request, *, typed: bool = False) -> dict[str, Any]:
    """The body as a JSON object. `typed` insists on the content type application/json."""
    if typed:
        content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if content_type != "application/json":
            raise RequestError(
                f"Content-Type must be application/json, got {content_type or 'none'}",
                "Content-Type",
            )
    body = _parse(await request.body())
    if not isinstance(body, dict):
        raise RequestError("body: must be a JSON object", "body")
    return body


async def read_optional_object(request: Request) -> dict[str, Any]:
    """The body as a JSON object; {} if there is none."""
    return await read_object(request) if await request.body() else {}


def checked(model: type[B], body: dict[str, Any]) -> B:
    """Validates a body. Raises RequestError naming the first field at fault."""
    try:
        return model.model_validate(body)
    except pydantic.ValidationError as error:
        problem = error.errors(include_url=False, include_context=False)[0]
        path = _path(problem["loc"])
        if problem["type"] == "missing":
            text = "is required"
        elif problem["type"] == "extra_forbidden":
            text = "is not a known field"
        else:
            text = problem["msg"].removeprefix("Value error, ")
            text = text[:1].lower() + text[1:]
        raise RequestError(f"{path}: {text}", path) from None


def checked_at(model: type[B], body: dict[str, Any], path: str) -> B:
    """As `checked`, of a part of a body: the errors' paths start with `path`."""
    try:
        return checked(model, body)
    except RequestError as error:
        raise RequestError(f"{path}.{error}", f"{path}.{error.field}") from None


def _parse(raw: bytes) -> Any:
    try:
        return orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        problem = str(error)
    # NaN and Infinity are not JSON, but Python clients write them: say which field has one.
    try:
        lenient = json.loads(raw)
    except (ValueError, RecursionError):
        raise RequestError(f"body: not valid JSON: {problem}", "body") from None
    for path, value in _numbers(lenient, ()):
        if not math.isfinite(value):
            field = _path(path)
            raise RequestError(f"{field}: must be a finite number, got {value}", field)
    raise RequestError(f"body: not valid JSON: {problem}", "body")


def _numbers(
    value: Any, path: tuple[str | int, ...]
) -> Iterator[tuple[tuple[str | int, ...], float]]:
    if isinstance(value, float):
        yield path, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _numbers(item, (*path, key))
    elif isinstance(value, list):
        for i, item in enumerate(value):
            yield from _numbers(item, (*path, i))


def _path(parts: tuple[str | int, ...]) -> str:
    """("messages", 0, "role") -> "messages[0].role"."""
    path = ""
    for part in parts:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else part
    return path or "body"
