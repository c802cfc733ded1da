"""/openapi.json: what each endpoint takes and which statuses it answers with.

Handlers read their bodies themselves, so FastAPI knows of none; they say which form they take (see
json_body). A requestBody in a route's openapi_extra goes first.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import msgspec
from fastapi import FastAPI, routing
from fastapi.openapi.utils import get_openapi

from sglang.srt.entrypoints.json_body import BodyForm, form_of
from sglang.srt.sampling_params import SamplingParams

_REFERENCE = "#/components/schemas/{model}"
_NOT_A_WORD = re.compile(r"\W+")
_STATUSES = {
    "200": "OK; with `stream` a text/event-stream that ends with [DONE]",
    "400": "A field, header or value that cannot be served; the message names it",
    "401": "The key of --api-key is missing or wrong",
    "404": "Nothing has this name",
    "499": "The client left before its answer",
    "500": "A fault of the server",
    "503": "No room, or not serving: try again later",
    "504": "The engine did not answer in time",
}


@dataclass(frozen=True, slots=True)
class Handler:
    """path: with its parameters in braces, without their converters."""

    path: str
    methods: frozenset[str]
    endpoint: Callable[..., Any]


def handlers(app: FastAPI) -> Iterator[Handler]:
    """Every HTTP endpoint of the app, those of included routers too."""
    # The routes themselves in older versions of FastAPI, which have no other.
    flatten: Callable[..., Iterable[Any]] = getattr(routing, "iter_route_contexts", list)
    for route in flatten(app.routes):
        if getattr(route, "methods", None) and route.endpoint is not None:
            yield Handler(route.path_format, frozenset(route.methods), route.endpoint)


def query(name: str, kind: str, text: str) -> dict[str, Any]:
    """openapi_extra of a route whose handler reads one query parameter; kind is a JSON type."""
    parameter = {"name": name, "in": "query", "schema": {"type": kind}, "description": text}
    return {"parameters": [parameter]}


def describe(app: FastAPI) -> None:
    """Makes app.openapi() tell of bodies and statuses. The document is made once, when asked."""

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _document(app)
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]


def schema_of(form: BodyForm[Any]) -> dict[str, Any]:
    """JSON schema of the whole body, with the fields of `neutral` and `informational`."""
    schema: dict[str, Any] = form.model.model_json_schema(ref_template=_REFERENCE)
    properties = schema.setdefault("properties", {})
    for name, values in form.neutral.items():
        one = {"enum": list(values)}
        several = {"type": "array", "items": one}
        properties[name] = {"anyOf": [one, several], "description": "Not supported: only so."}
    for name in sorted(form.informational):
        properties[name] = {"description": "A note of the client's: changes nothing."}
    if "sampling_params" in properties:
        properties["sampling_params"] = _one_or_many(_sampling_schema())
    return schema


def _document(app: FastAPI) -> dict[str, Any]:
    with warnings.catch_warnings():
        # FastAPI's ids are the same for two methods of one handler; ours replace them below.
        warnings.filterwarnings("ignore", "Duplicate Operation ID")
        document = get_openapi(title=app.title, version=app.version, routes=app.routes)
    components = document.setdefault("components", {}).setdefault("schemas", {})
    for route in handlers(app):
        if route.path not in document["paths"]:
            continue
        body = _request_body(route.endpoint, components)
        for method in route.methods & {name.upper() for name in document["paths"][route.path]}:
            operation = document["paths"][route.path][method.lower()]
            operation["operationId"] = f"{method.lower()}{_NOT_A_WORD.sub('_', route.path)}"
            operation["responses"] = {
                status: {"description": text} for status, text in _STATUSES.items()
            }
            if body is not None and method in ("POST", "PUT", "PATCH"):
                operation.setdefault("requestBody", body)
    return document


def _request_body(
    endpoint: Callable[..., Any], components: dict[str, Any]
) -> dict[str, Any] | None:
    form = form_of(endpoint)
    if form is None:
        return None
    schema = schema_of(form)
    components.update(schema.pop("$defs", {}))
    return {"required": not form.optional, "content": {"application/json": {"schema": schema}}}


def _sampling_schema() -> dict[str, Any]:
    _, definitions = msgspec.json.schema_components([SamplingParams])
    properties = definitions[SamplingParams.__name__]["properties"]
    # Null stands for the default, whatever the field.
    nullable = {
        field: {"anyOf": [{k: v for k, v in kind.items() if k != "default"}, {"type": "null"}]}
        for field, kind in properties.items()
    }
    nullable["stop"]["anyOf"].append({"type": "string"})
    return {"type": "object", "properties": nullable}


def _one_or_many(schema: dict[str, Any]) -> dict[str, Any]:
    return {"anyOf": [schema, {"type": "array", "items": schema}, {"type": "null"}]}
