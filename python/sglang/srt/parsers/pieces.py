"""What an answer's text turns out to be, piece by piece."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Text:
    """More of what the user is to read."""

    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    """More of the model's thoughts."""

    text: str


@dataclass(frozen=True, slots=True)
class CallStart:
    """The model calls a tool; `index` counts the calls of one answer from 0."""

    index: int
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """More of a call's arguments: JSON text as the model wrote it."""

    index: int
    text: str


Piece = Text | Reasoning | CallStart | CallArguments


@dataclass(slots=True)
class ToolCall:
    """A whole call. `arguments` is JSON text, not checked: a model may be cut off, or err."""

    name: str
    arguments: str = ""


@dataclass(slots=True)
class Message:
    """A whole answer."""

    reasoning: str = ""
    text: str = ""
    calls: list[ToolCall] = field(default_factory=list)


def joined(pieces: Iterable[Piece]) -> Message:
    """The answer that was told in pieces."""
    message = Message()
    for piece in pieces:
        match piece:
            case Text():
                message.text += piece.text
            case Reasoning():
                message.reasoning += piece.text
            case CallStart():
                message.calls.append(ToolCall(piece.name))
            case CallArguments():
                message.calls[piece.index].arguments += piece.text
    return message
