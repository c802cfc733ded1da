"""Stop patterns against `re` by brute force, in every division of a text into pieces."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang.srt.stop_regex import WINDOW, Found, StopPattern

PATTERNS = [
    "abc",
    "a+b",
    "a|ba|bcc",
    "(ab)+c",
    "(?:a|ab)(?:c|bcd)",
    "a.c",
    "(?s)a.c",
    "[^a]b{2,3}",
    "[a-c]d",
    r"\d\d",
    r"\w\W\s",
    "(?i)aBc",
    "(?i)[b-c]A",
    "(?i)a[^b]c",
    "a{2}(b*?c|d)?d",
    "(a+)+d",
    "^ab",
    "(?m)^b",
    "a(?i:b)c",
    r"\Aa\nb",
]


def by_brute_force(pattern: str, text: str) -> Found | None:
    """The match that ends first; of several, that starts first."""
    regex = re.compile(pattern)
    for end in range(1, len(text) + 1):
        for start in range(end):
            # Unlike with a slice of the text, ^ does not match at `start`.
            if regex.fullmatch(text, start, end):
                return Found(end, start, pattern)
    return None


def feed(pattern: str, pieces: list[str]) -> Found | None:
    follower = StopPattern(pattern)
    length = 0
    for i, piece in enumerate(pieces):
        released = length - follower.pending
        found = follower.feed(piece, last=i == len(pieces) - 1)
        if found is not None:
            assert found.start >= released, "what was shown belongs to the match"
            return found
        length += len(piece)
        assert 0 <= follower.pending <= length
    return None


@pytest.mark.parametrize("pattern", PATTERNS)
@settings(max_examples=150, derandomize=True)
@given(pieces=st.lists(st.text("abcdABC1 \n_", max_size=4), min_size=1, max_size=8))
def test_the_match_that_ends_first_is_found_in_any_pieces(pattern, pieces):
    assert feed(pattern, pieces) == by_brute_force(pattern, "".join(pieces))


@pytest.mark.parametrize(
    ("pattern", "pieces", "expected"),
    [
        (r"end\b", ["the e", "nd", "ing, the end", "."], (19, 16)),
        (r"end\b", ["the end"], (7, 4)),
        (r"end\b", ["the end", "ing"], None),
        (r"\Bnd", ["nd e", "nd"], (6, 4)),
        (r"a$", ["a", "b", "a"], (3, 2)),
        (r"a$", ["a", "b"], None),
        (r"(?m)a$", ["a", "\nb"], (1, 0)),
        (r"\n\n(?=x)?", ["a\n", "\nb"], "refused"),
    ],
)
def test_conditions_wait_for_the_next_character(pattern, pieces, expected):
    if expected == "refused":
        with pytest.raises(ValueError, match="assert"):
            StopPattern(pattern)
        return
    found = feed(pattern, pieces)
    assert (found and (found.end, found.start)) == expected


def test_only_what_may_become_a_match_is_held():
    follower = StopPattern("abc+d")
    pending = []
    for piece in ["x", "a", "b", "x", "ab", "ccc", "x"]:
        assert follower.feed(piece) is None
        pending.append(follower.pending)
    assert pending == [0, 1, 2, 0, 2, 5, 0]


def test_what_is_held_is_bounded():
    follower = StopPattern("a.*b")
    for _ in range(20):
        follower.feed("a" + "x" * 99)
        assert follower.pending <= WINDOW
    assert follower.feed("b") is not None


@pytest.mark.timeout(20)
@pytest.mark.parametrize("pattern", ["(a+)+b", "(a|a)+b", "(a|aa)+b", "a*a*a*a*a*a*a*a*b"])
def test_patterns_that_take_re_for_ever_take_linear_time(pattern):
    follower = StopPattern(pattern)
    assert follower.feed("a" * 5000) is None
    assert follower.feed("b") is not None
