"""Mistral: [TOOL_CALLS][{"name": ..., "arguments": {...}}, ...], or [TOOL_CALLS]name[ARGS]{...}.

The second form is that of newer models, a mark for each call.
"""

from __future__ import annotations

from sglang.srt.parsers.pieces import CallArguments
from sglang.srt.parsers.tool_calls.json_array import ArrayOfCalls
from sglang.srt.parsers.tool_calls.json_scan import WHITESPACE, JsonValue

_ARGS = "[ARGS]"


class MistralParser(ArrayOfCalls):
    mark = "[TOOL_CALLS]"
    mark_is_special = True

    def _opened(self, char: str) -> None:
        if char == "[":
            self._open_array(char)
        elif char == "{" or char in WHITESPACE:
            super()._opened(char)
        else:
            self._header = char
            self._raw.append(char)
            self._step = self._in_header

    def _in_header(self, char: str) -> None:
        """The name, and [ARGS] unless the arguments follow at once."""
        name, bracket, tail = (self._header + char).partition("[")
        if char == "{":
            name = self._header.rstrip().removesuffix(_ARGS)
            if self._is_tool(name):
                self._announce(name)
                self._arguments = JsonValue(char)
                self._argument_text = [char]
                self._step = self._in_arguments
                return
        elif (
            _ARGS.startswith((bracket + tail).rstrip())
            if bracket
            else char.isalnum() or char in "_-."
        ):
            self._header += char
            self._raw.append(char)
            return
        self._give_up()
        self._step(char)

    def _in_arguments(self, char: str) -> None:
        self._arguments.take(char)
        self._argument_text.append(char)
        if self._arguments.done:
            self._end_call()

    def _say_arguments(self) -> None:
        if self._step != self._in_arguments:
            super()._say_arguments()
        elif self._argument_text:
            self._pieces.append(CallArguments(self._calls, "".join(self._argument_text)))
            self._argument_text.clear()
