"""POST /api/chat and /api/generate, GET /api/tags, POST /api/show."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response

from sglang.srt.entrypoints.error_forms import JsonResponse, raise_if_update_refused
from sglang.srt.entrypoints.json_body import BodyForm, takes
from sglang.srt.entrypoints.ollama.answer import (
    Form,
    in_chat,
    in_generate,
    lines,
    timestamp,
    whole,
)
from sglang.srt.entrypoints.ollama.conversation import chat_body_of, message_of
from sglang.srt.entrypoints.ollama.protocol import (
    INFORMATIONAL,
    NEUTRAL,
    Asked,
    ChatAsked,
    GenerateAsked,
    ShowAsked,
)
from sglang.srt.entrypoints.openai.chat_plan import plan_chat
from sglang.srt.entrypoints.openai.protocol import ChatBody, ChatMessage
from sglang.srt.entrypoints.openai.sampling import openai_names
from sglang.srt.entrypoints.server_state import ServerState, state_of
from sglang.srt.entrypoints.streaming import EventStream, begin, unless_client_leaves

router = APIRouter()

_CHAT = BodyForm(ChatAsked, NEUTRAL, INFORMATIONAL)
_GENERATE = BodyForm(GenerateAsked, NEUTRAL, INFORMATIONAL)
_SHOW = BodyForm(ShowAsked)


@router.post("/api/chat")
@takes(_CHAT)
async def chat(request: Request) -> Response:
    body = await _CHAT.read(request)
    messages = [message_of(message) for message in body.messages]
    return await _answered(request, body, chat_body_of(body, messages, body.tools), in_chat)


@router.post("/api/generate")
@takes(_GENERATE)
async def generate(request: Request) -> Response:
    body = await _GENERATE.read(request)
    state = state_of(request)
    messages = [ChatMessage(role="user", content=body.prompt)]
    if body.system:
        messages.insert(0, ChatMessage(role="system", content=body.system))
    asked = chat_body_of(body, messages)
    if body.raw:
        [asked.input_ids] = await state.manager.encoder.tokenize([body.prompt])
    return await _answered(request, body, asked, in_generate)


@router.get("/api/tags")
async def tags(request: Request) -> Response:
    state = state_of(request)
    card = {
        "name": state.args.model_name,
        "model": state.args.model_name,
        "modified_at": timestamp(state.created_unix_s),
        "size": 0,
        "digest": "",
        "details": _details(state),
    }
    return JsonResponse({"models": [card]})


@router.post("/api/show")
@takes(_SHOW)
async def show(request: Request) -> Response:
    state = state_of(request)
    await _SHOW.read(request)
    kind = state.model.model_type
    template = getattr(state.model.tokenizer, "chat_template", None)
    info = {"general.architecture": kind, f"{kind}.context_length": state.model.context_length}
    capabilities = ["completion"]
    if state.args.tool_call_parser is not None:
        capabilities.append("tools")
    if state.args.reasoning_parser is not None:
        capabilities.append("thinking")
    return JsonResponse(
        {
            "template": template if isinstance(template, str) else "",
            "modified_at": timestamp(state.created_unix_s),
            "details": _details(state),
            "model_info": info,
            "capabilities": capabilities,
        }
    )


async def _answered(request: Request, body: Asked, asked: ChatBody, form: Form) -> Response:
    state = state_of(request)
    model = body.model or state.args.model_name  # names have tags here, as in "qwen3:latest"
    streams = body.stream is not False
    with openai_names("num_predict", repetition_penalty="repeat_penalty", response_format="format"):
        plan = plan_chat(asked, state)
        updates = state.manager.generate([plan.prompt], stream=streams)
        if not streams:
            answer = whole(updates, plan, model, form)
            return JsonResponse(await unless_client_leaves(request, answer))
        updates = await begin(request, updates, raise_if_update_refused)
        return EventStream(lines(updates, plan, model, form), "application/x-ndjson")


def _details(state: ServerState) -> dict[str, Any]:
    family = state.model.model_type
    return {
        "parent_model": "",
        "format": state.args.load_format,
        "family": family,
        "families": [family],
        "parameter_size": "",
        "quantization_level": "",
    }
