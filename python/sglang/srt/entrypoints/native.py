"""SGLang's own API: POST /generate."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, TypedDict

import pydantic
from fastapi import APIRouter, Request, Response

from sglang.srt.entrypoints.error_forms import (
    JsonResponse,
    native_event_of,
    raise_if_refused,
    raise_if_update_refused,
)
from sglang.srt.entrypoints.fields import ABSENT, OFF, Neutral
from sglang.srt.entrypoints.json_body import BodyForm, read_object, takes
from sglang.srt.entrypoints.native_logprobs import LogprobFields, logprob_info, wishes_of
from sglang.srt.entrypoints.priorities import rank_of
from sglang.srt.entrypoints.server_state import ServerState, state_of
from sglang.srt.entrypoints.streaming import (
    DONE,
    EventStream,
    begin,
    event,
    unless_client_leaves,
)
from sglang.srt.entrypoints.value_types import OneOrManyIds, OneOrManyTexts, is_batch_of_ids
from sglang.srt.errors import Overloaded, RequestError
from sglang.srt.managers.answers import Answer, Update
from sglang.srt.managers.call import EngineFailed
from sglang.srt.managers.prompts import Prompt, namespace_of
from sglang.srt.messages import FinishReason
from sglang.srt.sampling_params import SamplingParams

router = APIRouter()

NEUTRAL: Neutral = {
    "input_embeds": ABSENT,
    "image_data": ABSENT,
    "video_data": ABSENT,
    "audio_data": ABSENT,
    "mm_hashes": ABSENT,
    "use_audio_in_video": OFF,
    "return_sampling_mask": OFF,
    "return_hidden_states": OFF,
    "return_routed_experts": OFF,
    "routed_experts_start_len": (None, 0),
    "return_indexer_topk": OFF,
    "return_entropy": OFF,
    "return_bytes": OFF,
    "modalities": ABSENT,
    "session_id": ABSENT,
    "session_params": ABSENT,
    "lora_path": ABSENT,
    "lora_id": ABSENT,
    "custom_logit_processor": ABSENT,
    "positional_embed_overrides": ABSENT,
    "bootstrap_host": ABSENT,
    "bootstrap_port": ABSENT,
    "bootstrap_room": ABSENT,
    "bootstrap_pair_key": ABSENT,
    "decode_tp_size": ABSENT,
    "routed_dp_rank": (None, 0),
    "data_parallel_rank": (None, 0),
    "disagg_prefill_dp_rank": ABSENT,
    "require_reasoning": OFF,
    "need_wait_for_mm_inputs": OFF,
    "num_items_assigned": ABSENT,
    "mm_data_mooncake": ABSENT,
    "encoder_urls": ABSENT,
    "max_dynamic_patch": ABSENT,
    "min_dynamic_patch": ABSENT,
    "image_max_dynamic_patch": ABSENT,
    "video_max_dynamic_patch": ABSENT,
    "images_config": ABSENT,
    "multi_item_delimiter_indices": ABSENT,
}
INFORMATIONAL = frozenset(
    {
        "conversation_id",
        "custom_labels",
        "external_trace_header",
        "http_worker_ipc",
        "log_metrics",
        "received_time",
        "routing_key",
    }
)


class _Row(TypedDict, total=False):
    """Prompt's `text` or `input_ids`."""

    text: str
    input_ids: Any


class GenerateBody(LogprobFields):
    """The fields of /generate that this server acts on."""

    model_config = pydantic.ConfigDict(extra="forbid", strict=True)

    text: OneOrManyTexts | None = None
    input_ids: OneOrManyIds | None = None
    sampling_params: dict[str, Any] | list[dict[str, Any]] | None = None
    rid: OneOrManyTexts | None = None
    stream: bool = False
    extra_key: OneOrManyTexts | None = None
    cache_salt: OneOrManyTexts | None = None
    return_prompt_token_ids: bool = False
    background: bool = False
    no_logs: bool = False
    priority: int | None = None
    slo: Any = None  # ServiceLevels says what it may be


GENERATE = BodyForm(GenerateBody, NEUTRAL, INFORMATIONAL)


class Generation:
    """A /generate body and what it asks for; whoever serves it iterates `updates`, once.

    Raises RequestError naming the field at fault.
    """

    def __init__(self, state: ServerState, fields: dict[str, Any]) -> None:
        body = GENERATE.of(fields)
        prompts, batched = prompts_of(body, state)
        self.stream = body.stream
        self.several = batched or sum(prompt.sampling.n for prompt in prompts) > 1
        self.updates = state.manager.generate(
            prompts,
            rid=body.rid,
            stream=body.stream,
            background=body.background,
            logged=not body.no_logs,
        )
        self.form = ResultForm(state, body, self.several)

    async def collect(self) -> dict[str, Any] | list[dict[str, Any]]:
        """All answers, finished. Raises Aborted for one that the engine has refused."""
        results: dict[int, dict[str, Any]] = {}
        async with aclosing(self.updates) as updates:
            async for update in updates:
                raise_if_refused(update.answer.finish)
                results[update.answer.index] = self.form.result(update)
        ordered = [results[index] for index in sorted(results)]
        return ordered if self.several else ordered[0]


