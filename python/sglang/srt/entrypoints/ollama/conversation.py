"""An Ollama request as the chat request that means the same."""

from __future__ import annotations

from sglang.srt.entrypoints.ollama.protocol import Asked, OllamaMessage, Options
from sglang.srt.entrypoints.openai.protocol import (
    CalledFunction,
    ChatBody,
    ChatMessage,
    MessageToolCall,
    Tool,
)


def message_of(message: OllamaMessage) -> ChatMessage:
    calls = [
        MessageToolCall(
            id=call.id,
            function=CalledFunction(name=call.function.name, arguments=call.function.arguments),
        )
        for call in message.tool_calls or ()
    ]
    return ChatMessage(
        role=message.role,
        content=message.content,
        name=message.tool_name,
        tool_call_id=message.tool_call_id,
        reasoning_content=message.thinking,
        tool_calls=calls or None,
    )


def chat_body_of(
    body: Asked, messages: list[ChatMessage], tools: list[Tool] | None = None
) -> ChatBody:
    options = body.options or Options()
    predict = options.num_predict
    chat = ChatBody(
        messages=messages,
        tools=tools,
        max_tokens=None if predict is None or predict < 0 else predict,
        temperature=options.temperature,
        top_p=options.top_p,
        top_k=-1 if options.top_k == 0 else options.top_k,
        min_p=options.min_p,
        seed=options.seed,
        stop=options.stop,
        repetition_penalty=options.repeat_penalty,
        presence_penalty=options.presence_penalty,
        frequency_penalty=options.frequency_penalty,
    )
    if isinstance(body.think, str):
        chat.reasoning_effort = body.think
    elif body.think is not None:
        chat.chat_template_kwargs = {"enable_thinking": body.think, "thinking": body.think}
    if body.format == "json":
        chat.response_format = {"type": "json_object"}
    elif isinstance(body.format, dict):
        inner = {"name": "answer", "schema": body.format}
        chat.response_format = {"type": "json_schema", "json_schema": inner}
    return chat
