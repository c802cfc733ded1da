"""Bodies of the Anthropic Messages API."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pydantic

from sglang.srt.entrypoints.fields import ABSENT, Neutral


class _Body(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", strict=True)


class _Block(_Body):
    cache_control: dict[str, Any] | None = None  # prefixes are cached without being told


class TextBlock(_Block):
    type: Literal["text"]
    text: str
    citations: list[Any] | None = None


class ThinkingBlock(_Block):
    type: Literal["thinking"]
    thinking: str
    signature: str | None = None


class RedactedThinkingBlock(_Block):
    type: Literal["redacted_thinking"]
    data: str


class ToolUseBlock(_Block):
    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]
    caller: dict[str, Any] | None = None
    toolset_name: str | None = None


class ToolResultBlock(_Block):
    type: Literal["tool_result"]
    tool_use_id: str
    content: str | list[dict[str, Any]] | None = None
    is_error: bool | None = None
    toolset_name: str | None = None


class InputMessage(_Body):
    role: Literal["user", "assistant", "system"]
    content: str | list[dict[str, Any]]


class Tool(_Block):
    type: Literal["custom"] | None = None
    name: Annotated[str, pydantic.Field(min_length=1)]
    description: str | None = None
    input_schema: dict[str, Any]
    strict: bool | None = None
    eager_input_streaming: bool | None = None  # arguments always come as they are written
    defer_loading: Literal[False] | None = None


class ToolChoice(_Body):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(_Body):
    """budget_tokens changes nothing: the model decides. Thoughts are sent as they are."""

    type: Literal["enabled", "disabled", "adaptive", "between_tools"]
    budget_tokens: int | None = None
    display: Literal["summarized"] | None = None


class OutputConfig(_Body):
    format: dict[str, Any] | None = None
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None


class CountTokensBody(_Body):
    """A conversation: what both endpoints have in common."""

    model: str
    messages: list[InputMessage]
    system: str | list[dict[str, Any]] | None = None
    tools: list[Tool] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None


class MessagesBody(CountTokensBody):
    max_tokens: Annotated[int, pydantic.Field(ge=1)]
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None


INFORMATIONAL = frozenset(
    {
        "betas",
        "cache_control",
        "diagnostics",
        "inference_geo",
        "metadata",
        "service_tier",
        "speed",
        "user_profile_id",
        "workspace_id",
    }
)
NEUTRAL: Neutral = {
    "container": ABSENT,
    "context_management": ABSENT,
    "mcp_servers": ABSENT,
}
