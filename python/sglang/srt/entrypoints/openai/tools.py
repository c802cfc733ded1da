"""What a request's tools mean for prompt, sampling and the reading of the answer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sglang.srt.entrypoints.openai.output_format import Constraint, schema_constraint
from sglang.srt.entrypoints.openai.protocol import Tool
from sglang.srt.errors import RequestError
from sglang.srt.parsers.tool_calls import TOOL_CALL_PARSERS
from sglang.srt.parsers.tool_calls.base import ToolCallParser
from sglang.srt.parsers.tool_calls.json_array import JsonArrayParser


@dataclass(frozen=True, slots=True)
class ToolPlan:
    """for_template: what the chat template is told of. constraint: of generation; with `may_answer`
    it leaves the model to answer in words instead.

    parser: reads the answer; None if there is nothing to look for.
    """

    for_template: list[dict[str, Any]] | None = None
    constraint: Constraint | None = None
    parser: type[ToolCallParser] | None = None
    names: tuple[str, ...] = ()
    may_answer: bool = True

    @classmethod
    def of(
        cls,
        tools: Sequence[Tool] | None,
        choice: Any,
        *,
        parallel: bool = True,
        parser_name: str | None = None,
    ) -> ToolPlan:
        """choice: as OpenAI's tool_choice. Raises RequestError naming the field at fault.

        A call that must come is written as JSON by a schema, whatever the model's own format.
        """
        tools = tools or []
        wanted = _wanted(choice, tools)
        if wanted == "none" or not tools:
            return cls()
        for_template = template_tools(tools, choice)
        names = tuple(tool.function.name for tool in tools)
        if wanted == "auto":
            if parser_name is None:
                raise RequestError(
                    "tools: the server does not know how this model writes calls: start it with "
                    f"--tool-call-parser ({', '.join(TOOL_CALL_PARSERS)}), or give tool_choice "
                    "required, none or a function",
                    "tools",
                )
            parser = TOOL_CALL_PARSERS[parser_name]
            return cls(for_template, _strict_constraint(tools, parser), parser, names)
        callable_ones = [t for t in tools if wanted == "required" or t.function.name == wanted[0]]
        several = parallel and wanted == "required"
        schema = calls_schema(callable_ones, several=several)
        constraint = schema_constraint("tool_choice", schema)
        return cls(for_template, constraint, JsonArrayParser, names, may_answer=False)


def _strict_constraint(tools: Sequence[Tool], parser: type[ToolCallParser]) -> Constraint | None:
    """Holds calls, where the model makes any, to the schemas of strict tools."""
    if not any(tool.function.strict for tool in tools):
        return None
    if parser.frame is None:
        raise RequestError(
            "tools: strict cannot be kept in this model's format of calls; leave it out, or give "
            "tool_choice required or a function",
            "tools",
        )
    before, behind = parser.frame
    structures = [
        {
            "begin": before.replace("NAME", tool.function.name),
            "schema": (tool.function.parameters if tool.function.strict else None)
            or {"type": "object"},
            "end": behind,
        }
        for tool in tools
    ]
    tag = {"type": "structural_tag", "structures": structures, "triggers": [parser.mark]}
    return Constraint("tools", "structural_tag", json.dumps(tag, ensure_ascii=False))


def template_tools(tools: Sequence[Tool] | None, choice: Any) -> list[dict[str, Any]] | None:
    """What the chat template is told of. Raises RequestError for what is no tool_choice."""
    if not tools or _wanted(choice, tools) == "none":
        return None
    return [tool.model_dump(exclude_none=True) for tool in tools]


def calls_schema(tools: Sequence[Tool], *, several: bool) -> dict[str, Any]:
    """JSON schema of an array of calls; of a single one unless `several`."""
    calls = [
        {
            "type": "object",
            "properties": {
                "name": {"type": "string", "enum": [tool.function.name]},
                "parameters": tool.function.parameters or {"type": "object"},
            },
            "required": ["name", "parameters"],
            "additionalProperties": False,
        }
        for tool in tools
    ]
    schema: dict[str, Any] = {
        "type": "array",
        "minItems": 1,
        "items": calls[0] if len(calls) == 1 else {"anyOf": calls},
    }
    definitions = _hoisted(calls)
    if definitions:
        schema["$defs"] = definitions
    return schema if several else {**schema, "maxItems": 1}


def _hoisted(calls: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The tools' $defs, moved to where "#/$defs/..." looks for them.

    Raises RequestError if two tools mean different things by one name.
    """
    definitions: dict[str, Any] = {}
    for call in calls:
        parameters = call["properties"]["parameters"]
        if "$defs" not in parameters:
            continue
        for name, definition in parameters["$defs"].items():
            if definitions.setdefault(name, definition) != definition:
                raise RequestError(f"tools: $defs.{name} differs between two tools", "tools")
        rest = {key: value for key, value in parameters.items() if key != "$defs"}
        call["properties"]["parameters"] = rest
    return definitions


def _wanted(choice: Any, tools: Sequence[Tool]) -> str | tuple[str]:
    """ "auto", "required", "none", or the name of the one tool in a tuple."""
    field = "tool_choice"
    match choice:
        case None | "auto":
            return "auto"
        case "none":
            return "none"
        case "required":
            if not tools:
                raise RequestError(f"{field}: required needs tools", field)
            return "required"
        case {"type": "function", "function": {"name": str(name)}} | {
            "function": {"name": str(name)}
        }:
            if name not in [tool.function.name for tool in tools]:
                raise RequestError(f"{field}: {name!r} is not among the tools", field)
            return (name,)
        case _:
            raise RequestError(
                f'{field}: must be auto, required, none or {{"type": "function", "function": '
                '{"name": ...}}',
                field,
            )
