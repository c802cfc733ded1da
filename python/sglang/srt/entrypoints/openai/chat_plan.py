"""A chat request made ready: its prompt, and how its answers are to be read.

All surfaces that have conversations end up here, whatever their own form.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from sglang.srt.entrypoints.openai.chat_template import render, template_variables
from sglang.srt.entrypoints.openai.logprobs import chat_wish
from sglang.srt.entrypoints.openai.output_format import (
    Constraint,
    only_constraint,
    response_format_constraint,
)
from sglang.srt.entrypoints.openai.protocol import ChatBody
from sglang.srt.entrypoints.openai.sampling import sampling_of
from sglang.srt.entrypoints.openai.tools import ToolPlan
from sglang.srt.entrypoints.priorities import rank_of
from sglang.srt.entrypoints.server_state import ServerState
from sglang.srt.errors import RequestError
from sglang.srt.managers.answers import Answer
from sglang.srt.managers.prompts import Prompt, namespace_of
from sglang.srt.parsers.answer_reader import AnswerReader
from sglang.srt.parsers.reasoning import REASONING_PARSERS
from sglang.srt.parsers.reasoning.think_tags import CLOSE

_PROMPT_TAIL_TOKENS = 16  # enough to hold a tag and what surrounds it


@dataclass(frozen=True, slots=True)
class ChatPlan:
    """new_reader: makes one for each answer. count_reasoning: an answer's tokens of thinking."""

    prompt: Prompt
    new_reader: Callable[[], AnswerReader]
    count_reasoning: Callable[[Answer], int]


def plan_chat(body: ChatBody, state: ServerState) -> ChatPlan:
    """Raises RequestError naming the field at fault, with SamplingParams's names."""
    tools = ToolPlan.of(
        body.tools,
        body.tool_choice,
        parallel=body.parallel_tool_calls is not False,
        parser_name=state.args.tool_call_parser,
    )
    constraint = only_constraint(
        body.model_dump(include={"json_schema", "regex", "ebnf"}),
        response_format_constraint(body.response_format),
        None if tools.may_answer else tools.constraint,
    )
    if constraint is None:
        constraint = tools.constraint
    text = None if body.input_ids is not None else _prompt_text(body, tools, state)
    prompt = Prompt(
        sampling_of(
            body,
            max_new_tokens=_max_tokens(body),
            vocab_size=state.model.vocab_size,
            defaults=state.model.chat_defaults,
            constraint=constraint,
            keep_special_tokens=tools.parser is not None and tools.parser.mark_is_special,
        ),
        text=text,
        input_ids=body.input_ids,
        namespace=namespace_of(body.extra_key, body.cache_salt),
        field="messages" if body.input_ids is None else "input_ids",
        level=state.levels.resolve(body.slo),
        add_special_tokens=False,  # the template has written them
        logprobs=chat_wish(body.logprobs, body.top_logprobs),
        rank=rank_of(body.priority, state.args),
    )
    return _with_readers(prompt, body, tools, constraint, state)


def _with_readers(
    prompt: Prompt,
    body: ChatBody,
    tools: ToolPlan,
    constraint: Constraint | None,
    state: ServerState,
) -> ChatPlan:
    habit = REASONING_PARSERS.get(state.args.reasoning_parser or "")
    opening = _end_of_prompt(prompt, state) if habit is not None else ""
    # But for that of strict tools a grammar holds from the first token on: there is no thinking,
    # and no call but by its schema.
    free = constraint is None or (constraint is tools.constraint and tools.may_answer)
    calls = free or constraint is tools.constraint
    separate = body.separate_reasoning is not False

    def new_reader() -> AnswerReader:
        return AnswerReader(
            habit.parser(opening) if habit and free and separate else None,
            tools.parser(tools.names) if tools.parser and calls else None,
            hold_reasoning=body.stream_reasoning is False,
        )

    def count_reasoning(answer: Answer) -> int:
        if habit is None or not free:
            return 0
        return _reasoning_tokens(answer, AnswerReader(habit.parser(opening)), state)

    return ChatPlan(prompt, new_reader, count_reasoning)


def _end_of_prompt(prompt: Prompt, state: ServerState) -> str:
    if prompt.text is not None:
        return prompt.text
    ids = (prompt.input_ids or [])[-_PROMPT_TAIL_TOKENS:]
    return state.manager.encoder.decode(ids, skip_special_tokens=False, field=prompt.field)


def _reasoning_tokens(answer: Answer, reader: AnswerReader, state: ServerState) -> int:
    """Tokens up to and with the closing tag; all of an answer that is cut off before it."""
    thoughts = reader.read(answer.text).reasoning
    if not thoughts:
        return 0
    if reader.thinking:
        return answer.completion_tokens
    tokenizer = state.model.tokenizer
    assert tokenizer is not None
    close = tokenizer.convert_tokens_to_ids(CLOSE)
    if close != tokenizer.unk_token_id and close in answer.output_ids:
        return answer.output_ids.index(close) + 1
    return len(tokenizer(thoughts, add_special_tokens=False)["input_ids"])


def _prompt_text(body: ChatBody, tools: ToolPlan, state: ServerState) -> str:
    return render(
        state.model.tokenizer,
        body.messages,
        continue_final_message=bool(body.continue_final_message),
        variables=template_variables(body.chat_template_kwargs, body.reasoning_effort),
        tools=tools.for_template,
    )


def _max_tokens(body: ChatBody) -> int | None:
    """None, the default, lets the answer fill the context."""
    older, newer = body.max_tokens, body.max_completion_tokens
    if older is not None and newer is not None and older != newer:
        raise RequestError("max_tokens: differs from max_completion_tokens, give one", "max_tokens")
    return older if newer is None else newer
