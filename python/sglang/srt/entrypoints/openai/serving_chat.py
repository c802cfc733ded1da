"""POST /v1/chat/completions."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response

from sglang.srt.entrypoints.error_forms import JsonResponse, raise_if_update_refused
from sglang.srt.entrypoints.fields import without_unsupported
from sglang.srt.entrypoints.json_body import checked, read_object
from sglang.srt.entrypoints.openai.chat_template import render
from sglang.srt.entrypoints.openai.protocol import CHAT_NEUTRAL, INFORMATIONAL, ChatBody
from sglang.srt.entrypoints.openai.responses import Reply, check_model, finish_fields
from sglang.srt.entrypoints.openai.sampling import openai_names, sampling_of
from sglang.srt.entrypoints.server_state import ServerState, state_of
from sglang.srt.entrypoints.streaming import EventStream, begin, unless_client_leaves
from sglang.srt.errors import RequestError
from sglang.srt.managers.answers import Answer, Update
from sglang.srt.managers.prompts import Prompt, namespace_of

router = APIRouter()


@router.post("/v1/chat/completions")
async def chat_completions(request: Request) -> Response:
    state = state_of(request)
    raw = without_unsupported(await read_object(request, typed=True), CHAT_NEUTRAL, INFORMATIONAL)
    body = checked(ChatBody, raw)
    model = check_model(body.model, state)
    newer = body.max_completion_tokens is not None
    with openai_names("max_completion_tokens" if newer else "max_tokens"):
        prompt = _prompt(body, state)
        reply = Reply(
            state,
            model=model,
            kind="chat.completion.chunk" if body.stream else "chat.completion",
            answers_per_prompt=prompt.sampling.n,
            options=body.stream_options,
        )
        updates = state.manager.generate([prompt], rid=body.rid, stream=bool(body.stream))
        if body.stream:
            updates = await begin(request, updates, raise_if_update_refused)
            return EventStream(reply.events(updates, _Chunks()))
        return JsonResponse(await unless_client_leaves(request, reply.whole(updates, _whole)))


def _whole(answer: Answer) -> dict[str, Any]:
    message = {
        "role": "assistant",
        "content": answer.text,
        "reasoning_content": None,
        "tool_calls": None,
    }
    return {"index": answer.index, "message": message, "logprobs": None, **finish_fields(answer)}


class _Chunks:
    """Deltas of each choice: its role, then its text, then how it ended."""

    def __init__(self) -> None:
        self._started: set[int] = set()

    def __call__(self, update: Update) -> list[dict[str, Any]]:
        answer = update.answer
        open_end = {"finish_reason": None, "matched_stop": None}
        chunks = []
        if answer.index not in self._started:
            self._started.add(answer.index)
            chunks.append(_chunk(answer, {"role": "assistant", "content": ""}, open_end))
        if update.new_text:
            chunks.append(_chunk(answer, {"content": update.new_text}, open_end))
        if answer.finish is not None:
            chunks.append(_chunk(answer, {"content": None}, finish_fields(answer)))
        return chunks


def _chunk(answer: Answer, delta: dict[str, Any], end: dict[str, Any]) -> dict[str, Any]:
    return {"index": answer.index, "delta": delta, "logprobs": None, **end}


def _prompt(body: ChatBody, state: ServerState) -> Prompt:
    variables = dict(body.chat_template_kwargs or {})
    if body.reasoning_effort is not None:
        variables.setdefault("reasoning_effort", body.reasoning_effort)
    text = render(
        state.model.tokenizer,
        body.messages,
        continue_final_message=bool(body.continue_final_message),
        variables=variables,
    )
    sampling = sampling_of(
        body,
        max_new_tokens=_max_tokens(body),
        vocab_size=state.model.vocab_size,
        defaults=state.model.chat_defaults,
    )
    return Prompt(
        sampling,
        text=text,
        namespace=namespace_of(body.extra_key, body.cache_salt),
        field="messages",
        level=state.levels.resolve(body.slo),
        add_special_tokens=False,  # the template has written them
    )


def _max_tokens(body: ChatBody) -> int | None:
    """None, the default, lets the answer fill the context."""
    older, newer = body.max_tokens, body.max_completion_tokens
    if older is not None and newer is not None and older != newer:
        raise RequestError("max_tokens: differs from max_completion_tokens, give one", "max_tokens")
    return older if newer is None else newer
