"""POST /v1/score: how likely each label token is behind a query and an item."""

from __future__ import annotations

import math
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import pydantic
from fastapi import APIRouter, Request, Response

from sglang.srt.entrypoints.error_forms import JsonResponse, raise_if_refused
from sglang.srt.entrypoints.fields import ABSENT, OFF, Neutral
from sglang.srt.entrypoints.json_body import BodyForm, takes
from sglang.srt.entrypoints.openai.protocol import INFORMATIONAL
from sglang.srt.entrypoints.openai.reply import Usage, model_name
from sglang.srt.entrypoints.server_state import ServerState, state_of
from sglang.srt.entrypoints.streaming import unless_client_leaves
from sglang.srt.entrypoints.value_types import OneOrManyTexts, is_batch_of_ids
from sglang.srt.errors import RequestError
from sglang.srt.logprobs import LogprobWish
from sglang.srt.managers.answers import Answer
from sglang.srt.managers.prompts import Prompt
from sglang.srt.sampling_params import SamplingParams

router = APIRouter()

_NEUTRAL: Neutral = {
    "embed_override_token_id": (None,),
    "query_embed_overrides": ABSENT,
    "item_embed_overrides": ABSENT,
    "return_pooled_hidden_states": OFF,
}


class ScoreBody(pydantic.BaseModel):
    """Query and items are texts, or token ids both."""

    model_config = pydantic.ConfigDict(extra="forbid", strict=True)

    query: str | list[int]
    items: OneOrManyTexts | list[list[int]]
    label_token_ids: list[int]
    apply_softmax: bool | None = None
    item_first: bool | None = None
    model: str | None = None


_BODY = BodyForm(ScoreBody, _NEUTRAL, INFORMATIONAL)


@router.post("/v1/score")
@takes(_BODY)
async def score(request: Request) -> Response:
    state = state_of(request)
    body = await _BODY.read(request, typed=True)
    model = model_name(body.model, state)
    prompts = _prompts(body, state)
    usage = Usage(1, state.args.enable_cache_report)
    answers = await unless_client_leaves(request, _answers(prompts, state))
    for answer in answers:
        usage.see(answer)
    softmax = bool(body.apply_softmax)
    return JsonResponse(
        {
            "object": "scoring",
            "model": model,
            "scores": [_scores(answer, softmax=softmax) for answer in answers],
            "usage": usage.total(),
        }
    )


async def _answers(prompts: list[Prompt], state: ServerState) -> list[Answer]:
    answers: dict[int, Answer] = {}
    async with aclosing(state.manager.generate(prompts, stream=False)) as updates:
        async for update in updates:
            raise_if_refused(update.answer.finish)
            answers[update.answer.index] = update.answer
    return [answers[index] for index in sorted(answers)]


def _scores(answer: Answer, *, softmax: bool) -> list[float]:
    """Probabilities among the whole vocabulary, or with `softmax` among the labels alone."""
    assert answer.logprobs is not None
    listed = answer.logprobs.output.listed[0]
    assert listed is not None
    values = [-math.inf if value is None else value for value, _, _ in listed]
    if not softmax:
        return [math.exp(value) for value in values]
    largest = max(values)
    weights = [math.exp(value - largest) for value in values]
    return [weight / sum(weights) for weight in weights]


def _prompts(body: ScoreBody, state: ServerState) -> list[Prompt]:
    """Raises RequestError naming the field at fault."""
    if not body.label_token_ids:
        raise RequestError("label_token_ids: must not be empty", "label_token_ids")
    wish = LogprobWish(token_ids=body.label_token_ids)
    try:
        wish.check(state.model.vocab_size)
    except RequestError as error:
        text = str(error).replace("token_ids_logprob", "label_token_ids")
        raise RequestError(text, "label_token_ids") from None
    items: list[Any] = [body.items] if isinstance(body.items, str) else list(body.items)
    if not items:
        raise RequestError("items: must not be empty", "items")
    texts = isinstance(body.query, str)
    if texts == is_batch_of_ids(items):
        raise RequestError("items: must be of the query's kind, text or token ids", "items")
    # The first token is scored and thrown away.
    common = Prompt(SamplingParams(max_new_tokens=1, temperature=0.0), field="items", logprobs=wish)
    return [_prompt(common, body, item, texts=texts) for item in items]


def _prompt(common: Prompt, body: ScoreBody, item: Any, *, texts: bool) -> Prompt:
    both: Any = item + body.query if body.item_first else body.query + item
    return replace(common, text=both) if texts else replace(common, input_ids=both)
