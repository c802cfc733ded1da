"""POST /v1/chat/completions, also as /invocations."""

from __future__ import annotations

from typing import Any
from uuid import uuid4

from fastapi import APIRouter, Request, Response

from sglang.srt.entrypoints.error_forms import JsonResponse, raise_if_update_refused
from sglang.srt.entrypoints.json_body import BodyForm, takes
from sglang.srt.entrypoints.native import meta_info
from sglang.srt.entrypoints.openai.chat_plan import ChatPlan, plan_chat
from sglang.srt.entrypoints.openai.logprobs import chat_entries, shown
from sglang.srt.entrypoints.openai.protocol import CHAT_NEUTRAL, INFORMATIONAL, ChatBody
from sglang.srt.entrypoints.openai.reply import Reply, finish_fields, model_name, token_id_fields
from sglang.srt.entrypoints.openai.sampling import openai_names
from sglang.srt.entrypoints.server_state import state_of
from sglang.srt.entrypoints.streaming import EventStream, begin, unless_client_leaves
from sglang.srt.managers.answers import Answer, Update
from sglang.srt.parsers.answer_reader import AnswerReader
from sglang.srt.parsers.pieces import CallArguments, CallStart, Piece, Reasoning, Text

router = APIRouter()

_BODY = BodyForm(ChatBody, CHAT_NEUTRAL, INFORMATIONAL)


@router.post("/invocations")
@router.post("/v1/chat/completions")
@takes(_BODY)
async def chat_completions(request: Request) -> Response:
    state = state_of(request)
    body = await _BODY.read(request, typed=True)
    model = model_name(body.model, state)
    newer = body.max_completion_tokens is not None
    with openai_names("max_completion_tokens" if newer else "max_tokens"):
        plan = plan_chat(body, state)
        reply = Reply(
            state,
            model=model,
            kind="chat.completion.chunk" if body.stream else "chat.completion",
            answers_per_prompt=plan.prompt.sampling.n,
            options=body.stream_options,
            count_reasoning=plan.count_reasoning,
        )
        shape = _Shape(body, plan)
        updates = state.manager.generate([plan.prompt], rid=body.rid, stream=bool(body.stream))
        if body.stream:
            updates = await begin(request, updates, raise_if_update_refused)
            return EventStream(reply.events(updates, shape.chunks))
        return JsonResponse(await unless_client_leaves(request, reply.whole(updates, shape.whole)))


def new_call_id() -> str:
    return f"call_{uuid4().hex[:24]}"


class _Shape:
    """The choices of one call, whole or as chunks: role, then what is said, then how it ended."""

    def __init__(self, body: ChatBody, plan: ChatPlan) -> None:
        self._body = body
        self._plan = plan
        self._readers: dict[int, AnswerReader] = {}
        self._called: set[int] = set()
        self._unsent: dict[int, list[dict[str, Any]]] = {}  # log-probabilities of held text

    def whole(self, answer: Answer) -> dict[str, Any]:
        said = self._plan.new_reader().read(answer.text)
        calls = [
            {
                "id": new_call_id(),
                "index": i,
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments},
            }
            for i, call in enumerate(said.calls)
        ]
        if calls:
            self._called.add(answer.index)
        silent = bool(calls or said.reasoning) and not said.text
        message = {
            "role": "assistant",
            "content": None if silent else said.text,
            "reasoning_content": said.reasoning or None,
            "tool_calls": calls or None,
        }
        content = None
        if answer.logprobs is not None:
            content = {"content": chat_entries(shown(answer.logprobs.output, answer))}
        choice = {"index": answer.index, "message": message, "logprobs": content}
        choice |= self._end(answer)
        choice |= token_id_fields(
            answer,
            answer.output_ids,
            prompt=self._body.return_prompt_token_ids,
            output=self._body.return_token_ids,
        )
        if self._body.return_meta_info:
            choice["meta_info"] = meta_info(answer)
        return choice

    def chunks(self, update: Update) -> list[dict[str, Any]]:
        answer = update.answer
        index = answer.index
        chunks = []
        if index not in self._readers:
            self._readers[index] = self._plan.new_reader()
            first = self._chunk(answer, {"role": "assistant", "content": ""})
            chunks.append(
                first | token_id_fields(answer, [], prompt=self._body.return_prompt_token_ids)
            )
        reader = self._readers[index]
        pieces = reader.feed(update.new_text)
        if answer.finish is not None:
            pieces += reader.finish()
        chunks += [self._chunk(answer, self._delta(index, piece)) for piece in pieces]
        if answer.finish is not None:
            chunks.append(self._chunk(answer, {"content": None}) | self._end(answer))
        elif self._body.return_token_ids and not chunks:
            chunks.append(self._chunk(answer, {}))
        self._add_logprobs(update, chunks)
        if chunks:
            chunks[-1] |= token_id_fields(
                answer, update.new_ids, output=self._body.return_token_ids
            )
        return chunks

    def _add_logprobs(self, update: Update, chunks: list[dict[str, Any]]) -> None:
        """Those of tokens whose text is held back wait for a chunk that says something."""
        if update.new_logprobs is None:
            return
        index = update.answer.index
        entries = self._unsent.pop(index, [])
        entries += chat_entries(shown(update.new_logprobs.output, update.answer))
        telling = [chunk for chunk in chunks if "role" not in chunk["delta"]]
        if entries and telling:
            telling[0]["logprobs"] = {"content": entries}
        elif entries:
            self._unsent[index] = entries

    def _delta(self, index: int, piece: Piece) -> dict[str, Any]:
        match piece:
            case Text():
                return {"content": piece.text}
            case Reasoning():
                return {"reasoning_content": piece.text}
            case CallStart():
                self._called.add(index)
                function = {"name": piece.name, "arguments": ""}
                start = {"index": piece.index, "id": new_call_id(), "type": "function"}
                return {"tool_calls": [{**start, "function": function}]}
            case CallArguments():
                return {
                    "tool_calls": [{"index": piece.index, "function": {"arguments": piece.text}}]
                }

    def _chunk(self, answer: Answer, delta: dict[str, Any]) -> dict[str, Any]:
        open_end = {"finish_reason": None, "matched_stop": None}
        return {"index": answer.index, "delta": delta, "logprobs": None, **open_end}

    def _end(self, answer: Answer) -> dict[str, Any]:
        end = finish_fields(answer)
        if answer.index in self._called and end["finish_reason"] == "stop":
            end["finish_reason"] = "tool_calls"
        return end
