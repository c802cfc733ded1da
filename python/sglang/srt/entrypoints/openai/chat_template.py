"""Messages to prompt text, by the model's chat template."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2

from sglang.srt.entrypoints.json_body import checked
from sglang.srt.entrypoints.openai.protocol import ChatMessage, TextPart
from sglang.srt.errors import RequestError


def render(
    tokenizer: Any | None,
    messages: Sequence[ChatMessage],
    *,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    variables: Mapping[str, Any] | None = None,
) -> str:
    """The prompt text, special tokens included. Raises RequestError naming the field at fault.

    continue_final_message: the prompt ends inside the last message, for the model to go on.
    variables: names that the template may read, e.g. enable_thinking.
    """
    if tokenizer is None:
        raise RequestError(
            "messages: this server runs with --skip-tokenizer-init and takes token ids only",
            "messages",
        )
    if not tokenizer.chat_template:
        raise RequestError(
            "messages: the model has no chat template; start the server with --chat-template",
            "messages",
        )
    if not messages:
        raise RequestError("messages: must hold at least one message", "messages")
    if continue_final_message and messages[-1].role != "assistant":
        raise RequestError(
            "continue_final_message: the last message must be the assistant's",
            "continue_final_message",
        )
    # A request's template variables must not replace arguments of the rendering itself.
    reserved = inspect.signature(tokenizer.apply_chat_template).parameters
    for name in variables or ():
        if name in reserved:
            field = "chat_template_kwargs"
            raise RequestError(f"{field}: {name} cannot be set by a request", field)
    plain = [_plain(message, f"messages[{i}]") for i, message in enumerate(messages)]
    try:
        text: str = tokenizer.apply_chat_template(
            plain,
            tokenize=False,
            add_generation_prompt=add_generation_prompt and not continue_final_message,
            continue_final_message=continue_final_message,
            **(variables or {}),
        )
    # A template may refuse messages with a text of its own, or trip over what it did not expect.
    except (jinja2.TemplateError, TypeError, ValueError, KeyError) as error:
        raise RequestError(
            f"messages: the chat template refuses them: {error}", "messages"
        ) from None
    return text


def _plain(message: ChatMessage, path: str) -> dict[str, Any]:
    """A message as templates expect it: content is one string."""
    plain = message.model_dump(exclude_none=True)
    content = message.content
    if content is None and message.role != "assistant":
        raise RequestError(f"{path}.content: is required", f"{path}.content")
    if isinstance(content, list):
        plain["content"] = " ".join(
            _text(part, f"{path}.content[{i}]") for i, part in enumerate(content)
        )
    else:
        plain["content"] = content or ""
    return plain


def _text(part: dict[str, Any], path: str) -> str:
    kind = part.get("type")
    if isinstance(kind, str) and kind != "text":
        raise RequestError(
            f"{path}.type: {kind} is not supported by this server yet", f"{path}.type"
        )
    try:
        return checked(TextPart, part).text
    except RequestError as error:
        raise RequestError(f"{path}.{error}", f"{path}.{error.field}") from None
