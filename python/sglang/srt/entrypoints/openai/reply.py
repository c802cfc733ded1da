"""Parts that completions and chat completions have in common."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable, Collection
from contextlib import aclosing
from typing import Any

from sglang.srt.entrypoints.error_forms import Aborted, flat_of, raise_if_refused
from sglang.srt.entrypoints.openai.protocol import StreamOptions
from sglang.srt.entrypoints.server_state import ServerState
from sglang.srt.entrypoints.streaming import DONE, event
from sglang.srt.errors import Overloaded, RequestError
from sglang.srt.managers.answers import Answer, Update
from sglang.srt.managers.call import EngineFailed


def model_name(asked: str | None, state: ServerState) -> str:
    """The name to answer with: there is one model, and it answers to any name, as SGLang's does.

    Raises RequestError for one of its adapters, "model:adapter", since it has none.
    """
    ours = (state.args.model_name, state.args.model_path)
    if asked and asked not in ours and asked.rpartition(":")[0] in ours:
        raise RequestError(f"model: {asked!r} names an adapter, and this server has none", "model")
    return asked or state.args.model_name


def finish_fields(answer: Answer) -> dict[str, Any]:
    finish = answer.finish
    return {
        "finish_reason": None if finish is None else finish.type,
        "matched_stop": None if finish is None else finish.matched,
    }


def token_id_fields(
    answer: Answer, new_ids: list[int], *, prompt: bool | None = False, output: bool | None = False
) -> dict[str, Any]:
    """Of a choice that is to carry the ids that its text was made of."""
    fields: dict[str, Any] = {}
    if prompt:
        fields["prompt_token_ids"] = answer.prompt.input_ids.tolist()
    if output:
        fields["token_ids"] = new_ids
    return fields


def no_reasoning(answer: Answer) -> int:
    return 0


class Usage:
    """Token counts of a call: a prompt counts once, however many answers it gets."""

    def __init__(
        self,
        answers_per_prompt: int,
        cache_report: bool,
        count_reasoning: Callable[[Answer], int] = no_reasoning,
    ) -> None:
        self._n = answers_per_prompt
        self._cache_report = cache_report
        self._count_reasoning = count_reasoning
        self._seen: dict[int, Answer] = {}

    def see(self, answer: Answer) -> None:
        self._seen[answer.index] = answer

    def total(self) -> dict[str, Any]:
        return self._of(self._seen.values())

    def of(self, answer: Answer) -> dict[str, Any]:
        """For continuous_usage_stats: one answer and its prompt."""
        return self._of([answer])

    def _of(self, answers: Collection[Answer]) -> dict[str, Any]:
        prompts = {answer.index // self._n: answer for answer in answers}
        prompt = sum(answer.prompt_tokens for answer in prompts.values())
        completion = sum(answer.completion_tokens for answer in answers)
        cached = sum(answer.cached_tokens for answer in prompts.values())
        reasoning = sum(self._count_reasoning(answer) for answer in answers)
        usage = {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": cached} if self._cache_report else None,
            "reasoning_tokens": reasoning,
        }
        if reasoning:  # where OpenAI's clients look for it
            usage["completion_tokens_details"] = {"reasoning_tokens": reasoning}
        return usage


class Reply:
    """The envelope of one call's response or of all its chunks."""

    def __init__(
        self,
        state: ServerState,
        *,
        model: str,
        kind: str,
        answers_per_prompt: int,
        options: StreamOptions | None,
        count_reasoning: Callable[[Answer], int] = no_reasoning,
    ) -> None:
        options = options or StreamOptions()
        self._head = {"object": kind, "created": int(time.time()), "model": model}
        self._id = ""
        self.usage = Usage(answers_per_prompt, state.args.enable_cache_report, count_reasoning)
        asked = options.include_usage
        self._final_usage = (
            state.args.stream_response_default_include_usage if asked is None else asked
        )
        self._running_usage = bool(options.continuous_usage_stats)

    async def whole(
        self,
        updates: AsyncGenerator[Update, None],
        choice: Callable[[Answer], dict[str, Any]],
    ) -> dict[str, Any]:
        """The response of a call that does not stream."""
        choices: dict[int, dict[str, Any]] = {}
        async with aclosing(updates):
            async for update in updates:
                answer = update.answer
                raise_if_refused(answer.finish)
                self._see(answer)
                choices[answer.index] = choice(answer)
        ordered = [choices[index] for index in sorted(choices)]
        return {"id": self._id, **self._head, "choices": ordered, "usage": self.usage.total()}

    async def events(
        self,
        updates: AsyncGenerator[Update, None],
        choices: Callable[[Update], list[dict[str, Any]]],
    ) -> AsyncGenerator[bytes, None]:
        """The stream: chunks of one choice each, the usage if asked for, [DONE]."""
        async with aclosing(updates):
            try:
                async for update in updates:
                    raise_if_refused(update.answer.finish)
                    self._see(update.answer)
                    for choice in choices(update):
                        usage = self.usage.of(update.answer) if self._running_usage else None
                        yield event(self._chunk([choice], usage))
                if self._final_usage:
                    yield event(self._chunk([], self.usage.total()))
            except (RequestError, Overloaded, EngineFailed, Aborted) as error:
                yield event({"error": flat_of(error)})
        yield DONE

    def _see(self, answer: Answer) -> None:
        self._id = self._id or answer.call_id
        self.usage.see(answer)

    def _chunk(self, choices: list[Any], usage: dict[str, Any] | None) -> dict[str, Any]:
        return {"id": self._id, **self._head, "choices": choices, "usage": usage}
