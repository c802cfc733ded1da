"""An answer as Anthropic's message, whole or as events."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from typing import Any
from uuid import uuid4

from sglang.srt.entrypoints.error_forms import Aborted, anthropic_of, flat_of, raise_if_refused
from sglang.srt.entrypoints.openai.chat_plan import ChatPlan
from sglang.srt.entrypoints.streaming import named_event
from sglang.srt.errors import Overloaded, RequestError
from sglang.srt.managers.answers import Answer, Update
from sglang.srt.managers.call import EngineFailed
from sglang.srt.parsers.pieces import CallArguments, CallStart, Piece, Reasoning


def new_tool_use_id() -> str:
    return f"toolu_{uuid4().hex[:24]}"


class MessageForm:
    """One answer's envelope. cache_report: tell how much of the prompt was cached."""

    def __init__(self, plan: ChatPlan, model: str, cache_report: bool) -> None:
        self._plan = plan
        self._model = model
        self._cache_report = cache_report

    async def whole(self, updates: AsyncGenerator[Update, None]) -> dict[str, Any]:
        async with aclosing(updates):
            answer = (await anext(updates)).answer
        raise_if_refused(answer.finish)
        said = self._plan.new_reader().read(answer.text)
        content: list[dict[str, Any]] = []
        if said.reasoning:
            content.append({"type": "thinking", "thinking": said.reasoning, "signature": ""})
        if said.text:
            content.append({"type": "text", "text": said.text})
        for call in said.calls:
            block = _tool_use(call.name)
            content.append({**block, "input": _input(call.arguments)})
        return {
            **self._head(answer),
            "content": content,
            **_ending(answer, called=bool(said.calls)),
            "usage": self._usage(answer),
        }

    async def events(self, updates: AsyncGenerator[Update, None]) -> AsyncGenerator[bytes, None]:
        blocks = _Blocks(self._plan)
        started = False
        async with aclosing(updates):
            try:
                async for update in updates:
                    answer = update.answer
                    raise_if_refused(answer.finish)
                    if not started:
                        started = True
                        yield _event("message_start", message=self._opening(answer))
                        yield _event("ping")
                    for chunk in blocks.events(update):
                        yield chunk
                    if answer.finish is not None:
                        delta = _ending(answer, called=blocks.called)
                        yield _event("message_delta", delta=delta, usage=self._usage(answer))
                        yield _event("message_stop")
            except (RequestError, Overloaded, EngineFailed, Aborted) as error:
                yield named_event("error", anthropic_of(flat_of(error)))

    def _head(self, answer: Answer) -> dict[str, Any]:
        return {
            "id": answer.call_id,
            "type": "message",
            "role": "assistant",
            "model": self._model,
        }

    def _opening(self, answer: Answer) -> dict[str, Any]:
        end = {"stop_reason": None, "stop_sequence": None}
        usage = {**self._usage(answer), "output_tokens": 0}
        return {**self._head(answer), "content": [], **end, "usage": usage}

    def _usage(self, answer: Answer) -> dict[str, Any]:
        cached = answer.cached_tokens if self._cache_report else 0
        return {
            "input_tokens": answer.prompt_tokens - cached,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": cached,
            "output_tokens": answer.completion_tokens,
        }


class _Blocks:
    """The content blocks of a stream, one open at a time."""

    def __init__(self, plan: ChatPlan) -> None:
        self._reader = plan.new_reader()
        self._kind: str | None = None  # of the open block
        self._index = -1
        self.called = False

    def events(self, update: Update) -> Iterator[bytes]:
        pieces = self._reader.feed(update.new_text)
        if update.answer.finish is not None:
            pieces += self._reader.finish()
        for piece in pieces:
            yield from self._told(piece)
        if update.answer.finish is not None:
            yield from self._close()

    def _told(self, piece: Piece) -> Iterator[bytes]:
        match piece:
            case CallStart():
                self.called = True
                yield from self._open("tool_use", _tool_use(piece.name))
            case CallArguments():
                yield self._delta("input_json_delta", partial_json=piece.text)
            case Reasoning():
                if self._kind != "thinking":
                    block = {"type": "thinking", "thinking": "", "signature": ""}
                    yield from self._open("thinking", block)
                yield self._delta("thinking_delta", thinking=piece.text)
            case _:
                if self._kind != "text":
                    yield from self._open("text", {"type": "text", "text": ""})
                yield self._delta("text_delta", text=piece.text)

    def _open(self, kind: str, block: dict[str, Any]) -> Iterator[bytes]:
        yield from self._close()
        self._kind = kind
        self._index += 1
        yield _event("content_block_start", index=self._index, content_block=block)

    def _close(self) -> Iterator[bytes]:
        if self._kind == "thinking":
            yield self._delta("signature_delta", signature="")
        if self._kind is not None:
            self._kind = None
            yield _event("content_block_stop", index=self._index)

    def _delta(self, kind: str, **fields: Any) -> bytes:
        delta = {"type": kind, **fields}
        return _event("content_block_delta", index=self._index, delta=delta)


def _event(kind: str, **fields: Any) -> bytes:
    return named_event(kind, {"type": kind, **fields})


def _tool_use(name: str) -> dict[str, Any]:
    return {"type": "tool_use", "id": new_tool_use_id(), "name": name, "input": {}}


def _input(arguments: str) -> dict[str, Any]:
    """An object; empty for what is none, as when the answer was cut off inside."""
    try:
        loaded = json.loads(arguments)
    except ValueError:
        return {}
    return loaded if isinstance(loaded, dict) else {}


def _ending(answer: Answer, *, called: bool) -> dict[str, Any]:
    finish = answer.finish
    assert finish is not None
    # The client's stop strings are all that is matched as text.
    sequence = finish.matched if isinstance(finish.matched, str) else None
    if finish.type == "length":
        reason = "max_tokens"
    elif sequence is not None:
        reason = "stop_sequence"
    else:
        reason = "tool_use" if called else "end_turn"
    return {"stop_reason": reason, "stop_sequence": sequence}
