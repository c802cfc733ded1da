"""[{"name": ..., "parameters": {...}}, ...]: what a schema makes of any model.

With tool_choice required, or a named tool, generation is constrained to this, and the model's own
format does not matter.
"""

from __future__ import annotations

from collections.abc import Collection

from sglang.srt.parsers.tool_calls.base import ToolCallParser
from sglang.srt.parsers.tool_calls.json_scan import WHITESPACE


class ArrayOfCalls(ToolCallParser):
    """Calls in an array: what follows an opening bracket."""

    def __init__(self, tool_names: Collection[str]) -> None:
        super().__init__(tool_names)
        self._in_array = False

    def _open_array(self, char: str) -> None:
        self._raw.append(char)
        self._in_array = True
        self._step = self._before_item

    def _before_item(self, char: str) -> None:
        if char == "{":
            self._open_object(char)
        elif char in WHITESPACE:
            if self._raw:
                self._raw.append(char)
        else:
            self._give_up()
            self._step(char)

    def _give_up(self) -> None:
        self._in_array = False
        super()._give_up()

    def _after_call(self, char: str) -> None:
        if not self._in_array:
            super()._after_call(char)
        elif char == ",":
            self._step = self._before_item
        elif char == "]":
            self._in_array = False
        elif char not in WHITESPACE:
            self._in_array = False
            super()._after_call(char)


class JsonArrayParser(ArrayOfCalls):
    def __init__(self, tool_names: Collection[str]) -> None:
        super().__init__(tool_names)
        self._step = self._at_start

    def _at_start(self, char: str) -> None:
        if char == "[":
            self._open_array(char)
        elif char in WHITESPACE:
            self._raw.append(char)
        else:
            self._give_up()
            self._step(char)
