"""A Responses request as the chat request that means the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pydantic

from sglang.srt.entrypoints.json_body import checked_at
from sglang.srt.entrypoints.openai.protocol import (
    CalledFunction,
    ChatBody,
    ChatMessage,
    Function,
    MessageToolCall,
    Tool,
)
from sglang.srt.entrypoints.openai.responses.protocol import (
    FunctionCallItem,
    FunctionCallOutputItem,
    FunctionTool,
    MessageItem,
    ReasoningItem,
    ResponsesBody,
    TextPart,
)
from sglang.srt.errors import RequestError

_ITEMS: dict[str, type[pydantic.BaseModel]] = {
    "message": MessageItem,
    "function_call": FunctionCallItem,
    "function_call_output": FunctionCallOutputItem,
    "reasoning": ReasoningItem,
}


def chat_body_of(body: ResponsesBody, messages: Sequence[ChatMessage]) -> ChatBody:
    """messages: the conversation, this request's input included."""
    head = [ChatMessage(role="system", content=body.instructions)] if body.instructions else []
    return ChatBody(
        messages=[*head, *messages],
        max_tokens=body.max_output_tokens,
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=body.top_k,
        min_p=body.min_p,
        frequency_penalty=body.frequency_penalty,
        presence_penalty=body.presence_penalty,
        repetition_penalty=body.repetition_penalty,
        stop=body.stop,
        tools=[_tool(tool, f"tools[{i}]") for i, tool in enumerate(body.tools or ())],
        tool_choice=_tool_choice(body.tool_choice),
        parallel_tool_calls=body.parallel_tool_calls,
        reasoning_effort=body.reasoning.effort if body.reasoning else None,
        response_format=_response_format(body),
        extra_key=body.extra_key,
        cache_salt=body.cache_salt,
        priority=body.priority or None,  # 0 is this API's word for none
        slo=body.slo,
    )


def messages_of(given: str | list[dict[str, Any]]) -> list[ChatMessage]:
    """The input as messages. Raises RequestError naming the item at fault.

    Thoughts and calls that stand side by side are one message of the assistant's.
    """
    if isinstance(given, str):
        return [ChatMessage(role="user", content=given)]
    messages: list[ChatMessage] = []
    for i, raw in enumerate(given):
        path = f"input[{i}]"
        kind = raw.get("type", "message")
        if kind not in _ITEMS:
            field = f"{path}.type"
            raise RequestError(f"{field}: {kind!r} is not one of {', '.join(_ITEMS)}", field)
        item = checked_at(_ITEMS[kind], raw, path)
        match item:
            case MessageItem(role="assistant"):
                turn = _assistant_turn(messages)
                turn.content = f"{turn.content or ''}{_text(item.content, path)}"
            case MessageItem():
                messages.append(ChatMessage(role=item.role, content=_text(item.content, path)))
            case FunctionCallItem():
                call = MessageToolCall(
                    id=item.call_id,
                    function=CalledFunction(name=item.name, arguments=item.arguments),
                )
                turn = _assistant_turn(messages)
                turn.tool_calls = [*(turn.tool_calls or ()), call]
            case FunctionCallOutputItem():
                output = _text(item.output, path)
                messages.append(ChatMessage(role="tool", tool_call_id=item.call_id, content=output))
            case ReasoningItem():
                turn = _assistant_turn(messages)
                turn.reasoning_content = _text(item.content or item.summary or [], path)
    return messages


def _assistant_turn(messages: list[ChatMessage]) -> ChatMessage:
    if not messages or messages[-1].role != "assistant":
        messages.append(ChatMessage(role="assistant"))
    return messages[-1]


def _text(content: str | list[dict[str, Any]], path: str) -> str:
    if isinstance(content, str):
        return content
    parts = (checked_at(TextPart, part, f"{path}.content[{i}]") for i, part in enumerate(content))
    return "\n".join(part.text for part in parts)


def _tool(raw: dict[str, Any], path: str) -> Tool:
    if raw.get("type") != "function":
        field = f"{path}.type"
        raise RequestError(f"{field}: only function is supported by this server", field)
    tool = checked_at(FunctionTool, raw, path)
    return Tool(function=Function(**tool.model_dump(exclude={"type"})))


def _tool_choice(choice: Any) -> Any:
    """Names a function as chat completions do."""
    match choice:
        case {"type": "function", "name": str(name)}:
            return {"type": "function", "function": {"name": name}}
        case _:
            return choice


def _response_format(body: ResponsesBody) -> dict[str, Any] | None:
    given = body.text.format if body.text is not None else None
    if given is None or given.get("type") != "json_schema":
        return given
    return {"type": "json_schema", "json_schema": {k: v for k, v in given.items() if k != "type"}}
