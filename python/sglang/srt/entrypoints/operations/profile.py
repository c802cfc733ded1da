"""torch's profiler in the scheduler's process."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response
from fastapi.responses import PlainTextResponse

from sglang.srt.entrypoints.engine_controls import PROFILE
from sglang.srt.entrypoints.json_body import read_optional_object, takes
from sglang.srt.entrypoints.server_state import state_of
from sglang.srt.messages import ControlReply

router = APIRouter()


@router.api_route("/start_profile", methods=["GET", "POST"])
@takes(PROFILE)
async def start_profile(request: Request) -> Response:
    fields = await read_optional_object(request)
    return _text(await state_of(request).controls.start_profile(fields))


@router.api_route("/stop_profile", methods=["GET", "POST"])
async def stop_profile(request: Request) -> Response:
    """Answers once the trace is written."""
    return _text(await state_of(request).controls.stop_profile())


def _text(reply: ControlReply) -> Response:
    return PlainTextResponse(reply.message + "\n", status_code=200 if reply.ok else 400)
