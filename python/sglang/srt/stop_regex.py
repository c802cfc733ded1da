"""Stop patterns: Python's regular expressions, matched while the text still grows.

`re` looks at a whole text again and again, cannot say that a text may become a match, and takes
exponential time for some patterns. Here its parser gives the tree, and the tree becomes states
that are all followed at once: a character costs at most one look at each state. Patterns that
need more than states, such as back-references and look-around, are refused.

A pattern matches where its first match ends, and from there as far back as it can: so the outcome
does not hang on the pieces in which the text comes. `$` is the end of the whole text.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from re import _constants as sre  # type: ignore[attr-defined]
from re import _parser as sre_parser  # type: ignore[attr-defined]
from typing import Any, NamedTuple

MAX_PATTERN_BYTES = 256
MAX_STATES = 512
# Characters of a match that are remembered, and so held back: a longer one is not found.
WINDOW = 1024

_Test = Callable[[str], bool]  # of one character
# Of the characters before and behind a place, "" at either end of the text.
_Condition = Callable[[str, str], bool]


class UnsupportedPattern(ValueError):
    """Says why a pattern cannot be followed."""


@dataclass(slots=True)
class _State:
    """Either takes a character that passes `test`, or goes on at once, perhaps on a condition."""

    next: tuple[int, ...] = ()
    test: _Test | None = None
    condition: _Condition | None = None
    needs_next: bool = False  # whether the condition looks at the character behind


@dataclass(slots=True)
class _Program:
    states: list[_State] = field(default_factory=list)
    start: int = 0
    match: int = 0


class Found(NamedTuple):
    """A match of `pattern`, as positions in all text fed so far."""

    end: int
    start: int
    pattern: str


@functools.lru_cache(maxsize=256)
def compiled(pattern: str) -> _Program:
    """Raises UnsupportedPattern."""
    if len(pattern.encode("utf-8", "surrogatepass")) > MAX_PATTERN_BYTES:
        raise UnsupportedPattern(f"is longer than {MAX_PATTERN_BYTES} bytes")
    try:
        tree = sre_parser.parse(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise UnsupportedPattern(f"is not a regular expression: {error}") from None
    if tree.getwidth()[0] == 0:
        raise UnsupportedPattern("matches the empty text")
    builder = _Builder()
    match = builder.add(_State())
    start = builder.sequence(tree, match, tree.state.flags)
    return _Program(builder.states, start, match)


class StopPattern:
    """One pattern over one growing text."""

    def __init__(self, pattern: str) -> None:
        self._pattern = pattern
        self._program = compiled(pattern)
        self._length = 0
        self._last = ""
        # States to be followed from the place reached -> where their match would begin, the
        # earliest of several.
        self._waiting: dict[int, int] = {self._program.start: 0}

    @property
    def pending(self) -> int:
        """Characters at the end that may be the beginning of a match."""
        # A state that waits without having taken a character begins here, and holds nothing.
        return self._length - min(self._waiting.values(), default=self._length)

    def feed(self, text: str, *, last: bool = False) -> Found | None:
        """The match that is complete first; nothing may be fed after one. last: the text ends."""
        for char in text:
            reached = self._reach(char)
            match = reached.pop(self._program.match, None)
            if match is not None:  # a condition on this character was what it lacked
                return Found(self._length, match, self._pattern)
            self._step(reached, char)
            here = self._reach(None)
            if self._program.match in here:
                return Found(self._length, here[self._program.match], self._pattern)
        if last and (start := self._reach("").get(self._program.match)) is not None:
            return Found(self._length, start, self._pattern)
        return None

    def _step(self, reached: dict[int, int], char: str) -> None:
        states = self._program.states
        self._length += 1
        self._last = char
        oldest = self._length - WINDOW
        waiting: dict[int, int] = {}
        for index, start in reached.items():
            state = states[index]
            if state.test is not None and start >= oldest and state.test(char):
                for target in state.next:
                    waiting[target] = min(start, waiting.get(target, start))
        waiting.setdefault(self._program.start, self._length)
        self._waiting = waiting

    def _reach(self, following: str | None) -> dict[int, int]:
        """All states that can be reached without a character; None: what follows is unknown."""
        states = self._program.states
        reached: dict[int, int] = {}
        # Earlier starts first, so that each state is reached from its earliest.
        stack = sorted(self._waiting.items(), key=lambda item: -item[1])
        while stack:
            index, start = stack.pop()
            if reached.get(index, start + 1) <= start:
                continue
            reached[index] = start
            state = states[index]
            if state.test is not None:
                continue
            if state.condition is not None:
                if state.needs_next and following is None:
                    continue
                if not state.condition(self._last, following or ""):
                    continue
            stack.extend((target, start) for target in state.next)
        return reached


class _Builder:
    """Makes states from the back to the front: each part is told what follows it."""

    def __init__(self) -> None:
        self.states: list[_State] = []

    def add(self, state: _State) -> int:
        if len(self.states) >= MAX_STATES:
            raise UnsupportedPattern(f"needs more than {MAX_STATES} states: repeats are unrolled")
        self.states.append(state)
        return len(self.states) - 1

    def sequence(self, parts: Iterable[Any], after: int, flags: int) -> int:
        for op, argument in reversed(list(parts)):
            after = self._part(op, argument, after, flags)
        return after

    def _part(self, op: Any, argument: Any, after: int, flags: int) -> int:
        if op in (sre.LITERAL, sre.NOT_LITERAL, sre.ANY, sre.IN):
            return self.add(_State((after,), test=_test_of(op, argument, flags)))
        if op is sre.BRANCH:
            _, branches = argument
            return self.add(_State(tuple(self.sequence(b, after, flags) for b in branches)))
        if op is sre.SUBPATTERN:
            _, added, removed, parts = argument
            return self.sequence(parts, after, (flags | added) & ~removed)
        if op in (sre.MAX_REPEAT, sre.MIN_REPEAT):
            low, high, parts = argument
            return self._repeat(low, high, parts, after, flags)
        if op is sre.AT:
            condition, needs_next = _condition_of(argument, flags)
            return self.add(_State((after,), condition=condition, needs_next=needs_next))
        raise UnsupportedPattern(
            f"uses {str(op).lower().replace('_', ' ')}, which stop patterns cannot"
        )

    def _repeat(self, low: int, high: Any, parts: Any, after: int, flags: int) -> int:
        if high is sre.MAXREPEAT:
            loop = self.add(_State())
            self.states[loop].next = (self.sequence(parts, loop, flags), after)
            after = loop
        else:
            end = after
            for _ in range(high - low):
                after = self.add(_State((self.sequence(parts, after, flags), end)))
        for _ in range(low):
            after = self.sequence(parts, after, flags)
        return after


def _test_of(op: Any, argument: Any, flags: int) -> _Test:
    """Whether a character is taken, by the flags IGNORECASE, DOTALL and ASCII."""
    if op is sre.ANY:
        return (lambda char: True) if flags & re.DOTALL else (lambda char: char != "\n")
    items = argument if op is sre.IN else [(sre.LITERAL, argument)]
    negated = op is sre.NOT_LITERAL or items[0][0] is sre.NEGATE
    tests = [_item_test(kind, value, flags) for kind, value in items if kind is not sre.NEGATE]

    def plain(char: str) -> bool:
        return any(test(char) for test in tests)

    def test(char: str) -> bool:
        if flags & re.IGNORECASE:
            cases = {char, char.lower(), char.upper()}
            return any(plain(case) for case in cases if len(case) == 1) != negated
        return plain(char) != negated

    return test


def _item_test(kind: Any, value: Any, flags: int) -> _Test:
    if kind is sre.LITERAL:
        return lambda char: ord(char) == value
    if kind is sre.RANGE:
        low, high = value
        return lambda char: low <= ord(char) <= high
    assert kind is sre.CATEGORY, kind
    letter = str(value).rpartition("_")[2][0].lower()
    pattern = f"\\{letter.upper() if '_NOT_' in str(value) else letter}"
    matches = re.compile(pattern, re.ASCII if flags & re.ASCII else 0).match
    return lambda char: matches(char) is not None


def _condition_of(where: Any, flags: int) -> tuple[_Condition, bool]:
    """A place's condition, and whether it looks at what is behind it."""
    is_word = re.compile(r"\w", re.ASCII if flags & re.ASCII else 0).match
    if where is sre.AT_BEGINNING and flags & re.MULTILINE:
        return (lambda before, behind: before in ("", "\n")), False
    if where in (sre.AT_BEGINNING, sre.AT_BEGINNING_STRING):
        return (lambda before, behind: before == ""), False
    if where is sre.AT_END and flags & re.MULTILINE:
        return (lambda before, behind: behind in ("", "\n")), True
    if where in (sre.AT_END, sre.AT_END_STRING):
        return (lambda before, behind: behind == ""), True
    wanted = where is sre.AT_BOUNDARY

    def boundary(before: str, behind: str) -> bool:
        return (bool(is_word(before)) != bool(is_word(behind))) == wanted

    return boundary, True
