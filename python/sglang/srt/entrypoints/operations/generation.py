"""Requests in flight as a whole: the cache they leave, aborts, pauses."""

from __future__ import annotations

import math

import pydantic
from fastapi import APIRouter, Request, Response
from fastapi.responses import PlainTextResponse

from sglang.srt.entrypoints.engine_controls import CONTINUE, PAUSE
from sglang.srt.entrypoints.json_body import BodyForm, read_optional_object, takes
from sglang.srt.entrypoints.openapi import query
from sglang.srt.entrypoints.operations.outcome import outcome
from sglang.srt.entrypoints.server_state import state_of
from sglang.srt.errors import RequestError

router = APIRouter()


@router.api_route(
    "/flush_cache",
    methods=["GET", "POST"],
    openapi_extra=query("timeout", "number", "Seconds to wait for the engine to be idle."),
)
async def flush_cache(request: Request) -> Response:
    timeout_s = _seconds(request.query_params.get("timeout", "0"))
    reply = await state_of(request).manager.flush_cache(timeout_s)
    text = reply.message or ("Cache flushed." if reply.ok else "Cache not flushed.")
    return PlainTextResponse(text + "\n", status_code=200 if reply.ok else 400)


class AbortBody(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", strict=True)

    rid: str = ""
    abort_all: bool = False


_ABORT = BodyForm(AbortBody, {"finished_reason": (None,), "abort_message": (None, "")})


@router.post("/abort_request")
@takes(_ABORT)
async def abort_request(request: Request) -> Response:
    body = await _ABORT.read(request)
    state_of(request).manager.abort(body.rid, body.abort_all)
    return Response(status_code=200)


@router.post("/pause_generation")
@takes(PAUSE)
async def pause_generation(request: Request) -> Response:
    """Answers once nothing is in flight. Requests that come meanwhile wait."""
    fields = await read_optional_object(request)
    return outcome(await state_of(request).controls.pause(fields), {"status": "ok"})


@router.post("/continue_generation")
@takes(CONTINUE)
async def continue_generation(request: Request) -> Response:
    fields = await read_optional_object(request)
    return outcome(await state_of(request).controls.resume(fields), {"status": "ok"})


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value >= 0):
        raise RequestError(f"timeout: must be a number of seconds, got {text!r}", "timeout")
    return value
