"""What is served, and how."""

from __future__ import annotations

import dataclasses
from typing import Any

from fastapi import APIRouter, Request, Response

from sglang.srt.entrypoints.error_forms import JsonResponse
from sglang.srt.entrypoints.server_state import ServerState, state_of
from sglang.version import __version__

router = APIRouter()

_SECRETS = ("api_key", "admin_api_key")


@router.get("/model_info")
@router.get("/get_model_info")
async def model_info(request: Request) -> Response:
    state = state_of(request)
    args, model = state.args, state.model
    return JsonResponse(
        {
            "model_path": state.controls.model_path,
            "served_model_name": args.model_name,
            "tokenizer_path": args.tokenizer,
            "is_generation": True,
            "preferred_sampling_params": args.preferred_sampling_params,
            "weight_version": state.manager.weight_version,
            "load_format": args.load_format,
            "reasoning_parser": args.reasoning_parser,
            "tool_call_parser": args.tool_call_parser,
            "disaggregation_mode": "null",
            "has_image_understanding": False,
            "has_audio_understanding": False,
            "model_type": model.model_type,
            "architectures": list(model.architectures),
        }
    )


@router.get("/server_info")
@router.get("/get_server_info")
async def get_server_info(request: Request) -> Response:
    return JsonResponse(await server_info(state_of(request)))


async def server_info(state: ServerState) -> dict[str, Any]:
    """Flags (secrets left out), what the engine said at start, and its present state."""
    flags = {k: v for k, v in dataclasses.asdict(state.args).items() if k not in _SECRETS}
    engine = await state.manager.engine_state()
    return {
        **flags,
        "model_path": state.controls.model_path,
        "weight_version": state.manager.weight_version,
        **state.engine_info,
        "startup_time": state.startup_s,
        "internal_states": [engine.data],
        "version": __version__,
    }
