"""The grammars made of tools, in the library that follows them: what the model may write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sglang.srt.constrained.factory import load_backend
from sglang.srt.constrained.grammar import Grammar, GrammarBackend, words_for
from sglang.srt.entrypoints.json_body import checked
from sglang.srt.entrypoints.openai.protocol import Tool
from sglang.srt.entrypoints.openai.tools import ToolPlan
from sglang.srt.server_args import ServerArgs

VOCAB_SIZE = 49152
CITY = {
    "type": "object",
    "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}},
    "required": ["city"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def backend(smollm2_path: Path, tokenizer: Any) -> GrammarBackend:
    args = ServerArgs(model_path=str(smollm2_path))
    return load_backend(args, VOCAB_SIZE, frozenset({tokenizer.eos_token_id}))


def may_write(backend: GrammarBackend, tokenizer: Any, plan: ToolPlan, text: str) -> bool:
    """Whether the grammar lets the model write the text, and then end."""
    assert plan.constraint is not None
    matcher = backend.compile(Grammar(plan.constraint.name, plan.constraint.value)).matcher()  # type: ignore[arg-type]
    for token in tokenizer(text, add_special_tokens=False)["input_ids"]:
        if not matcher.accept(token):
            return False
    words = np.zeros(words_for(backend.vocab_size), np.int32)
    matcher.fill(words)
    end = tokenizer.eos_token_id
    return bool(words.view(np.uint32)[end >> 5] >> (end & 31) & 1)


def plan_of(choice: str, *, strict: bool) -> ToolPlan:
    function = {"name": "get_weather", "parameters": CITY, "strict": strict}
    tools = [checked(Tool, {"type": "function", "function": function})]
    return ToolPlan.of(tools, choice, parser_name="hermes")


def call(name: str, arguments: str) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


@pytest.mark.parametrize(
    ("text", "allowed"),
    [
        ("It rains.", True),
        ("", True),
        ("Look: " + call("get_weather", '{"city": "Rome"}'), True),
        (call("get_weather", '{"city": "Bonn"}'), False),
        (call("rm", "{}"), False),
    ],
)
def test_strict_tools(backend: GrammarBackend, tokenizer: Any, text: str, allowed: bool) -> None:
    plan = plan_of("auto", strict=True)
    assert may_write(backend, tokenizer, plan, text) is allowed


@pytest.mark.parametrize(
    ("text", "allowed"),
    [
        ('[{"name": "get_weather", "parameters": {"city": "Rome"}}]', True),
        ('[{"name": "get_weather", "parameters": {"city": "Bonn"}}]', False),
        ("It rains.", False),
        ("[]", False),
    ],
)
def test_required_tools(backend: GrammarBackend, tokenizer: Any, text: str, allowed: bool) -> None:
    plan = plan_of("required", strict=False)
    assert may_write(backend, tokenizer, plan, text) is allowed
