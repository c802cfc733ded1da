"""One response from its request to its end: whole, as a stream, or in the background."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from typing import Any

from sglang.srt.entrypoints.error_forms import Aborted, flat_of, raise_if_refused
from sglang.srt.entrypoints.openai.chat_plan import ChatPlan
from sglang.srt.entrypoints.openai.protocol import ChatMessage
from sglang.srt.entrypoints.openai.responses.output import Event, Output
from sglang.srt.entrypoints.openai.responses.protocol import ResponsesBody
from sglang.srt.entrypoints.openai.responses.store import Stored
from sglang.srt.entrypoints.server_state import ServerState
from sglang.srt.entrypoints.streaming import named_event
from sglang.srt.errors import Overloaded, RequestError
from sglang.srt.managers.answers import Answer, Update
from sglang.srt.managers.call import EngineFailed

_FAILURES = (RequestError, Overloaded, EngineFailed, Aborted)


class ResponseRun:
    """`stored.response` is the response as far as it has come."""

    def __init__(
        self,
        body: ResponsesBody,
        state: ServerState,
        plan: ChatPlan,
        response_id: str,
        conversation: list[ChatMessage],
    ) -> None:
        self._state = state
        self._plan = plan
        self._reader = plan.new_reader()
        self._output = Output()
        self.stored = Stored(self._opening(body, response_id), conversation)
        self._sequence = 0

    def updates(self, *, stream: bool) -> AsyncGenerator[Update, None]:
        rid = self.stored.response["id"]
        return self._state.manager.generate([self._plan.prompt], rid=rid, stream=stream)

    async def whole(self, updates: AsyncGenerator[Update, None]) -> None:
        """Runs to the end. Raises Aborted for what the engine refuses."""
        async with aclosing(updates):
            async for update in updates:
                raise_if_refused(update.answer.finish)
                for _ in self._taken(update):
                    pass

    async def in_background(self) -> None:
        """Runs to the end, to a failure, or until it is cancelled; the response says which."""
        self.stored.response["status"] = "in_progress"
        try:
            await self.whole(self.updates(stream=False))
        except _FAILURES as error:
            self._fail(error)
        except asyncio.CancelledError:
            self.stored.response["status"] = "cancelled"
            raise

    async def events(self, updates: AsyncGenerator[Update, None]) -> AsyncGenerator[bytes, None]:
        response = self.stored.response
        yield self._sent({"type": "response.created", "response": response})
        yield self._sent({"type": "response.in_progress", "response": response})
        async with aclosing(updates):
            try:
                async for update in updates:
                    raise_if_refused(update.answer.finish)
                    for event in self._taken(update):
                        yield self._sent(event)
                yield self._sent({"type": f"response.{response['status']}", "response": response})
            except _FAILURES as error:
                self._fail(error)
                yield self._sent({"type": "response.failed", "response": response})
            finally:
                if response["status"] == "in_progress":  # its client has left
                    response["status"] = "cancelled"

    def _taken(self, update: Update) -> Iterator[Event]:
        yield from self._output.take(self._reader.feed(update.new_text))
        finish = update.answer.finish
        if finish is None:
            return
        yield from self._output.take(self._reader.finish())
        cut_off = finish.type == "length"
        yield from self._output.end("incomplete" if cut_off else "completed")
        response = self.stored.response
        response["output"] = self._output.items
        response["usage"] = self._usage(update.answer)
        if cut_off:
            response["incomplete_details"] = {"reason": "max_output_tokens"}
        aborted = finish.type == "abort"
        response["status"] = "incomplete" if cut_off else "cancelled" if aborted else "completed"
        response["completed_at"] = int(time.time())
        self.stored.conversation.append(self._output.as_message())

    def _fail(self, error: Exception) -> None:
        self.stored.response["status"] = "failed"
        code = "server_error" if flat_of(error)["code"] >= 500 else "invalid_prompt"
        self.stored.response["error"] = {"code": code, "message": flat_of(error)["message"]}

    def _sent(self, event: Event) -> bytes:
        numbered = {**event, "sequence_number": self._sequence}
        self._sequence += 1
        return named_event(event["type"], numbered)

    def _usage(self, answer: Answer) -> dict[str, Any]:
        report = self._state.args.enable_cache_report
        return {
            "input_tokens": answer.prompt_tokens,
            "input_tokens_details": {"cached_tokens": answer.cached_tokens if report else 0},
            "output_tokens": answer.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": self._plan.count_reasoning(answer)},
            "total_tokens": answer.prompt_tokens + answer.completion_tokens,
        }

    def _opening(self, body: ResponsesBody, response_id: str) -> dict[str, Any]:
        """The response before it has begun; what the request said of itself is in it."""
        sampling = self._plan.prompt.sampling
        return {
            "id": response_id,
            "object": "response",
            "created_at": int(time.time()),
            "model": body.model or self._state.args.model_name,
            "status": "queued" if body.background else "in_progress",
            "background": bool(body.background),
            "output": [],
            "usage": None,
            "error": None,
            "incomplete_details": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": body.previous_response_id,
            "reasoning": body.reasoning.model_dump() if body.reasoning else None,
            "store": body.store is not False,
            "temperature": sampling.temperature,
            "text": {"format": (body.text.format if body.text else None) or {"type": "text"}},
            "tool_choice": body.tool_choice or "auto",
            "tools": body.tools or [],
            "top_p": sampling.top_p,
            "truncation": "disabled",
            "user": body.user,
        }
