"""Thoughts out of text, with and without tags, in whatever pieces it comes."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang.srt.parsers.answer_reader import AnswerReader
from sglang.srt.parsers.pieces import Message, Reasoning, Text, ToolCall, joined
from sglang.srt.parsers.reasoning import REASONING_PARSERS
from sglang.srt.parsers.tool_calls import TOOL_CALL_PARSERS

MEANINGS = [
    ("deepseek-r1", "<think>\nHm.\n</think>\n\nYes.", "Hm.", "Yes."),
    ("deepseek-r1", "Hm.\n</think>\n\nYes.", "Hm.", "Yes."),
    ("deepseek-r1", "Hm. No end", "Hm. No end", ""),
    ("deepseek-r1", "<think></think>Yes.", "", "Yes."),
    ("deepseek-r1", "a < b </thin", "a < b </thin", ""),
    ("deepseek-r1", "x</think>y</think>", "x", "y</think>"),
    ("deepseek-r1", "", "", ""),
    ("qwen3", "<think>\nHm.\n</think>\n\nYes.", "Hm.", "Yes."),
    ("qwen3", "Yes.", "", "Yes."),
    ("qwen3", " Yes. <think>", "", " Yes. <think>"),
    ("qwen3", "<thin", "", "<thin"),
    ("qwen3", "<think>Hm.", "Hm.", ""),
    ("qwen3-thinking", "Hm.</think>Yes.", "Hm.", "Yes."),
]


@pytest.mark.parametrize(("name", "text", "reasoning", "answer"), MEANINGS)
def test_a_text_holds_these_thoughts(name: str, text: str, reasoning: str, answer: str) -> None:
    assert REASONING_PARSERS[name].parse(text) == Message(reasoning, answer)


@given(
    name=st.sampled_from(sorted(REASONING_PARSERS)),
    fragments=st.lists(
        st.sampled_from(["<think>", "</think>", "<", "</th", " ", "\n", "a", "é", "\x1c"]),
        max_size=10,
    ),
    cuts=st.lists(st.integers(0, 1000), max_size=10),
)
def test_no_cutting_changes_the_thoughts(name: str, fragments: list[str], cuts: list[int]) -> None:
    text = "".join(fragments)
    places = sorted({0, len(text), *(at % (len(text) + 1) for at in cuts)})
    parser = REASONING_PARSERS[name].parser()
    pieces = [piece for a, b in itertools.pairwise(places) for piece in parser.feed(text[a:b])]
    assert joined(pieces + parser.finish()) == REASONING_PARSERS[name].parse(text)


def test_the_prompt_says_whether_the_answer_begins_with_thoughts() -> None:
    opened = REASONING_PARSERS["qwen3"].parser("<|im_start|>assistant\n<think>\n")
    assert joined([*opened.feed("Hm.</think>Yes.")]) == Message("Hm.", "Yes.")
    closed = REASONING_PARSERS["deepseek-r1"].parser("<think>\n\n</think>\n\n")
    assert joined([*closed.feed("Yes."), *closed.finish()]) == Message("", "Yes.")


def test_thoughts_and_calls_in_one_answer() -> None:
    reader = AnswerReader(REASONING_PARSERS["qwen3"].parser(), TOOL_CALL_PARSERS["qwen25"](["now"]))
    call = '<tool_call>{"name": "now", "arguments": {}}</tool_call>'
    text = f"<think>\n<tool_call>?</think>\nSo.\n{call}"
    assert reader.read(text) == Message("<tool_call>?", "So.", [ToolCall("now", "{}")])


def test_thoughts_may_be_held_until_they_are_complete() -> None:
    reader = AnswerReader(REASONING_PARSERS["deepseek-r1"].parser(), hold_reasoning=True)
    assert reader.feed("One") == []
    assert reader.thinking
    assert reader.feed(" two</think>three") == [Reasoning("One two"), Text("three")]
    assert not reader.thinking
