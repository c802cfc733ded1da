"""Llama 3.x: the whole answer is {"name": ..., "parameters": {...}}, or follows <|python_tag|>.

Several calls are written one after the other, with or without a semicolon between.
"""

from __future__ import annotations

from collections.abc import Collection

from sglang.srt.parsers.tool_calls.base import ToolCallParser
from sglang.srt.parsers.tool_calls.json_scan import WHITESPACE


class Llama3Parser(ToolCallParser):
    mark = "<|python_tag|>"
    mark_is_special = True

    def __init__(self, tool_names: Collection[str]) -> None:
        super().__init__(tool_names)
        self._step = self._at_start

    def _at_start(self, char: str) -> None:
        if char in WHITESPACE:
            self._raw.append(char)
        elif char == "{":
            self._open_object(char)
        else:
            before, self._raw = self._raw, []
            self._step = self._in_text
            for one in [*before, char]:
                self._step(one)

    def _after_call(self, char: str) -> None:
        if char == "{":
            self._open_object(char)
        elif char != ";":
            super()._after_call(char)
