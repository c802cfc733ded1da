"""POST /v1/responses, GET /v1/responses/{id}, POST /v1/responses/{id}/cancel."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from uuid import uuid4

from fastapi import APIRouter, Request, Response

from sglang.srt.entrypoints.error_forms import JsonResponse, raise_if_update_refused
from sglang.srt.entrypoints.json_body import BodyForm, takes
from sglang.srt.entrypoints.openai.chat_plan import plan_chat
from sglang.srt.entrypoints.openai.reply import model_name
from sglang.srt.entrypoints.openai.responses.conversation import chat_body_of, messages_of
from sglang.srt.entrypoints.openai.responses.protocol import (
    INFORMATIONAL,
    NEUTRAL,
    ResponsesBody,
)
from sglang.srt.entrypoints.openai.responses.run import ResponseRun
from sglang.srt.entrypoints.openai.responses.store import Stored
from sglang.srt.entrypoints.openai.sampling import openai_names
from sglang.srt.entrypoints.server_state import ServerState, state_of
from sglang.srt.entrypoints.streaming import EventStream, begin, unless_client_leaves
from sglang.srt.errors import RequestError

router = APIRouter()

_BODY = BodyForm(ResponsesBody, NEUTRAL, INFORMATIONAL)


@router.post("/v1/responses")
@takes(_BODY)
async def responses(request: Request) -> Response:
    state = state_of(request)
    body = await _BODY.read(request, typed=True)
    model_name(body.model, state)
    with openai_names("max_output_tokens", messages="input", response_format="text.format"):
        run = _run_of(body, state)
        if body.background:
            state.responses.put(run.stored)
            run.stored.task = asyncio.create_task(run.in_background())
            return JsonResponse(run.stored.response)
        updates = run.updates(stream=bool(body.stream))
        if body.stream:
            updates = await begin(request, updates, raise_if_update_refused)
            if body.store is not False:
                state.responses.put(run.stored)
            return EventStream(run.events(updates))
        await unless_client_leaves(request, run.whole(updates))
        if body.store is not False:
            state.responses.put(run.stored)
        return JsonResponse(run.stored.response)


@router.get("/v1/responses/{response_id}")
async def stored_response(request: Request, response_id: str) -> Response:
    if request.query_params.get("stream", "false") != "false":
        raise RequestError("stream: a stored response is not streamed again", "stream")
    return JsonResponse(state_of(request).responses.get(response_id).response)


@router.post("/v1/responses/{response_id}/cancel")
async def cancel_response(request: Request, response_id: str) -> Response:
    stored = state_of(request).responses.get(response_id)
    if stored.task is None:
        raise RequestError(
            "response_id: only a response made with background: true can be cancelled",
            "response_id",
        )
    stored.task.cancel()
    with suppress(asyncio.CancelledError):
        await asyncio.wait([stored.task])
    return JsonResponse(stored.response)


def _run_of(body: ResponsesBody, state: ServerState) -> ResponseRun:
    """Raises RequestError naming the field, with SamplingParams's names."""
    if body.background and body.stream:
        raise RequestError("background: cannot be combined with stream", "background")
    if body.background and body.store is False:
        raise RequestError("background: needs store, its result is fetched later", "background")
    response_id = body.request_id or f"resp_{uuid4().hex}"
    if response_id in state.responses:
        raise RequestError(f"request_id: {response_id!r} is in use", "request_id")
    earlier: Stored | None = None
    if body.previous_response_id is not None:
        earlier = state.responses.get(body.previous_response_id, "previous_response_id")
        if earlier.response["status"] in ("queued", "in_progress"):
            raise RequestError(
                "previous_response_id: that response is not complete yet", "previous_response_id"
            )
    conversation = [*(earlier.conversation if earlier else ()), *messages_of(body.input)]
    plan = plan_chat(chat_body_of(body, conversation), state)
    return ResponseRun(body, state, plan, response_id, conversation)
