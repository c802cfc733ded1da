"""Messages to prompt text, by the model's chat template."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import orjson

from sglang.srt.entrypoints.json_body import checked_at
from sglang.srt.entrypoints.openai.protocol import ChatMessage, TextPart, ThinkingPart
from sglang.srt.errors import RequestError


def render(
    tokenizer: Any | None,
    messages: Sequence[ChatMessage],
    *,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    variables: Mapping[str, Any] | None = None,
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> str:
    """The prompt text, special tokens included. Raises RequestError naming the field at fault.

    continue_final_message: the prompt ends inside the last message, for the model to go on.
    variables: names that the template may read, e.g. enable_thinking.
    tools: as in the request, for templates that tell the model of them.
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
    if "developer" not in str(tokenizer.chat_template):  # templates skip roles they do not know
        for message in plain:
            if message["role"] == "developer":
                message["role"] = "system"
    try:
        text: str = tokenizer.apply_chat_template(
            plain,
            tokenize=False,
            add_generation_prompt=add_generation_prompt and not continue_final_message,
            continue_final_message=continue_final_message,
            tools=tools,
            **(variables or {}),
        )
    # A template may refuse messages with a text of its own, or trip over what it did not expect.
    except (jinja2.TemplateError, TypeError, ValueError, KeyError) as error:
        raise RequestError(
            f"messages: the chat template refuses them: {error}", "messages"
        ) from None
    return text


def template_variables(
    given: Mapping[str, Any] | None, effort: str | float | None
) -> dict[str, Any]:
    """chat_template_kwargs, and what reasoning_effort says unless they do."""
    variables = dict(given or {})
    if effort is not None:
        variables.setdefault("reasoning_effort", effort)
    if effort == "none":
        for name in ("enable_thinking", "thinking"):  # what templates call it
            variables.setdefault(name, False)
    return variables


def _plain(message: ChatMessage, path: str) -> dict[str, Any]:
    """A message as templates expect it: content is one string, arguments are objects."""
    plain = message.model_dump(exclude_none=True)
    content = message.content
    if content is None and message.role != "assistant":
        raise RequestError(f"{path}.content: is required", f"{path}.content")
    if isinstance(content, list):
        texts: list[str] = []
        thoughts: list[str] = []
        for i, part in enumerate(content):
            _read_part(part, f"{path}.content[{i}]", texts, thoughts)
        plain["content"] = " ".join(texts)
        if thoughts:
            plain.setdefault("reasoning_content", "\n".join(thoughts))
    else:
        plain["content"] = content or ""
    for call in plain.get("tool_calls", ()):
        call.pop("index", None)
        call["function"]["arguments"] = _arguments(call["function"].get("arguments"))
    return plain


def _arguments(given: str | dict[str, Any] | None) -> Any:
    """Templates write arguments as JSON themselves; text that is none stays what it is."""
    if not isinstance(given, str):
        return given or {}
    try:
        loaded = orjson.loads(given or "{}")
    except orjson.JSONDecodeError:
        return given
    return loaded if isinstance(loaded, dict) else given


def _read_part(part: dict[str, Any], path: str, texts: list[str], thoughts: list[str]) -> None:
    kind = part.get("type")
    if isinstance(kind, str) and kind not in ("text", "thinking", "reasoning"):
        raise RequestError(
            f"{path}.type: {kind} is not supported by this server yet", f"{path}.type"
        )
    if kind in ("thinking", "reasoning"):
        thinking = checked_at(ThinkingPart, part, path)
        thoughts.append(thinking.thinking or thinking.text or "")
    else:
        texts.append(checked_at(TextPart, part, path).text)
