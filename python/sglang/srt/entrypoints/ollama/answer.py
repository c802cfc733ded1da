"""An answer in Ollama's form: whole, or as lines of JSON."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from datetime import UTC, datetime
from typing import Any

import orjson

from sglang.srt.entrypoints.error_forms import Aborted, flat_of, raise_if_refused
from sglang.srt.entrypoints.openai.chat_plan import ChatPlan
from sglang.srt.errors import Overloaded, RequestError
from sglang.srt.managers.answers import Answer, Update
from sglang.srt.managers.call import EngineFailed
from sglang.srt.parsers.pieces import CallArguments, CallStart, Message, Piece, joined

# What was said, as fields of a result.
Form = Callable[[Message], dict[str, Any]]


def in_chat(said: Message) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": said.text}
    if said.reasoning:
        message["thinking"] = said.reasoning
    if said.calls:
        message["tool_calls"] = [
            {"function": {"name": call.name, "arguments": _loaded(call.arguments)}}
            for call in said.calls
        ]
    return {"message": message}


def in_generate(said: Message) -> dict[str, Any]:
    thinking = {"thinking": said.reasoning} if said.reasoning else {}
    return {"response": said.text, **thinking}


async def whole(
    updates: AsyncGenerator[Update, None], plan: ChatPlan, model: str, form: Form
) -> dict[str, Any]:
    async with aclosing(updates):
        answer = (await anext(updates)).answer
    raise_if_refused(answer.finish)
    return {**_head(model), **form(plan.new_reader().read(answer.text)), **_end(answer)}


async def lines(
    updates: AsyncGenerator[Update, None], plan: ChatPlan, model: str, form: Form
) -> AsyncGenerator[bytes, None]:
    """Calls of tools are not cut into pieces in this API: they come whole, with the last line."""
    reader = plan.new_reader()
    calls: list[Piece] = []
    async with aclosing(updates):
        try:
            async for update in updates:
                raise_if_refused(update.answer.finish)
                pieces = reader.feed(update.new_text)
                ended = update.answer.finish is not None
                if ended:
                    pieces += reader.finish()
                calls += [p for p in pieces if isinstance(p, CallStart | CallArguments)]
                said = joined(p for p in pieces if not isinstance(p, CallStart | CallArguments))
                if ended:
                    said.calls = joined(calls).calls
                    yield _line({**_head(model), **form(said), **_end(update.answer)})
                elif said.text or said.reasoning:
                    yield _line({**_head(model), **form(said), "done": False})
        except (RequestError, Overloaded, EngineFailed, Aborted) as error:
            yield _line({"error": flat_of(error)["message"]})


def timestamp(unix_s: float) -> str:
    return datetime.fromtimestamp(unix_s, UTC).isoformat()


def _line(payload: dict[str, Any]) -> bytes:
    return orjson.dumps(payload) + b"\n"


def _head(model: str) -> dict[str, Any]:
    return {"model": model, "created_at": timestamp(time.time())}


def _end(answer: Answer) -> dict[str, Any]:
    """Durations are in nanoseconds."""
    assert answer.finish is not None
    first_s = answer.first_token_s or answer.finished_s or answer.started_s
    return {
        "done": True,
        "done_reason": answer.finish.type,
        "total_duration": int((answer.e2e_latency_s or 0.0) * 1e9),
        "load_duration": 0,
        "prompt_eval_count": answer.prompt_tokens,
        "prompt_eval_duration": int((first_s - answer.started_s) * 1e9),
        "eval_count": answer.completion_tokens,
        "eval_duration": int(((answer.finished_s or first_s) - first_s) * 1e9),
    }


def _loaded(arguments: str) -> Any:
    """An object; empty for what is none, as when the answer was cut off inside."""
    try:
        return orjson.loads(arguments)
    except orjson.JSONDecodeError:
        return {}
