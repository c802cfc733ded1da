"""POST /v1/messages and /v1/messages/count_tokens."""

from __future__ import annotations

from uuid import uuid4

from fastapi import APIRouter, Request, Response

from sglang.srt.entrypoints.anthropic.answer import MessageForm
from sglang.srt.entrypoints.anthropic.conversation import chat_body_of
from sglang.srt.entrypoints.anthropic.protocol import (
    INFORMATIONAL,
    NEUTRAL,
    CountTokensBody,
    MessagesBody,
)
from sglang.srt.entrypoints.error_forms import JsonResponse, raise_if_update_refused
from sglang.srt.entrypoints.json_body import BodyForm, takes
from sglang.srt.entrypoints.openai.chat_plan import plan_chat
from sglang.srt.entrypoints.openai.reply import model_name
from sglang.srt.entrypoints.openai.sampling import openai_names
from sglang.srt.entrypoints.server_state import state_of
from sglang.srt.entrypoints.streaming import EventStream, begin, unless_client_leaves

router = APIRouter()

_MESSAGES = BodyForm(MessagesBody, NEUTRAL, INFORMATIONAL)
_COUNT_TOKENS = BodyForm(CountTokensBody, NEUTRAL, INFORMATIONAL)


@router.post("/v1/messages")
@takes(_MESSAGES)
async def messages(request: Request) -> Response:
    state = state_of(request)
    body = await _MESSAGES.read(request, typed=True)
    model = model_name(body.model, state)
    with openai_names(stop="stop_sequences", response_format="output_config.format"):
        plan = plan_chat(chat_body_of(body), state)
        form = MessageForm(plan, model, state.args.enable_cache_report)
        rid = f"msg_{uuid4().hex[:24]}"
        updates = state.manager.generate([plan.prompt], rid=rid, stream=bool(body.stream))
        if body.stream:
            updates = await begin(request, updates, raise_if_update_refused)
            return EventStream(form.events(updates))
        return JsonResponse(await unless_client_leaves(request, form.whole(updates)))


@router.post("/v1/messages/count_tokens")
@takes(_COUNT_TOKENS)
async def count_tokens(request: Request) -> Response:
    state = state_of(request)
    body = await _COUNT_TOKENS.read(request, typed=True)
    model_name(body.model, state)
    plan = plan_chat(chat_body_of(body), state)
    assert plan.prompt.text is not None
    [ids] = await state.manager.encoder.tokenize([plan.prompt.text], add_special_tokens=False)
    return JsonResponse({"input_tokens": len(ids)})
