"""Endpoints for whoever runs the server: health, information, cache, aborts."""

from __future__ import annotations

import dataclasses
import math

import pydantic
from fastapi import APIRouter, Request, Response
from fastapi.responses import PlainTextResponse

from sglang.srt.entrypoints.error_forms import JsonResponse
from sglang.srt.entrypoints.fields import Neutral, without_unsupported
from sglang.srt.entrypoints.json_body import checked, read_object
from sglang.srt.entrypoints.openapi import query
from sglang.srt.entrypoints.server_state import Phase, state_of
from sglang.srt.errors import RequestError, SglangError
from sglang.version import __version__

router = APIRouter()

_HEALTH_LIMIT_S = 20.0
_SECRETS = ("api_key",)
_ABORT_NEUTRAL: Neutral = {"finished_reason": (None,), "abort_message": (None, "")}


@router.get("/")
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
        alive = await state.manager.probe(_HEALTH_LIMIT_S)
    except SglangError:
        alive = False
    return Response(status_code=200 if alive else 503)


@router.get("/model_info")
@router.get("/get_model_info")
async def model_info(request: Request) -> Response:
    state = state_of(request)
    args, model = state.args, state.model
    return JsonResponse(
        {
            "model_path": args.model_path,
            "served_model_name": args.model_name,
            "tokenizer_path": args.tokenizer,
            "is_generation": True,
            "preferred_sampling_params": args.preferred_sampling_params,
            "weight_version": "default",
            "load_format": args.load_format,
            "reasoning_parser": None,
            "tool_call_parser": None,
            "disaggregation_mode": "null",
            "has_image_understanding": False,
            "has_audio_understanding": False,
            "model_type": model.model_type,
            "architectures": list(model.architectures),
        }
    )


@router.get("/server_info")
@router.get("/get_server_info")
async def server_info(request: Request) -> Response:
    """Flags (secrets left out), what the engine said at start, and its present state."""
    state = state_of(request)
    flags = {k: v for k, v in dataclasses.asdict(state.args).items() if k not in _SECRETS}
    engine = await state.manager.engine_state()
    return JsonResponse(
        {
            **flags,
            **state.engine_info,
            "startup_time": state.startup_s,
            "internal_states": [engine.data],
            "version": __version__,
        }
    )


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


@router.post("/abort_request")
async def abort_request(request: Request) -> Response:
    body = checked(AbortBody, without_unsupported(await read_object(request), _ABORT_NEUTRAL))
    state_of(request).manager.abort(body.rid, body.abort_all)
    return Response(status_code=200)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value >= 0):
        raise RequestError(f"timeout: must be a number of seconds, got {text!r}", "timeout")
    return value
