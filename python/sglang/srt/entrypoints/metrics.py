"""GET /metrics, part of the app with --enable-metrics only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import APIRouter, Request, Response

from sglang.srt.entrypoints.server_state import ServerState, state_of
from sglang.srt.errors import SglangError
from sglang.srt.observability.prometheus import exposition

router = APIRouter()

_STATE_LIMIT_S = 2.0  # scrapers give up after ten


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """What is known; of an engine that does not answer, only what this process has counted."""
    state = state_of(request)
    requests = state.manager.metrics
    assert requests is not None, "the route is there without --enable-metrics"
    body, content_type = exposition(
        requests,
        await _engine_state(state),
        state.engine_info,
        model_name=state.args.model_name,
        accept=request.headers.get("accept", ""),
    )
    return Response(body, media_type=content_type)


async def _engine_state(state: ServerState) -> Mapping[str, Any]:
    try:
        return (await state.manager.engine_state(_STATE_LIMIT_S)).data
    except (SglangError, TimeoutError):
        return {}
