"""/tokenize and /detokenize, with and without /v1."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response

from sglang.srt.entrypoints.error_forms import JsonResponse
from sglang.srt.entrypoints.json_body import BodyForm, takes
from sglang.srt.entrypoints.openai.chat_template import render, template_variables
from sglang.srt.entrypoints.openai.protocol import DetokenizeBody, TokenizeBody
from sglang.srt.entrypoints.openai.reply import model_name
from sglang.srt.entrypoints.openai.tools import template_tools
from sglang.srt.entrypoints.server_state import state_of
from sglang.srt.entrypoints.value_types import is_batch_of_ids
from sglang.srt.errors import RequestError

router = APIRouter()


_TOKENIZE = BodyForm(TokenizeBody)
_DETOKENIZE = BodyForm(DetokenizeBody)


@router.post("/tokenize")
@router.post("/v1/tokenize")
@takes(_TOKENIZE)
async def tokenize(request: Request) -> Response:
    state = state_of(request)
    body = await _TOKENIZE.read(request)
    model_name(body.model, state)
    if (body.prompt is None) == (body.messages is None):
        raise RequestError("prompt: give exactly one of prompt and messages", "prompt")
    encoder = state.manager.encoder
    tokens: list[Any]
    count: int | list[int]
    if body.messages is not None:
        text = render(
            state.model.tokenizer,
            body.messages,
            add_generation_prompt=body.add_generation_prompt,
            continue_final_message=body.continue_final_message,
            variables=template_variables(body.chat_template_kwargs, body.reasoning_effort),
            tools=template_tools(body.tools, body.tool_choice),
        )
        [tokens] = await encoder.tokenize([text], add_special_tokens=False)
        count = len(tokens)
    elif isinstance(body.prompt, str):
        [tokens] = await encoder.tokenize([body.prompt], body.add_special_tokens)
        count = len(tokens)
    else:
        tokens = await encoder.tokenize(body.prompt or [], body.add_special_tokens)
        count = [len(row) for row in tokens]
    return JsonResponse(
        {"tokens": tokens, "count": count, "max_model_len": state.model.context_length}
    )


@router.post("/detokenize")
@router.post("/v1/detokenize")
@takes(_DETOKENIZE)
async def detokenize(request: Request) -> Response:
    state = state_of(request)
    body = await _DETOKENIZE.read(request)
    model_name(body.model, state)
    decode = state.manager.encoder.decode
    skip = body.skip_special_tokens
    tokens: Any = body.tokens
    if is_batch_of_ids(tokens):
        return JsonResponse({"text": [decode(row, skip, field="tokens") for row in tokens]})
    return JsonResponse({"text": decode(tokens, skip, field="tokens")})
