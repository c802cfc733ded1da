"""The weights that are served, and what they are called."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from sglang.srt.entrypoints.engine_controls import UPDATE, VERSION, WEIGHTS
from sglang.srt.entrypoints.error_forms import JsonResponse
from sglang.srt.entrypoints.json_body import read_object, read_optional_object, takes
from sglang.srt.entrypoints.operations.outcome import outcome
from sglang.srt.entrypoints.server_state import state_of

router = APIRouter()


@router.post("/update_weights_from_disk")
@takes(UPDATE)
async def update_weights_from_disk(request: Request) -> Response:
    fields = await read_object(request)
    return outcome(await state_of(request).controls.update_weights(fields))


@router.post("/update_weight_version")
@takes(VERSION)
async def update_weight_version(request: Request) -> Response:
    fields = await read_object(request)
    version = await state_of(request).controls.update_weight_version(fields)
    message = f"Weight version updated to {version}"
    return JsonResponse({"success": True, "message": message, "new_version": version})


@router.get("/get_weight_version")
@router.get("/weight_version")
async def weight_version(request: Request) -> Response:
    return JsonResponse({"weight_version": state_of(request).manager.weight_version})


@router.api_route("/get_weights_by_name", methods=["GET", "POST"])
@takes(WEIGHTS)
async def get_weights_by_name(request: Request) -> Response:
    """The first rows of a parameter."""
    fields = await read_optional_object(request)
    return JsonResponse(await state_of(request).controls.get_weights(fields))
