"""<tool_call>{"name": ..., "arguments": {...}}</tool_call>: Hermes, Qwen 2.5 and Qwen 3."""

from __future__ import annotations

from sglang.srt.parsers.tool_calls.base import ToolCallParser

_CLOSE = "</tool_call>"


class HermesParser(ToolCallParser):
    mark = "<tool_call>"
    frame = ('<tool_call>\n{"name": "NAME", "arguments": ', "}\n</tool_call>")

    def _end_call(self) -> None:
        super()._end_call()
        self._step = self._closing

    def _closing(self, char: str) -> None:
        held = self._held + char
        tag = held.lstrip()
        if tag == _CLOSE:
            self._held = ""
            self._step = self._after_call
        elif _CLOSE.startswith(tag):
            self._held = held
        else:  # models forget the tag, but not the next call
            self._held = ""
            self._step = self._after_call
            for one in held:
                self._step(one)
