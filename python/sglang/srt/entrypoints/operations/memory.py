"""Memory that is given back for a while."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from sglang.srt.entrypoints.engine_controls import MEMORY
from sglang.srt.entrypoints.json_body import read_optional_object, takes
from sglang.srt.entrypoints.operations.outcome import outcome
from sglang.srt.entrypoints.server_state import state_of

router = APIRouter()


@router.api_route("/release_memory_occupation", methods=["GET", "POST"])
@takes(MEMORY)
async def release_memory_occupation(request: Request) -> Response:
    """Until it is resumed, requests get 503."""
    fields = await read_optional_object(request)
    return outcome(await state_of(request).controls.release_memory(fields))


@router.api_route("/resume_memory_occupation", methods=["GET", "POST"])
@takes(MEMORY)
async def resume_memory_occupation(request: Request) -> Response:
    fields = await read_optional_object(request)
    return outcome(await state_of(request).controls.resume_memory(fields))
