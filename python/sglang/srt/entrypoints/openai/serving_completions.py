"""POST /v1/completions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fastapi import APIRouter, Request, Response

from sglang.srt.entrypoints.error_forms import JsonResponse, raise_if_update_refused
from sglang.srt.entrypoints.json_body import BodyForm, takes
from sglang.srt.entrypoints.openai.logprobs import CompletionLogprobs, completion_wish
from sglang.srt.entrypoints.openai.output_format import (
    only_constraint,
    response_format_constraint,
)
from sglang.srt.entrypoints.openai.protocol import (
    COMPLETION_NEUTRAL,
    INFORMATIONAL,
    CompletionBody,
)
from sglang.srt.entrypoints.openai.reply import Reply, finish_fields, model_name, token_id_fields
from sglang.srt.entrypoints.openai.sampling import openai_names, sampling_of
from sglang.srt.entrypoints.priorities import rank_of
from sglang.srt.entrypoints.server_state import ServerState, state_of
from sglang.srt.entrypoints.streaming import EventStream, begin, unless_client_leaves
from sglang.srt.entrypoints.value_types import is_batch_of_ids
from sglang.srt.errors import RequestError
from sglang.srt.managers.answer_logprobs import AnswerLogprobs
from sglang.srt.managers.answers import Answer, Update
from sglang.srt.managers.prompts import Prompt, namespace_of

router = APIRouter()

_DEFAULT_MAX_TOKENS = 16


_BODY = BodyForm(CompletionBody, COMPLETION_NEUTRAL, INFORMATIONAL)


@router.post("/v1/completions")
@takes(_BODY)
async def completions(request: Request) -> Response:
    state = state_of(request)
    body = await _BODY.read(request, typed=True)
    model = model_name(body.model, state)
    with openai_names():
        prompts = _prompts(body, state)
        n = prompts[0].sampling.n
        reply = Reply(
            state,
            model=model,
            kind="text_completion",
            answers_per_prompt=n,
            options=body.stream_options,
        )
        shape = _Shape(body, prompts, n, state)
        updates = state.manager.generate(prompts, rid=body.rid, stream=bool(body.stream))
        if body.stream:
            updates = await begin(request, updates, raise_if_update_refused)
            return EventStream(reply.events(updates, shape.chunks))
        return JsonResponse(await unless_client_leaves(request, reply.whole(updates, shape.whole)))


class _Shape:
    """The choices of one call; with `echo`, each starts with its prompt."""

    def __init__(
        self, body: CompletionBody, prompts: list[Prompt], n: int, state: ServerState
    ) -> None:
        self._n = n
        self._body = body
        self._echo: list[str] | None = None
        self._started: set[int] = set()
        self._logprobs: dict[int, CompletionLogprobs] = {}
        if body.echo:
            decode = state.manager.encoder.decode
            self._echo = [
                p.text if p.text is not None else decode(p.input_ids or [], field="prompt")
                for p in prompts
            ]

    def whole(self, answer: Answer) -> dict[str, Any]:
        choice = self._choice(answer, self._prefix(answer) + answer.text, answer.logprobs)
        return choice | self._ids(answer, answer.output_ids, first=True)

    def chunks(self, update: Update) -> list[dict[str, Any]]:
        answer, text = update.answer, update.new_text
        first = answer.index not in self._started
        if first:
            self._started.add(answer.index)
            text = self._prefix(answer) + text
        silent = self._body.logprobs is None and not self._body.return_token_ids
        if not text and answer.finish is None and silent:
            return []
        return [
            self._choice(answer, text, update.new_logprobs)
            | self._ids(answer, update.new_ids, first)
        ]

    def _ids(self, answer: Answer, new_ids: list[int], first: bool) -> dict[str, Any]:
        return token_id_fields(
            answer,
            new_ids,
            prompt=first and self._body.return_prompt_token_ids,
            output=self._body.return_token_ids,
        )

    def _prefix(self, answer: Answer) -> str:
        return "" if self._echo is None else self._echo[answer.index // self._n]

    def _choice(self, answer: Answer, text: str, news: AnswerLogprobs | None) -> dict[str, Any]:
        logprobs = None
        if news is not None:
            reader = self._logprobs.setdefault(answer.index, CompletionLogprobs())
            logprobs = reader.of(news, answer)
        end = finish_fields(answer)
        return {"index": answer.index, "text": text, "logprobs": logprobs, **end}


def _prompts(body: CompletionBody, state: ServerState) -> list[Prompt]:
    if body.suffix:
        raise RequestError("suffix: this server writes on, it fills no gaps", "suffix")
    if body.best_of not in (None, body.n or 1):
        raise RequestError(
            f"best_of: all of n={body.n or 1} answers are returned, none is left out", "best_of"
        )
    sampling = sampling_of(
        body,
        max_new_tokens=_DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens,
        vocab_size=state.model.vocab_size,
        constraint=only_constraint(
            body.model_dump(include={"json_schema", "regex", "ebnf"}),
            response_format_constraint(body.response_format),
        ),
    )
    namespace = namespace_of(body.extra_key, body.cache_salt)
    level = state.levels.resolve(body.slo)
    given: Any = body.prompt
    if isinstance(given, str):
        texts, rows = [given], []
    elif is_batch_of_ids(given):
        texts, rows = [], given
    elif given and isinstance(given[0], int):
        texts, rows = [], [given]
    else:
        texts, rows = given, []
    common = Prompt(
        sampling,
        namespace=namespace,
        field="prompt",
        level=level,
        rank=rank_of(body.priority, state.args),
        logprobs=completion_wish(
            body.logprobs, echo=bool(body.echo), vocab_size=state.model.vocab_size
        ),
    )
    prompts = [replace(common, text=text) for text in texts]
    prompts += [replace(common, input_ids=row) for row in rows]
    if not prompts:
        raise RequestError("prompt: must not be empty", "prompt")
    return prompts
