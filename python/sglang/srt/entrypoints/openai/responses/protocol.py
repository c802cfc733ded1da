"""Bodies of the Responses API."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pydantic

from sglang.srt.entrypoints.fields import ABSENT, Neutral
from sglang.srt.entrypoints.value_types import Effort, OneOrManyTexts


class _Body(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", strict=True)


class TextPart(_Body):
    type: Literal["input_text", "output_text", "text", "refusal", "reasoning_text", "summary_text"]
    text: str
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None


class MessageItem(_Body):
    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: str | list[dict[str, Any]]
    id: str | None = None
    status: str | None = None
    phase: str | None = None


class FunctionCallItem(_Body):
    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str
    id: str | None = None
    status: str | None = None


class FunctionCallOutputItem(_Body):
    type: Literal["function_call_output"]
    call_id: str
    output: str | list[dict[str, Any]]
    id: str | None = None
    status: str | None = None


class ReasoningItem(_Body):
    type: Literal["reasoning"]
    id: str | None = None
    summary: list[dict[str, Any]] | None = None
    content: list[dict[str, Any]] | None = None
    encrypted_content: str | None = None
    status: str | None = None


class FunctionTool(_Body):
    type: Literal["function"]
    name: Annotated[str, pydantic.Field(min_length=1)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Reasoning(_Body):
    effort: Effort | None = None
    summary: str | None = None
    generate_summary: str | None = None


class TextOptions(_Body):
    format: dict[str, Any] | None = None
    verbosity: str | None = None


class ResponsesBody(_Body):
    input: str | list[dict[str, Any]]
    model: str | None = None
    instructions: str | None = None
    previous_response_id: str | None = None
    store: bool | None = None
    background: bool | None = None
    stream: bool | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    stop: OneOrManyTexts | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    reasoning: Reasoning | None = None
    text: TextOptions | None = None
    metadata: dict[str, Any] | None = None
    user: str | None = None
    extra_key: str | None = None
    cache_salt: str | None = None
    priority: int | None = None
    request_id: Annotated[str, pydantic.Field(pattern="^resp_")] | None = None
    slo: Any = None  # ServiceLevels says what it may be


# What never changes an answer.
INFORMATIONAL = frozenset(
    {
        "access_programs",
        "background_options",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "stream_options",
        "client_metadata",
    }
)
NEUTRAL: Neutral = {
    "conversation": (None,),
    "context_management": ABSENT,
    "image": (None,),
    "include": (None, [], "reasoning.encrypted_content"),  # thoughts are sent openly
    "max_tool_calls": (None,),
    "moderation": (None,),
    "prompt": (None,),
    "session_id": ABSENT,
    "top_logprobs": (None, 0),
    "truncation": (None, "disabled"),
}
