"""Formats of tool calls by the names that --tool-call-parser takes."""

from __future__ import annotations

from sglang.srt.parsers.tool_calls.base import ToolCallParser
from sglang.srt.parsers.tool_calls.hermes import HermesParser
from sglang.srt.parsers.tool_calls.llama3 import Llama3Parser
from sglang.srt.parsers.tool_calls.mistral import MistralParser

TOOL_CALL_PARSERS: dict[str, type[ToolCallParser]] = {
    "hermes": HermesParser,
    "llama3": Llama3Parser,
    "mistral": MistralParser,
    "qwen": HermesParser,
    "qwen25": HermesParser,
}
