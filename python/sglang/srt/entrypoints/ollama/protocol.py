"""Bodies of Ollama's API."""

from __future__ import annotations

from typing import Any, Literal

import pydantic

from sglang.srt.entrypoints.fields import ABSENT, Neutral
from sglang.srt.entrypoints.openai.protocol import Tool

NEUTRAL: Neutral = {
    "images": ABSENT,
    "template": ABSENT,
    "context": ABSENT,
    "suffix": ABSENT,
    "logprobs": (None, False),
    "top_logprobs": (None, 0),
}
# Where the model stays is decided when the server starts.
INFORMATIONAL = frozenset({"keep_alive"})


class _Body(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", strict=True)


class Options(_Body):
    """num_ctx is the server's --context-length, whatever is asked; ignored by name."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    num_predict: int | None = None
    stop: list[str] | None = None
    repeat_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    num_ctx: int | None = None


class Asked(_Body):
    model: str
    stream: bool | None = None
    options: Options | None = None
    format: Literal["json", ""] | dict[str, Any] | None = None
    think: bool | str | None = None


class OllamaFunction(_Body):
    name: str
    arguments: dict[str, Any] = {}
    index: int | None = None


class OllamaToolCall(_Body):
    function: OllamaFunction
    id: str | None = None
    type: str | None = None


class OllamaMessage(_Body):
    role: Literal["system", "user", "assistant", "tool"]
    content: str = ""
    thinking: str | None = None
    tool_calls: list[OllamaToolCall] | None = None
    tool_name: str | None = None
    tool_call_id: str | None = None
    images: None = None


class ChatAsked(Asked):
    messages: list[OllamaMessage]
    tools: list[Tool] | None = None


class GenerateAsked(Asked):
    prompt: str
    system: str | None = None
    raw: bool | None = None


class ShowAsked(_Body):
    model: str | None = None
    name: str | None = None
    verbose: bool | None = None