@router.api_route("/generate", methods=["POST", "PUT"])
@takes(GENERATE)
async def generate(request: Request) -> Response:
    generation = Generation(state_of(request), await read_object(request))
    if generation.stream:
        # Of several answers one may be refused: its own event says so.
        check = _accept_any if generation.several else raise_if_update_refused
        updates = await begin(request, generation.updates, check)
        return EventStream(_events(updates, generation.form))
    return JsonResponse(await unless_client_leaves(request, generation.collect()))


def prompts_of(body: GenerateBody, state: ServerState) -> tuple[list[Prompt], bool]:
    """The prompts, and whether the client sent a batch. Raises RequestError."""
    texts, ids = body.text, body.input_ids
    if (texts is None) == (ids is None):
        problem = "got both" if texts is not None else "got neither"
        raise RequestError(f"text: give exactly one of text and input_ids, {problem}", "text")
    rows: list[_Row]
    if texts is not None:
        batched, field = isinstance(texts, list), "text"
        rows = [_Row(text=text) for text in (texts if isinstance(texts, list) else [texts])]
    else:
        batched, field = is_batch_of_ids(ids), "input_ids"
        rows = [_Row(input_ids=row) for row in (ids if is_batch_of_ids(ids) else [ids])]
    if not rows:
        raise RequestError(f"{field}: the batch is empty", field)
    count = len(rows)
    sampling = _each("sampling_params", body.sampling_params, count)
    extra_keys = _each("extra_key", body.extra_key, count)
    salts = _each("cache_salt", body.cache_salt, count)
    slos = _each("slo", body.slo, count)
    logprobs = wishes_of(
        body,
        count,
        vocab_size=state.model.vocab_size,
        has_tokenizer=state.model.tokenizer is not None,
    )
    rank = rank_of(body.priority, state.args)
    defaults = state.args.preferred_sampling_params or {}
    prompts = [
        Prompt(
            sampling=SamplingParams.parse(
                {**defaults, **(sampling[i] or {})}, vocab_size=state.model.vocab_size
            ),
            namespace=namespace_of(extra_keys[i], salts[i]),
            field=field,
            level=state.levels.resolve(slos[i]),
            logprobs=logprobs[i],
            rank=rank,
            **row,
        )
        for i, row in enumerate(rows)
    ]
    return prompts, batched


def meta_info(answer: Answer) -> dict[str, Any]:
    """What /generate tells of an answer beside its text."""
    info: dict[str, Any] = {
        "id": answer.rid,
        "finish_reason": finish_dict(answer.finish),
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": answer.completion_tokens,
        "cached_tokens": answer.cached_tokens,
        "reasoning_tokens": 0,
        "num_retractions": answer.retractions,
        "weight_version": answer.weight_version,
        "dp_rank": None,
    }
    if answer.e2e_latency_s is not None:
        info["e2e_latency"] = answer.e2e_latency_s
    return info


def finish_dict(finish: FinishReason | None) -> dict[str, Any] | None:
    match finish:
        case None:
            return None
        case FinishReason(type="stop"):
            return {"type": "stop", "matched": finish.matched}
        case FinishReason(type="length"):
            return {"type": "length", "length": finish.length}
        case _:
            return {
                "type": "abort",
                "message": finish.message,
                "status_code": finish.status_code,
                "err_type": None,
            }


def _accept_any(update: Update) -> None:
    pass


class ResultForm:
    """How this call's results look."""

    def __init__(self, state: ServerState, body: GenerateBody, several: bool) -> None:
        self._with_text = state.model.tokenizer is not None
        self._incremental = body.stream and state.args.incremental_streaming_output
        self._with_prompt_ids = body.return_prompt_token_ids
        self._with_index = body.stream and several

    def result(self, update: Update) -> dict[str, Any]:
        answer = update.answer
        result: dict[str, Any] = {}
        if self._with_text:
            result["text"] = update.new_text if self._incremental else answer.text
        result["output_ids"] = update.new_ids if self._incremental else answer.output_ids
        result["meta_info"] = meta_info(answer)
        logprobs = update.new_logprobs if self._incremental else answer.logprobs
        wish = answer.prompt.logprobs
        if logprobs is not None and wish is not None:
            result["meta_info"] |= logprob_info(logprobs, wish, len(answer.output_ids))
        if self._with_prompt_ids:
            result["prompt_token_ids"] = answer.prompt.input_ids.tolist()
        if self._with_index:
            result["index"] = answer.index
        return result


async def _events(
    updates: AsyncGenerator[Update, None], form: ResultForm
) -> AsyncGenerator[bytes, None]:
    async with aclosing(updates):
        try:
            async for update in updates:
                yield event(form.result(update))
        except (RequestError, Overloaded, EngineFailed) as error:
            yield event(native_event_of(error))
        yield DONE


def _each(field: str, value: Any, count: int) -> list[Any]:
    """One value for each prompt: a list is taken element by element, anything else by all."""
    if not isinstance(value, list):
        return [value] * count
    if len(value) != count:
        raise RequestError(f"{field}: got {len(value)} values for {count} prompts", field)
    return value
