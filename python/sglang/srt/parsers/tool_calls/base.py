"""What the formats of tool calls have in common.

A parser is a machine over characters: however the text is cut into pieces, it goes through the
same states and says the same. What does not turn out to be a call of a known tool is text, exactly
as the model wrote it; whitespace around calls is dropped.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from typing import ClassVar

from sglang.srt.parsers.pieces import CallArguments, CallStart, Message, Piece, Text, joined
from sglang.srt.parsers.tool_calls.json_scan import WHITESPACE, CallObject

_Step = Callable[[str], None]

_SPACE = re.compile(r"\s")


class ToolCallParser:
    """Reads one answer. `feed` it the text as it comes, then `finish`.

    mark: opens a call. mark_is_special: it is a special token, which must not be skipped.
    frame: what stands before and behind the arguments, NAME for the name; None if a grammar cannot
    hold the model to it.
    """

    mark: ClassVar[str] = ""
    mark_is_special: ClassVar[bool] = False
    frame: ClassVar[tuple[str, str] | None] = None

    def __init__(self, tool_names: Collection[str]) -> None:
        self._is_tool = frozenset(tool_names).__contains__
        self._step: _Step = self._in_text
        self._held = ""  # may be whitespace before a mark, and the beginning of one
        self._raw: list[str] = []  # of what may be a call, until it is one
        self._object = CallObject(self._is_tool)
        self._calls = 0
        self._announced = False
        self._spoken: list[str] = []  # of the text behind the last piece
        self._pieces: list[Piece] = []

    def feed(self, text: str) -> list[Piece]:
        """What is known now that was not before."""
        at = 0
        while at < len(text):
            # Most of most answers: words that no mark begins with.
            if not self._held and self._step == self._in_text:
                plain = _end_of_plain(text, at, self.mark[:1])
                self._say(text[at:plain])
                at = plain
                if at == len(text):
                    break
            self._step(text[at])
            at += 1
        return self._collected()

    def finish(self) -> list[Piece]:
        """The text has ended: what is left. A call that was cut off keeps what it has."""
        if self._raw:
            self._give_up()
        self._say(self._unfinished())
        self._held = ""
        return self._collected()

    @classmethod
    def parse(cls, text: str, tool_names: Collection[str]) -> Message:
        """The whole text at once."""
        parser = cls(tool_names)
        return joined([*parser.feed(text), *parser.finish()])

    def _unfinished(self) -> str:
        """Held characters that are text now that nothing follows."""
        return self._held if self._step == self._in_text else ""

    def _collected(self) -> list[Piece]:
        if self._announced:
            self._say_arguments()
        self._end_text()
        pieces, self._pieces = self._pieces, []
        return pieces

    def _in_text(self, char: str) -> None:
        held = self._held + char
        start = 0
        while start < len(held) and not self.mark.startswith(held[start:].lstrip()):
            start += 1
        self._say(held[:start])
        self._held = held[start:]
        if self.mark and self._held.lstrip() == self.mark:
            self._raw = list(self._held)
            self._held = ""
            self._step = self._opened

    def _opened(self, char: str) -> None:
        """After a mark."""
        if char == "{":
            self._open_object(char)
        elif char in WHITESPACE:
            self._raw.append(char)
        else:
            self._give_up()
            self._step(char)

    def _open_object(self, char: str) -> None:
        self._raw.append(char)
        self._object = CallObject(self._is_tool)
        self._step = self._in_object

    def _in_object(self, char: str) -> None:
        call = self._object
        belongs = call.take(char)
        if call.broken:
            self._give_up()
        elif call.committed:
            if not self._announced:
                assert call.name is not None
                self._announce(call.name)
            if call.done:
                self._end_call()
        elif belongs:
            self._raw.append(char)
        if not belongs:
            self._step(char)

    def _announce(self, name: str) -> None:
        self._announced = True
        self._raw.clear()
        self._end_text()
        self._pieces.append(CallStart(self._calls, name))

    def _say_arguments(self) -> None:
        text = self._object.new_arguments()
        if text:
            self._pieces.append(CallArguments(self._calls, text))

    def _end_call(self) -> None:
        self._say_arguments()
        self._announced = False
        self._calls += 1
        self._step = self._after_call

    def _after_call(self, char: str) -> None:
        """Whitespace is dropped; the rest is text, or the next call."""
        if char not in WHITESPACE:
            self._step = self._in_text
            self._step(char)

    def _give_up(self) -> None:
        """What looked like a call is text."""
        raw, self._raw = "".join(self._raw), []
        self._say(raw)
        self._step = self._in_text

    def _say(self, text: str) -> None:
        if text:
            self._spoken.append(text)

    def _end_text(self) -> None:
        if self._spoken:
            self._pieces.append(Text("".join(self._spoken)))
            self._spoken.clear()


def _end_of_plain(text: str, start: int, beginning: str) -> int:
    """Where the first whitespace is, or the first character that may begin a mark."""
    found = _SPACE.search(text, start)
    end = found.start() if found else len(text)
    marked = text.find(beginning, start, end) if beginning else -1
    return end if marked < 0 else marked
