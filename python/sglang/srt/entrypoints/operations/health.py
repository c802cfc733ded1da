"""Whether the server is there, takes requests, and makes tokens."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response
from fastapi.responses import PlainTextResponse

from sglang.srt.entrypoints.server_state import Phase, ServerState, state_of
from sglang.srt.errors import SglangError

router = APIRouter()

_HEALTH_LIMIT_S = 20.0


@router.api_route("/", methods=["GET", "HEAD"])
async def root() -> Response:
    return PlainTextResponse("SGLang server is running")


@router.get("/ready")
@router.get("/ping")
async def ready(request: Request) -> Response:
    """200 while requests are taken; asks nobody."""
    return Response(status_code=200 if state_of(request).phase is Phase.SERVING else 503)


@router.get("/health")
@router.get("/health_generate")
async def health(request: Request) -> Response:
    """200 if the engine brings out any token within 20 s, given one to make."""
    state = state_of(request)
    if state.phase is not Phase.SERVING:
        return Response(status_code=503)
    try:
        alive = await _alive(state)
    except (SglangError, TimeoutError):
        alive = False
    return Response(status_code=200 if alive else 503)


async def _alive(state: ServerState) -> bool:
    if state.controls.working:  # if it hangs, the watchdog ends it
        return not state.manager.failed
    if state.controls.at_rest:  # by an operator's wish: that it answers must do
        return (await state.manager.engine_state(_HEALTH_LIMIT_S)).ok
    return await state.manager.probe(_HEALTH_LIMIT_S)
