"""An answer as output items, which grow with it, and as the events that tell of their growth."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any
from uuid import uuid4

from sglang.srt.entrypoints.openai.protocol import CalledFunction, ChatMessage, MessageToolCall
from sglang.srt.parsers.pieces import CallArguments, CallStart, Piece, Reasoning

Event = dict[str, Any]  # with its type, without its sequence number


class Output:
    """items: as the response lists them; all but the last are complete."""

    def __init__(self) -> None:
        self.items: list[dict[str, Any]] = []
        self._open: str | None = None  # type of the last item while it grows

    def take(self, pieces: Iterable[Piece]) -> Iterator[Event]:
        """Must be iterated to its end."""
        for piece in pieces:
            match piece:
                case CallStart():
                    yield from self._start("function_call", _call(piece.name))
                case CallArguments():
                    self.items[-1]["arguments"] += piece.text
                    yield self._event("function_call_arguments.delta", delta=piece.text)
                case Reasoning():
                    yield from self._grow("reasoning", piece.text)
                case _:
                    yield from self._grow("message", piece.text)

    def end(self, status: str = "completed") -> Iterator[Event]:
        """Closes the last item. Must be iterated to its end."""
        if self._open is None:
            return
        item = self.items[-1]
        if self._open == "function_call":
            arguments = item["arguments"]
            done = self._event("function_call_arguments.done", arguments=arguments)
            yield {**done, "name": item["name"]}
        else:
            part = item["content"][0]
            name = "reasoning_text" if self._open == "reasoning" else "output_text"
            extra: dict[str, Any] = {} if self._open == "reasoning" else {"logprobs": []}
            yield self._event(f"{name}.done", content_index=0, text=part["text"], **extra)
            yield self._event("content_part.done", content_index=0, part=dict(part))
        item["status"] = status
        self._open = None
        yield self._item_event("output_item.done")

    def as_message(self) -> ChatMessage:
        """The assistant's turn, for a conversation that goes on."""
        message = ChatMessage(role="assistant", content="")
        calls = []
        for item in self.items:
            match item:
                case {"type": "message"}:
                    message.content = f"{message.content}{item['content'][0]['text']}"
                case {"type": "reasoning"}:
                    message.reasoning_content = item["content"][0]["text"]
                case {"type": "function_call"}:
                    called = CalledFunction(name=item["name"], arguments=item["arguments"])
                    calls.append(MessageToolCall(id=item["call_id"], function=called))
        message.tool_calls = calls or None
        return message

    def _grow(self, kind: str, text: str) -> Iterator[Event]:
        name = "reasoning_text" if kind == "reasoning" else "output_text"
        if self._open != kind:
            yield from self._start(kind, _reasoning() if kind == "reasoning" else _message())
            part: dict[str, Any] = {"type": name, "text": ""}
            if kind == "message":
                part |= {"annotations": [], "logprobs": []}
            self.items[-1]["content"] = [part]
            yield self._event("content_part.added", content_index=0, part=dict(part))
        self.items[-1]["content"][0]["text"] += text
        extra: dict[str, Any] = {} if kind == "reasoning" else {"logprobs": []}
        yield self._event(f"{name}.delta", content_index=0, delta=text, **extra)

    def _start(self, kind: str, item: dict[str, Any]) -> Iterator[Event]:
        yield from self.end()
        self._open = kind
        self.items.append(item)
        yield self._item_event("output_item.added")

    def _item_event(self, name: str) -> Event:
        where = {"output_index": len(self.items) - 1}
        return {"type": f"response.{name}", **where, "item": dict(self.items[-1])}

    def _event(self, name: str, **fields: Any) -> Event:
        where = {"item_id": self.items[-1]["id"], "output_index": len(self.items) - 1}
        return {"type": f"response.{name}", **where, **fields}


def _message() -> dict[str, Any]:
    return {
        "type": "message",
        "id": f"msg_{uuid4().hex}",
        "role": "assistant",
        "status": "in_progress",
        "content": [],
    }


def _reasoning() -> dict[str, Any]:
    return {
        "type": "reasoning",
        "id": f"rs_{uuid4().hex}",
        "summary": [],
        "content": [],
        "status": "in_progress",
    }


def _call(name: str) -> dict[str, Any]:
    return {
        "type": "function_call",
        "id": f"fc_{uuid4().hex}",
        "call_id": f"call_{uuid4().hex[:24]}",
        "name": name,
        "arguments": "",
        "status": "in_progress",
    }
