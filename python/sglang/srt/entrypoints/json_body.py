"""Request bodies: JSON objects, whose errors say where."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import orjson
import pydantic
from fastapi import Request

from sglang.srt.entrypoints.fields import Neutral, without_unsupported
from sglang.srt.errors import RequestError

B = TypeVar("B", bound=pydantic.BaseModel)
H = TypeVar("H", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class BodyForm(Generic[B]):
    """What a body may hold. model: the fields that are acted on. neutral, informational: others
    that clients send, see `fields`. optional: whether none at all is as good as {}."""

    model: type[B]
    neutral: Neutral = field(default_factory=dict)
    informational: frozenset[str] = frozenset()
    optional: bool = False

    def of(self, fields: Mapping[str, Any]) -> B:
        """Raises RequestError naming the field at fault."""
        return checked(self.model, without_unsupported(fields, self.neutral, self.informational))

    async def read(self, request: Request, *, typed: bool = False) -> B:
        """A request's body, as `read_object` takes it."""
        read = read_optional_object if self.optional else read_object
        return self.of(await read(request, typed=typed))


def takes(form: BodyForm[Any]) -> Callable[[H], H]:
    """Of the handler that reads it: so /openapi.json tells of the body."""

    def mark(handler: H) -> H:
        handler.body_form = form  # type: ignore[attr-defined]
        return handler

    return mark


def form_of(handler: Callable[..., Any]) -> BodyForm[Any] | None:
    form: BodyForm[Any] | None = getattr(handler, "body_form", None)
    return form


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


async def read_optional_object(request: Request, *, typed: bool = False) -> dict[str, Any]:
    """The body as a JSON object; {} if there is none."""
    return await read_object(request, typed=typed) if await request.body() else {}


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
