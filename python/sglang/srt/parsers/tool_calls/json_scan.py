"""JSON by the character: where a value ends, and which tool an object calls.

Both read what models write, which is not always JSON: they look at brackets and strings only, and
leave it to whoever uses the arguments to parse them.
"""

from __future__ import annotations

import json
from collections.abc import Callable

WHITESPACE = frozenset(" \t\r\n")
_NAME_KEYS = frozenset({"name"})
_ARGUMENT_KEYS = frozenset({"arguments", "parameters"})


class JsonValue:
    """Finds the end of one value. `kind` is its first character."""

    __slots__ = ("_depth", "_escaped", "_in_string", "done", "kind")

    def __init__(self, first: str) -> None:
        self.kind = first
        self.done = False
        self._depth = 1 if first in "{[" else 0
        self._in_string = first == '"'
        self._escaped = False

    def take(self, char: str) -> bool:
        """Whether the character still belongs to the value."""
        if self._in_string:
            if self._escaped:
                self._escaped = False
            elif char == "\\":
                self._escaped = True
            elif char == '"':
                self._in_string = False
                self.done = self._depth == 0
        elif self._depth == 0:  # a number or a word, which its neighbour ends
            if char in ",}]" or char in WHITESPACE:
                self.done = True
                return False
        elif char == '"':
            self._in_string = True
        elif char in "{[":
            self._depth += 1
        elif char in "}]":
            self._depth -= 1
            self.done = self._depth == 0
        return True


class CallObject:
    """{"name": ..., "arguments": {...}}, in either order, after its opening brace.

    committed: name and the arguments' beginning are known; from here on it is a call, whatever
    follows. broken: it is no call of a known tool. done: it has ended.
    """

    def __init__(self, is_tool: Callable[[str], bool]) -> None:
        self._is_tool = is_tool
        self._step = self._before_key
        self._key: list[str] = []
        self._value: JsonValue | None = None
        self._value_text: list[str] = []
        self._has_arguments = False
        self._new_arguments: list[str] = []
        self.name: str | None = None
        self.committed = False
        self.broken = False
        self.done = False

    def take(self, char: str) -> bool:
        """Whether the character belongs to the object; if not, it is done or broken."""
        return self._step(char)

    def new_arguments(self) -> str:
        """Argument text since the last time this was asked."""
        text = "".join(self._new_arguments)
        self._new_arguments.clear()
        return text

    def _before_key(self, char: str) -> bool:
        if char in WHITESPACE or char == ",":
            return True
        if char == '"':
            self._key.clear()
            self._step = self._in_key
            return True
        if char == "}":
            return self._end()
        return self._wrong()

    def _in_key(self, char: str) -> bool:
        if char == '"':
            self._step = self._before_value
        else:
            self._key.append(char)
        return True

    def _before_value(self, char: str) -> bool:
        if char in WHITESPACE or char == ":":
            return True
        if char in ",}]":
            return self._wrong()
        self._value = JsonValue(char)
        self._value_text = [char]
        self._step = self._in_value
        if "".join(self._key) in _ARGUMENT_KEYS:
            self._has_arguments = True
            if char == "{":
                self._value_text = self._new_arguments  # streamed as they come
                self._value_text.append(char)
                self._commit_if_known()
        return True

    def _in_value(self, char: str) -> bool:
        assert self._value is not None
        belongs = self._value.take(char)
        if belongs:
            self._value_text.append(char)
        if not self._value.done:
            return True
        self._step = self._before_key
        if not self._keep_value():
            return False
        return True if belongs else self._before_key(char)

    def _keep_value(self) -> bool:
        """Understands the value that has just ended. False if that shows it is no call."""
        key = "".join(self._key)
        assert self._value is not None
        if key in _NAME_KEYS and not self.committed:
            name = _loaded("".join(self._value_text))
            if not isinstance(name, str) or not self._is_tool(name):
                return self._wrong()
            self.name = name
            if self._has_arguments:
                self._commit_if_known()
        elif key in _ARGUMENT_KEYS and self._value.kind != "{":
            text = "".join(self._value_text)
            if self._value.kind == '"':  # some models write the object as a string
                loaded = _loaded(text)
                text = loaded if isinstance(loaded, str) else text
            self._new_arguments.append("{}" if text == "null" else text)
            self._commit_if_known()
        return True

    def _commit_if_known(self) -> None:
        self.committed = self.committed or self.name is not None

    def _end(self) -> bool:
        if self.name is None:
            return self._wrong()
        if not self._has_arguments:
            self._new_arguments.append("{}")
        self.committed = self.done = True
        return True

    def _wrong(self) -> bool:
        if self.committed:
            self.done = True  # its last brace is missing, which models forget
        else:
            self.broken = True
        return False


def _loaded(text: str) -> object:
    try:
        return json.loads(text, strict=False)
    except ValueError:
        return None
