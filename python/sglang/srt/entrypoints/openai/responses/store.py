"""The responses that the server remembers."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

from sglang.srt.entrypoints.openai.protocol import ChatMessage
from sglang.srt.errors import NotFound

MAX_RESPONSES = 1000


@dataclass(slots=True, eq=False)
class Stored:
    """conversation: all turns up to and with this response's. task: runs it in the background."""

    response: dict[str, Any]
    conversation: list[ChatMessage] = field(default_factory=list)
    task: asyncio.Task[None] | None = None


class ResponseStore:
    """Keeps the newest; the oldest are forgotten, but none that still runs."""

    def __init__(self, max_responses: int = MAX_RESPONSES) -> None:
        self._max = max_responses
        self._stored: OrderedDict[str, Stored] = OrderedDict()

    def __len__(self) -> int:
        return len(self._stored)

    def __contains__(self, response_id: str) -> bool:
        return response_id in self._stored

    def put(self, stored: Stored) -> None:
        self._stored[stored.response["id"]] = stored
        for response_id, old in list(self._stored.items()):
            if len(self._stored) <= self._max:
                break
            if old.task is None or old.task.done():
                del self._stored[response_id]

    def get(self, response_id: str, field: str = "response_id") -> Stored:
        """Raises NotFound naming the field."""
        stored = self._stored.get(response_id)
        if stored is None:
            raise NotFound(f"{field}: no response {response_id!r} is stored on this server", field)
        return stored
