"""Tool calls out of text: what each format means, and that cutting the text changes nothing."""

from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang.srt.parsers.pieces import CallArguments, CallStart, Message, ToolCall, joined
from sglang.srt.parsers.tool_calls import TOOL_CALL_PARSERS
from sglang.srt.parsers.tool_calls.base import ToolCallParser
from sglang.srt.parsers.tool_calls.json_array import JsonArrayParser

TOOLS = ("get_weather", "now")
PARSERS = {**TOOL_CALL_PARSERS, "json_array": JsonArrayParser}

PARIS = '{"city": "Paris"}'
WEATHER = ToolCall("get_weather", PARIS)
NOW = ToolCall("now", "{}")
HERMES_CALL = f'<tool_call>\n{{"name": "get_weather", "arguments": {PARIS}}}\n</tool_call>'
HERMES_NOW = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
LLAMA_CALL = f'{{"name": "get_weather", "parameters": {PARIS}}}'
LLAMA_NOW = '{"name": "now", "parameters": {}}'
MISTRAL_CALL = f'{{"name": "get_weather", "arguments": {PARIS}}}'
MISTRAL_NOW = '{"name": "now", "arguments": {}}'

MEANINGS: list[tuple[str, str, str, list[ToolCall]]] = [
    ("hermes", "Hello.", "Hello.", []),
    ("hermes", HERMES_CALL, "", [WEATHER]),
    ("hermes", f"Let me see.\n{HERMES_CALL}", "Let me see.", [WEATHER]),
    ("hermes", f"{HERMES_CALL}\n{HERMES_NOW}\n", "", [WEATHER, NOW]),
    ("hermes", f"a {HERMES_CALL} b {HERMES_NOW} c", "abc", [WEATHER, NOW]),
    ("hermes", HERMES_CALL.removesuffix("</tool_call>") + HERMES_NOW, "", [WEATHER, NOW]),
    ("hermes", HERMES_CALL.replace("}}", "}"), "", [WEATHER]),
    ("hermes", '<tool_call>{"name": "now"}</tool_call>', "", [NOW]),
    ("hermes", '<tool_call>{"name": "now", "arguments": null}</tool_call>', "", [NOW]),
    (
        "hermes",
        f'<tool_call>{{"arguments": {PARIS}, "name": "get_weather"}}</tool_call>',
        "",
        [WEATHER],
    ),
    (
        "hermes",
        f'<tool_call>{{"name": "get_weather", "arguments": {json.dumps(PARIS)}}}</tool_call>',
        "",
        [WEATHER],
    ),
    (
        "hermes",
        '<tool_call>{"name": "get_weather", "arguments": {"city": "}\\"]{</tool_call>"}}',
        "",
        [ToolCall("get_weather", '{"city": "}\\"]{</tool_call>"}')],
    ),
    (
        "hermes",
        '<tool_call>{"name": "rm_rf", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "rm_rf", "arguments": {}}</tool_call>',
        [],
    ),
    ("hermes", "<tool_call>get_weather", "<tool_call>get_weather", []),
    ("hermes", f"<tool_call>no{HERMES_NOW}", "<tool_call>no", [NOW]),
    ("hermes", '<tool_call>{"name": "now"', '<tool_call>{"name": "now"', []),
    (
        "hermes",
        '<tool_call>{"name": "get_weather", "arguments": {"city": "Pa',
        "",
        [ToolCall("get_weather", '{"city": "Pa')],
    ),
    ("hermes", "1 <tool 2 <", "1 <tool 2 <", []),
    ("qwen25", HERMES_CALL, "", [WEATHER]),
    ("llama3", "Hello {you}", "Hello {you}", []),
    ("llama3", LLAMA_CALL, "", [WEATHER]),
    ("llama3", f"\n{LLAMA_CALL}", "", [WEATHER]),
    ("llama3", f"<|python_tag|>{LLAMA_CALL}", "", [WEATHER]),
    ("llama3", f"<|python_tag|>{LLAMA_CALL};{LLAMA_NOW}", "", [WEATHER, NOW]),
    ("llama3", f"{LLAMA_CALL}; {LLAMA_NOW}", "", [WEATHER, NOW]),
    ("llama3", f"Sure: <|python_tag|>{LLAMA_CALL}", "Sure:", [WEATHER]),
    ("llama3", f"Sure: {LLAMA_CALL}", f"Sure: {LLAMA_CALL}", []),
    ("llama3", '{"answer": 42}', '{"answer": 42}', []),
    ("llama3", "<|python_tag|>print(1)", "<|python_tag|>print(1)", []),
    ("mistral", f"[TOOL_CALLS][{MISTRAL_CALL}, {MISTRAL_NOW}]", "", [WEATHER, NOW]),
    ("mistral", f"Well.\n[TOOL_CALLS] [{MISTRAL_CALL}]", "Well.", [WEATHER]),
    ("mistral", f"[TOOL_CALLS]get_weather[ARGS]{PARIS}", "", [WEATHER]),
    ("mistral", f"[TOOL_CALLS]get_weather{PARIS}[TOOL_CALLS]now[ARGS]{{}}", "", [WEATHER, NOW]),
    ("mistral", "[TOOL_CALLS]rm_rf[ARGS]{}", "[TOOL_CALLS]rm_rf[ARGS]{}", []),
    ("mistral", "[TOOL_CALLS]now[ARGX]{}", "[TOOL_CALLS]now[ARGX]{}", []),
    ("mistral", "[1, 2]", "[1, 2]", []),
    ("json_array", f"[{LLAMA_CALL}, {LLAMA_NOW}]", "", [WEATHER, NOW]),
    ("json_array", f" [\n{LLAMA_CALL}\n]\n", "", [WEATHER]),
    ("json_array", "[1, 2]", "[1, 2]", []),
    ("json_array", "no", "no", []),
]


