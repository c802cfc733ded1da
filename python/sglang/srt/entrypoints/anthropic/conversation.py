"""An Anthropic conversation as the chat request that means the same."""

from __future__ import annotations

from typing import Any

import pydantic

from sglang.srt.entrypoints.anthropic.protocol import (
    CountTokensBody,
    InputMessage,
    MessagesBody,
    RedactedThinkingBlock,
    TextBlock,
    ThinkingBlock,
    ToolChoice,
    ToolResultBlock,
    ToolUseBlock,
)
from sglang.srt.entrypoints.json_body import checked_at
from sglang.srt.entrypoints.openai.protocol import (
    CalledFunction,
    ChatBody,
    ChatMessage,
    Function,
    MessageToolCall,
    Tool,
)
from sglang.srt.errors import RequestError

_USER_BLOCKS: dict[str, type[pydantic.BaseModel]] = {
    "text": TextBlock,
    "tool_result": ToolResultBlock,
}
_ASSISTANT_BLOCKS: dict[str, type[pydantic.BaseModel]] = {
    "text": TextBlock,
    "thinking": ThinkingBlock,
    "redacted_thinking": RedactedThinkingBlock,
    "tool_use": ToolUseBlock,
}


def chat_body_of(body: CountTokensBody) -> ChatBody:
    """Raises RequestError naming the block at fault.

    A conversation that ends with the assistant's text is one for the model to go on with.
    """
    chat = ChatBody(messages=_messages(body))
    last = chat.messages[-1] if chat.messages else None
    chat.continue_final_message = (
        last is not None and last.role == "assistant" and not last.tool_calls
    )
    chat.tools = [
        Tool(
            function=Function(
                name=tool.name,
                description=tool.description,
                parameters=tool.input_schema,
                strict=tool.strict,
            )
        )
        for tool in body.tools or ()
    ]
    _choose_tool(chat, body.tool_choice)
    if body.thinking is not None:
        thinks = body.thinking.type != "disabled"
        chat.chat_template_kwargs = {"enable_thinking": thinks, "thinking": thinks}
    if body.output_config is not None:
        chat.reasoning_effort = body.output_config.effort
        chat.response_format = _response_format(body.output_config.format)
    if isinstance(body, MessagesBody):
        chat.max_tokens = body.max_tokens
        chat.stop = body.stop_sequences
        chat.temperature, chat.top_p, chat.top_k = body.temperature, body.top_p, body.top_k
    return chat


def _choose_tool(chat: ChatBody, choice: ToolChoice | None) -> None:
    if choice is None:
        return
    chat.parallel_tool_calls = not choice.disable_parallel_tool_use
    match choice.type:
        case "any":
            chat.tool_choice = "required"
        case "tool":
            chat.tool_choice = {"type": "function", "function": {"name": choice.name or ""}}
        case other:
            chat.tool_choice = other


def _response_format(given: dict[str, Any] | None) -> dict[str, Any] | None:
    if given is None:
        return None
    if given.get("type") != "json_schema":
        field = "output_config.format.type"
        raise RequestError(f"{field}: must be json_schema", field)
    inner = {"name": "answer", "schema": given.get("schema")}
    return {"type": "json_schema", "json_schema": inner}


def _messages(body: CountTokensBody) -> list[ChatMessage]:
    messages = []
    system = body.system
    if isinstance(system, list):
        system = _joined_text(system, "system")
    if system:
        messages.append(ChatMessage(role="system", content=system))
    for i, message in enumerate(body.messages):
        path = f"messages[{i}].content"
        if isinstance(message.content, str):
            messages.append(ChatMessage(role=message.role, content=message.content))
        elif message.role == "assistant":
            messages.append(_assistant(message.content, path))
        elif message.role == "system":
            text = _joined_text(message.content, path)
            messages.append(ChatMessage(role="system", content=text))
        else:
            messages += _user(message, path)
    return messages


def _user(message: InputMessage, path: str) -> list[ChatMessage]:
    """Results of tools are messages of their own."""
    assert isinstance(message.content, list)
    messages: list[ChatMessage] = []
    for i, block in enumerate(_blocks(message.content, _USER_BLOCKS, path)):
        if isinstance(block, ToolResultBlock):
            text = _result_text(block, f"{path}[{i}].content")
            messages.append(ChatMessage(role="tool", tool_call_id=block.tool_use_id, content=text))
        elif isinstance(block, TextBlock):
            last = messages[-1] if messages else None
            if last is not None and last.role == "user":
                last.content = f"{last.content}\n{block.text}"
            else:
                messages.append(ChatMessage(role="user", content=block.text))
    return messages


def _result_text(block: ToolResultBlock, path: str) -> str:
    content = block.content or ""
    if isinstance(content, list):
        content = _joined_text(content, path)
    return f"Error: {content}" if block.is_error else content


def _joined_text(content: list[dict[str, Any]], path: str) -> str:
    blocks = _blocks(content, {"text": TextBlock}, path)
    return "\n".join(block.text for block in blocks if isinstance(block, TextBlock))


def _assistant(content: list[dict[str, Any]], path: str) -> ChatMessage:
    texts, thoughts, calls = [], [], []
    for block in _blocks(content, _ASSISTANT_BLOCKS, path):
        match block:
            case TextBlock():
                texts.append(block.text)
            case ThinkingBlock():
                thoughts.append(block.thinking)
            case ToolUseBlock():
                called = CalledFunction(name=block.name, arguments=block.input)
                calls.append(MessageToolCall(id=block.id, function=called))
    return ChatMessage(
        role="assistant",
        content="".join(texts),
        reasoning_content="\n".join(thoughts) or None,
        tool_calls=calls or None,
    )


def _blocks(
    content: list[dict[str, Any]], known: dict[str, type[pydantic.BaseModel]], path: str
) -> list[pydantic.BaseModel]:
    blocks = []
    for i, block in enumerate(content):
        kind = block.get("type")
        if kind not in known:
            field = f"{path}[{i}].type"
            raise RequestError(f"{field}: {kind!r} is not one of {', '.join(known)}", field)
        blocks.append(checked_at(known[kind], block, f"{path}[{i}]"))
    return blocks
