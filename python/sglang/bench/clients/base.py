"""The seam between the runner and the wire formats."""

from __future__ import annotations

from typing import Protocol

from sglang.bench.records import Answer
from sglang.bench.workload import Turn


class Dialogue(Protocol):
    """One conversation with the server; it remembers what was said."""

    async def ask(self, turn: Turn) -> Answer:
        """Sends the history and this turn. Never raises for what the server or the network
        does: the answer's `error` says it."""
        ...


class Client(Protocol):
    def open_dialogue(self) -> Dialogue: ...


class AnswerReader(Protocol):
    """Understands the payloads of one wire format, for one answer.

    tokens_seen: output tokens so far. error: not empty once the server has reported one.
    """

    tokens_seen: int
    error: str

    def event(self, payload: bytes) -> None:
        """One payload of a streamed answer."""
        ...

    def whole(self, payload: bytes) -> None:
        """The body of an answer that is not streamed."""
        ...

    def fill(self, answer: Answer) -> None:
        """After the last payload: text, counts and, if the answer failed, its error."""
        ...
