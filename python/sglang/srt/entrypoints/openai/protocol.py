"""Bodies of the OpenAI API: what we act on, and what we know of but do not."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pydantic

from sglang.srt.entrypoints.fields import ABSENT, OFF, Neutral
from sglang.srt.entrypoints.value_types import AnyPrompt, Effort, OneOrManyIds, OneOrManyTexts


class _Body(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", strict=True)


class StreamOptions(_Body):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class SamplingFields(_Body):
    """The names are SamplingParams's but for those in `sampling.RENAMED`; null is the default.

    Ranges are checked by SamplingParams.
    """

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    min_tokens: int | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    n: int | None = None
    seed: int | None = None
    stop: OneOrManyTexts | None = None
    stop_token_ids: list[int] | None = None
    stop_regex: OneOrManyTexts | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    no_stop_trim: bool | None = None
    logit_bias: dict[str, float] | None = None
    json_schema: str | None = None
    regex: str | None = None
    ebnf: str | None = None
    custom_params: dict[str, Any] | None = None


class _GenerationBody(SamplingFields):
    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: dict[str, Any] | None = None
    rid: OneOrManyTexts | None = None
    extra_key: str | None = None
    cache_salt: str | None = None
    priority: int | None = None
    slo: Any = None  # ServiceLevels says what it may be


class CompletionBody(_GenerationBody):
    prompt: AnyPrompt
    max_tokens: int | None = None
    echo: bool | None = None
    logprobs: int | None = None
    suffix: str | None = None
    best_of: int | None = None
    return_prompt_token_ids: bool | None = None
    return_token_ids: bool | None = None


class TextPart(_Body):
    type: Literal["text"]
    text: str


class ThinkingPart(_Body):
    type: Literal["thinking", "reasoning"]
    thinking: str | None = None
    text: str | None = None


class CalledFunction(_Body):
    name: str
    arguments: str | dict[str, Any] | None = None


class MessageToolCall(_Body):
    id: str | None = None
    index: int | None = None
    type: Literal["function"] = "function"
    function: CalledFunction


class ChatMessage(_Body):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[dict[str, Any]] | None = None
    name: str | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    refusal: None = None
    tool_calls: list[MessageToolCall] | None = None


class Function(_Body):
    name: Annotated[str, pydantic.Field(min_length=1)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    defer_loading: Literal[False] | None = None


class Tool(_Body):
    type: Literal["function"] = "function"
    function: Function
    defer_loading: Literal[False] | None = None


class ChatBody(_GenerationBody):
    messages: list[ChatMessage]
    input_ids: list[int] | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    tools: list[Tool] | None = None
    tool_choice: Any = None  # ToolPlan says what it may be
    parallel_tool_calls: bool | None = None
    separate_reasoning: bool | None = None
    stream_reasoning: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: Effort | None = None
    return_prompt_token_ids: bool | None = None
    return_token_ids: bool | None = None
    return_meta_info: bool | None = None


class TokenizeBody(_Body):
    model: str | None = None
    prompt: OneOrManyTexts | None = None
    messages: list[ChatMessage] | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[Tool] | None = None
    tool_choice: Any = None  # ToolPlan says what it may be
    reasoning_effort: Effort | None = None


class DetokenizeBody(_Body):
    model: str | None = None
    tokens: OneOrManyIds
    skip_special_tokens: bool = True


# Notes of the client's that never change an answer.
INFORMATIONAL = frozenset(
    {
        "custom_labels",
        "metadata",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "store",
        "user",
    }
)

_NEUTRAL: Neutral = {
    "session_id": ABSENT,
    "session_params": ABSENT,
    "lora_path": ABSENT,
    "custom_logit_processor": ABSENT,
    "images_config": ABSENT,
    "return_hidden_states": OFF,
    "return_routed_experts": OFF,
    "routed_experts_start_len": (None, 0),
    "return_cached_tokens_details": OFF,
    "bootstrap_host": ABSENT,
    "bootstrap_port": ABSENT,
    "bootstrap_room": ABSENT,
    "routed_dp_rank": (None, 0),
    "disagg_prefill_dp_rank": ABSENT,
    "data_parallel_rank": (None, 0),
}
COMPLETION_NEUTRAL = _NEUTRAL
CHAT_NEUTRAL: Neutral = {
    **_NEUTRAL,
    "audio": (None,),
    "function_call": (None, "none", "auto"),
    "functions": ABSENT,
    "max_dynamic_patch": (None,),
    "min_dynamic_patch": (None,),
    "modalities": (None, ["text"]),
    "moderation": (None,),
    "prediction": (None,),
    "task": (None,),
    "use_audio_in_video": OFF,
    "verbosity": (None,),
    "web_search_options": (None,),
}
