"""<think> ... </think> before the answer, the first tag perhaps written by the chat template."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from sglang.srt.parsers.pieces import Message, Piece, Reasoning, Text, joined

OPEN = "<think>"
CLOSE = "</think>"


@dataclass(frozen=True, slots=True)
class ThinkTags:
    """One model family's habit. thinks_first: answers begin inside, with or without the tag."""

    thinks_first: bool

    def parser(self, prompt: str = "") -> ReasoningParser:
        """For one answer. The prompt's end says more than habit: templates write tags, too."""
        end = prompt.rstrip()
        inside = end.endswith(OPEN) or (self.thinks_first and not end.endswith(CLOSE))
        return ReasoningParser(inside)

    def parse(self, text: str) -> Message:
        """The whole text at once."""
        parser = self.parser()
        return joined([*parser.feed(text), *parser.finish()])


class ReasoningParser:
    """Tells thoughts from the answer, however the text is cut. Whitespace at tags is dropped."""

    def __init__(self, inside: bool) -> None:
        self._inside = inside
        self._text = ""  # not told yet
        self._step: Callable[[], Piece | None] = self._at_start
        self.closed = not inside  # whether thinking, if there was any, is over

    def feed(self, text: str) -> list[Piece]:
        """What is known now that was not before."""
        self._text += text
        pieces: list[Piece] = []
        step = None
        while step != self._step:  # until no step leads to another
            step = self._step
            piece = step()
            if piece is not None:
                pieces.append(piece)
        return pieces

    def finish(self) -> list[Piece]:
        """The text has ended: what is left."""
        text, self._text = self._text, ""
        if self._step == self._thinking or (self._step == self._at_start and self._inside):
            text = text.strip() if self._step == self._at_start else text.rstrip()
            return [Reasoning(text)] if text else []
        if self._step == self._after_thinking:
            text = text.lstrip()
        return [Text(text)] if text else []

    def _at_start(self) -> Piece | None:
        text = self._text.lstrip()
        if text.startswith(OPEN):
            self._text = text.removeprefix(OPEN)
            self.closed = False
            self._step = self._before_thoughts
        elif text and not OPEN.startswith(text):
            self._step = self._before_thoughts if self._inside else self._answering
        return None

    def _before_thoughts(self) -> Piece | None:
        self._text = self._text.lstrip()
        if self._text:
            self._step = self._thinking
        return None

    def _thinking(self) -> Piece | None:
        thoughts, close, rest = self._text.partition(CLOSE)
        if close:
            thoughts = thoughts.rstrip()
            self._text = rest
            self.closed = True
            self._step = self._after_thinking
        else:
            end = len(thoughts) - _open_end(thoughts)
            thoughts, self._text = thoughts[:end], thoughts[end:]
        return Reasoning(thoughts) if thoughts else None

    def _after_thinking(self) -> Piece | None:
        self._text = self._text.lstrip()
        if self._text:
            self._step = self._answering
        return None

    def _answering(self) -> Piece | None:
        text, self._text = self._text, ""
        return Text(text) if text else None


def _open_end(text: str) -> int:
    """Length of the end that may belong to a closing tag: whitespace, and the tag's beginning."""
    tag = next(n for n in range(len(CLOSE) - 1, -1, -1) if text.endswith(CLOSE[:n]))
    return len(text) - len(text[: len(text) - tag].rstrip())
