"""GET /v1/models."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response

from sglang.srt.entrypoints.error_forms import JsonResponse
from sglang.srt.entrypoints.server_state import ServerState, state_of
from sglang.srt.errors import NotFound

router = APIRouter()


@router.get("/v1/models")
async def models(request: Request) -> Response:
    return JsonResponse({"object": "list", "data": [_card(state_of(request))]})


@router.get("/v1/models/{model_id:path}")
async def model(request: Request, model_id: str) -> Response:
    state = state_of(request)
    if model_id != state.args.model_name:
        raise NotFound(f"model: {model_id!r} does not exist", "model")
    return JsonResponse(_card(state))


def _card(state: ServerState) -> dict[str, Any]:
    return {
        "id": state.args.model_name,
        "object": "model",
        "created": state.created_unix_s,
        "owned_by": "sglang",
        "root": state.args.model_name,
        "parent": None,
        "max_model_len": state.model.context_length,
    }