def cut(text: str, at: list[int]) -> list[str]:
    places = sorted({0, len(text), *(place % (len(text) + 1) for place in at)})
    return [text[a:b] for a, b in itertools.pairwise(places)]


def told(parser: type[ToolCallParser], parts: list[str]) -> Message:
    """What the parser says of the text in these parts; the order of its words is checked."""
    reader = parser(TOOLS)
    pieces = [piece for part in parts for piece in reader.feed(part)] + reader.finish()
    started: list[int] = []
    for piece in pieces:
        if isinstance(piece, CallStart):
            assert piece.index == len(started)
            started.append(piece.index)
        elif isinstance(piece, CallArguments):
            assert piece.text and piece.index == started[-1]
    return joined(pieces)


@pytest.mark.parametrize(("name", "text", "normal", "calls"), MEANINGS)
def test_a_text_means_these_calls(name: str, text: str, normal: str, calls: list[ToolCall]) -> None:
    assert PARSERS[name].parse(text, TOOLS) == Message(text=normal, calls=calls)


@pytest.mark.parametrize(("name", "text", "normal", "calls"), MEANINGS)
def test_a_text_means_the_same_character_by_character(
    name: str, text: str, normal: str, calls: list[ToolCall]
) -> None:
    assert told(PARSERS[name], list(text)) == Message(text=normal, calls=calls)


FRAGMENTS = [
    *("<tool_call>", "</tool_call>", "<|python_tag|>", "[TOOL_CALLS]", "[ARGS]", "get_weather"),
    *(PARIS, HERMES_CALL, HERMES_NOW, LLAMA_CALL, LLAMA_NOW, MISTRAL_CALL, '{"name": ', '"now"'),
    *('"arguments": ', '"parameters": ', "{", "}", "[", "]", ",", ";", '"', "\\", " ", "\n"),
    *("null", "12", "text", "<", "é", "\N{NO-BREAK SPACE}", "\x1c"),
]


@given(
    name=st.sampled_from(sorted(PARSERS)),
    fragments=st.lists(st.sampled_from(FRAGMENTS), max_size=12),
    cuts=st.lists(st.integers(0, 10_000), max_size=12),
)
def test_no_cutting_changes_what_a_text_means(
    name: str, fragments: list[str], cuts: list[int]
) -> None:
    text = "".join(fragments)
    assert told(PARSERS[name], cut(text, cuts)) == PARSERS[name].parse(text, TOOLS)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
ARGUMENTS = st.dictionaries(st.text(), VALUES, max_size=4)


def written(name: str, calls: list[tuple[str, dict[str, object]]], ascii_only: bool) -> str:
    """The calls as a model writes them, by json.dumps."""
    key = "arguments" if name in ("hermes", "mistral") else "parameters"
    texts = [json.dumps({"name": n, key: a}, ensure_ascii=ascii_only) for n, a in calls]
    if name == "hermes":
        return "\n".join(f"<tool_call>\n{text}\n</tool_call>" for text in texts)
    if name == "llama3":
        return "; ".join(texts)
    return ("[TOOL_CALLS]" if name == "mistral" else "") + f"[{', '.join(texts)}]"


@given(
    name=st.sampled_from(["hermes", "llama3", "mistral", "json_array"]),
    calls=st.lists(st.tuples(st.sampled_from(TOOLS), ARGUMENTS), min_size=1, max_size=3),
    ascii_only=st.booleans(),
    cuts=st.lists(st.integers(0, 10_000), max_size=12),
)
def test_calls_that_are_written_are_read(
    name: str, calls: list[tuple[str, dict[str, object]]], ascii_only: bool, cuts: list[int]
) -> None:
    message = told(PARSERS[name], cut(written(name, calls, ascii_only), cuts))
    assert message.text == ""
    assert [(call.name, json.loads(call.arguments)) for call in message.calls] == calls


def test_arguments_are_told_as_they_come() -> None:
    parser = TOOL_CALL_PARSERS["hermes"](TOOLS)
    assert parser.feed('<tool_call>{"name": "get_weather", "arguments": {"ci') == [
        CallStart(0, "get_weather"),
        CallArguments(0, '{"ci'),
    ]
    assert parser.feed('ty": "Pa') == [CallArguments(0, 'ty": "Pa')]
    assert parser.feed('ris"}}</tool_call>') == [CallArguments(0, 'ris"}')]
    assert parser.finish() == []


def test_text_is_told_at_once() -> None:
    parser = TOOL_CALL_PARSERS["qwen25"](TOOLS)
    assert [joined(parser.feed(part)).text for part in ("Hello", " you", " <b")] == [
        "Hello",
        " you",
        " <b",
    ]
