"""The shapes in which SGLang reports errors, and which exception gets which.

native     {"error": {"message": ...}}
flat       {"object": "error", "message": ..., "type": ..., "param": ..., "code": 400}
nested     {"error": {"message": ..., "type": ..., "param": ..., "code": "model_not_found"}}
anthropic  {"type": "error", "error": {"type": ..., "message": ...}}
ollama     {"error": ...}
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import orjson
from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException

from sglang.srt.entrypoints.streaming import ClientLeft
from sglang.srt.errors import NotFound, Overloaded, RequestError
from sglang.srt.managers.answers import Update
from sglang.srt.managers.call import EngineFailed
from sglang.srt.messages import FinishReason

logger = logging.getLogger(__name__)

_CLIENT_CLOSED_REQUEST = 499
_FORMS_OF_THEIR_OWN = ("/v1/messages", "/v1/responses", "/api/")
_ANTHROPIC_KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


class Aborted(Exception):
    """The engine ended a request with a status of its own, e.g. 503 for a full queue."""

    def __init__(self, message: str, status_code: int) -> None:
        super().__init__(message)
        self.status_code = status_code


def raise_if_refused(finish: FinishReason | None) -> None:
    if finish is not None and finish.type == "abort" and finish.status_code is not None:
        raise Aborted(finish.message or "the request was aborted", finish.status_code)


def raise_if_update_refused(update: Update) -> None:
    raise_if_refused(update.answer.finish)


class JsonResponse(Response):
    """orjson, dates and dataclasses included; keys may be integers."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return orjson.dumps(content, option=orjson.OPT_NON_STR_KEYS, default=str)


def flat(message: str, kind: str, code: int, param: str | None = None) -> dict[str, Any]:
    return {"object": "error", "message": message, "type": kind, "param": param, "code": code}


def flat_of(error: Exception) -> dict[str, Any]:
    """Any error as the flat form."""
    match error:
        case RequestError():
            return flat(str(error), "BadRequestError", error.status_code, error.field)
        case Aborted() | Overloaded():
            kind = "BadRequestError" if error.status_code == 400 else str(error.status_code)
            return flat(str(error), kind, error.status_code)
        case EngineFailed():
            return flat(str(error), "InternalServerError", 500)
        case _:
            return flat("internal error", "InternalServerError", 500)


def native_event_of(error: Exception) -> dict[str, Any]:
    """An error inside a /generate stream."""
    code = flat_of(error)["code"]
    kind = "invalid_request_error" if code < 500 else "internal_server_error"
    return {"error": {"message": str(error), "type": kind, "code": code, "retryable": code == 503}}


def nested_of(flat: Mapping[str, Any], code: str | None = None) -> dict[str, Any]:
    """A flat error as /v1/responses and unknown models report it."""
    kind = "invalid_request_error" if flat["code"] < 500 else "server_error"
    inner = {"message": flat["message"], "type": kind, "param": flat["param"], "code": code}
    return {"error": inner}


def anthropic_of(flat: Mapping[str, Any]) -> dict[str, Any]:
    """A flat error in Anthropic's form; what our own failures say is not for clients."""
    status = flat["code"]
    kind = _ANTHROPIC_KINDS.get(status, "invalid_request_error" if status < 500 else "api_error")
    message = "internal server error" if kind == "api_error" else flat["message"]
    return {"type": "error", "error": {"type": kind, "message": message}}


def form_for(path: str, flat: Mapping[str, Any]) -> dict[str, Any]:
    """A flat error in the form of the API that the path belongs to."""
    if path.startswith("/v1/messages"):
        return anthropic_of(flat)
    if path.startswith("/v1/responses"):
        return nested_of(flat)
    if path.startswith("/api/"):
        return {"error": flat["message"]}
    return dict(flat)


def install(app: FastAPI) -> None:
    """Gives every error its documented form."""
    app.exception_handler(RequestError)(_bad_request)
    app.exception_handler(HTTPException)(_http_error)
    for kind in (Aborted, Overloaded, EngineFailed):
        app.exception_handler(kind)(_engine_error)
    app.exception_handler(TimeoutError)(_timeout)
    app.exception_handler(ClientLeft)(_client_left)
    app.exception_handler(Exception)(_unexpected)


async def _bad_request(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    path, flat_body = request.url.path, flat_of(error)
    if isinstance(error, NotFound) and not path.startswith(("/v1/messages", "/api/")):
        body = nested_of(flat_body, f"{error.field}_not_found")
    elif path.startswith(_FORMS_OF_THEIR_OWN):
        body = form_for(path, flat_body)
    elif path.startswith("/v1/"):
        body = flat_body
    else:
        body = {"error": {"message": str(error)}}
    return JsonResponse(body, error.status_code)


async def _engine_error(request: Request, error: Exception) -> Response:
    body = flat_of(error)
    headers = {"retry-after": "1"} if body["code"] == 503 else None
    return JsonResponse(form_for(request.url.path, body), body["code"], headers)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    body = flat(str(error.detail), str(error.status_code), error.status_code)
    headers = dict(error.headers or {})
    return JsonResponse(form_for(request.url.path, body), error.status_code, headers)


async def _timeout(request: Request, error: Exception) -> Response:
    body = flat("the engine did not answer in time", "InternalServerError", 504)
    return JsonResponse(form_for(request.url.path, body), 504)


async def _client_left(request: Request, error: Exception) -> Response:
    return Response(status_code=_CLIENT_CLOSED_REQUEST)


async def _unexpected(request: Request, error: Exception) -> Response:
    logger.error("%s %s failed", request.method, request.url.path, exc_info=error)
    return JsonResponse(form_for(request.url.path, flat_of(error)), 500)
