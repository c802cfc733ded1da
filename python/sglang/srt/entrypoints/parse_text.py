"""POST /parse_function_call and /separate_reasoning: what a text that a model wrote holds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import pydantic
from fastapi import APIRouter, Request, Response

from sglang.srt.entrypoints.error_forms import JsonResponse
from sglang.srt.entrypoints.json_body import BodyForm, takes
from sglang.srt.entrypoints.openai.protocol import Tool
from sglang.srt.entrypoints.server_state import state_of
from sglang.srt.errors import RequestError
from sglang.srt.parsers.reasoning import REASONING_PARSERS
from sglang.srt.parsers.tool_calls import TOOL_CALL_PARSERS

router = APIRouter()

P = TypeVar("P")


class _Body(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", strict=True)


class ParseFunctionCallBody(_Body):
    text: str
    tools: list[Tool] = []
    tool_call_parser: str | None = None


class SeparateReasoningBody(_Body):
    text: str
    reasoning_parser: str | None = None


_FUNCTION_CALL = BodyForm(ParseFunctionCallBody)
_REASONING = BodyForm(SeparateReasoningBody)


@router.post("/parse_function_call")
@takes(_FUNCTION_CALL)
async def parse_function_call(request: Request) -> Response:
    body = await _FUNCTION_CALL.read(request)
    default = state_of(request).args.tool_call_parser
    parser = _named("tool_call_parser", body.tool_call_parser or default, TOOL_CALL_PARSERS)
    message = parser.parse(body.text, [tool.function.name for tool in body.tools])
    calls = [
        {"tool_index": i, "name": call.name, "parameters": call.arguments}
        for i, call in enumerate(message.calls)
    ]
    return JsonResponse({"normal_text": message.text, "calls": calls})


@router.post("/separate_reasoning")
@takes(_REASONING)
async def separate_reasoning(request: Request) -> Response:
    body = await _REASONING.read(request)
    default = state_of(request).args.reasoning_parser
    parser = _named("reasoning_parser", body.reasoning_parser or default, REASONING_PARSERS)
    message = parser.parse(body.text)
    return JsonResponse({"reasoning_text": message.reasoning, "text": message.text})


def _named(field: str, name: Any, known: Mapping[str, P]) -> P:
    if name not in known:
        given = "give" if name is None else f"{name} is not"
        raise RequestError(f"{field}: {given} one of {', '.join(known)}", field)
    return known[name]
