"""GET /metrics, part of the app with --enable-metrics only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import APIRouter, Request, Response

from sglang.srt.entrypoints.server_state import ServerState, state_of
from sglang.srt.errors import SglangError
from sglang.srt.observability.cpu_time import cpu_seconds
from sglang.srt.observability.http_traffic import HttpTraffic
from sglang.srt.observability.prometheus import ServerFacts, exposition

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
        server=_server_facts(state, request.app.state.traffic),
        accept=request.headers.get("accept", ""),
    )
    return Response(body, media_type=content_type)


def _server_facts(state: ServerState, traffic: HttpTraffic) -> ServerFacts:
    pool_tokens = state.engine_info.get("max_total_num_tokens")
    page = state.args.page_size
    return ServerFacts(
        context_len=state.model.context_length,
        page_size=page,
        num_pages=None if pool_tokens is None else pool_tokens // page,
        startup_s=state.startup_s,
        cpu_s=cpu_seconds(),
        traffic=traffic,
    )


async def _engine_state(state: ServerState) -> Mapping[str, Any]:
    try:
        return (await state.manager.engine_state(_STATE_LIMIT_S)).data
    except (SglangError, TimeoutError):
        return {}
