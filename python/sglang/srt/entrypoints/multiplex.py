"""Endpoints that show how prefill and decode shared the device, and that change how they do."""

from __future__ import annotations

import asyncio
import math

import orjson
import pydantic
from fastapi import APIRouter, Request, Response

from drift_scheduler.trace import trace_events
from drift_scheduler.window import as_json
from sglang.srt.entrypoints.error_forms import JsonResponse
from sglang.srt.entrypoints.json_body import BodyForm, takes
from sglang.srt.entrypoints.openapi import query
from sglang.srt.entrypoints.server_state import ServerState, state_of
from sglang.srt.errors import RequestError

router = APIRouter(prefix="/pd_multiplex")

DEFAULT_SECONDS = 10.0
_SECONDS = query("seconds", "number", "How far to look back.")


@router.get("/timeline", openapi_extra=_SECONDS)
async def timeline(request: Request) -> Response:
    """Runs of both lanes and samples of the queue in the last `seconds`."""
    state = state_of(request)
    window = await state.manager.timeline(_seconds(request))
    totals = (await state.manager.engine_state()).data["pd_multiplex"]
    # Thousands of runs: in a thread, for this loop hands out tokens.
    return await asyncio.to_thread(lambda: _json({**as_json(window), "totals": totals}))


@router.get("/trace", openapi_extra=_SECONDS)
async def trace(request: Request) -> Response:
    """The same window for ui.perfetto.dev."""
    window = await state_of(request).manager.timeline(_seconds(request))
    return await asyncio.to_thread(lambda: _json(trace_events(window)))


class PolicyBody(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", strict=True)

    policy: str


@router.get("/policy")
async def policy(request: Request) -> Response:
    """The policy that decides at present."""
    return await _current_policy(_multiplexing(request))


_POLICY = BodyForm(PolicyBody)


@router.post("/policy")
@takes(_POLICY)
async def set_policy(request: Request) -> Response:
    """Switches it between two turns; what is in flight goes on."""
    state = _multiplexing(request)
    body = await _POLICY.read(request)
    await state.manager.set_policy(body.policy)
    return await _current_policy(state)


async def _current_policy(state: ServerState) -> Response:
    engine = await state.manager.engine_state()
    return JsonResponse({"policy": engine.data["pd_multiplex"]["policy"]})


def _multiplexing(request: Request) -> ServerState:
    state = state_of(request)
    if not state.args.enable_pdmux:
        raise RequestError("policy: the server was started without --enable-pd-multiplex", "policy")
    return state


def _seconds(request: Request) -> float:
    text = request.query_params.get("seconds")
    if text is None:
        return DEFAULT_SECONDS
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise RequestError(
            f"seconds: must be a positive number of seconds, got {text!r}", "seconds"
        )
    return value


def _json(content: object) -> Response:
    return Response(orjson.dumps(content), media_type="application/json")
