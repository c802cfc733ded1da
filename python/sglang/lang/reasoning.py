"""Where a reasoning model's thoughts end and its answer begins."""

from __future__ import annotations

from dataclasses import dataclass

from sglang.lang.errors import NotServed


@dataclass(frozen=True)
class ReasoningFormat:
    """Thoughts stand between two marks. starts_thinking: the prompt has opened them already."""

    opening: str
    closing: str
    starts_thinking: bool


_THINK = ("<think>", "</think>")
_FORMATS = {
    "deepseek-r1": ReasoningFormat(*_THINK, starts_thinking=True),
    "deepseek-v3": ReasoningFormat(*_THINK, starts_thinking=False),
    "glm45": ReasoningFormat(*_THINK, starts_thinking=False),
    "kimi": ReasoningFormat("\u25c1think\u25b7", "\u25c1/think\u25b7", starts_thinking=False),
    "kimi_k2": ReasoningFormat(*_THINK, starts_thinking=False),
    "minimax": ReasoningFormat(*_THINK, starts_thinking=True),
    "qwen3": ReasoningFormat(*_THINK, starts_thinking=False),
    "qwen3-thinking": ReasoningFormat(*_THINK, starts_thinking=True),
    "step3": ReasoningFormat(*_THINK, starts_thinking=True),
}


def reasoning_format(model_type: str) -> ReasoningFormat:
    """By the name that SGLang's --reasoning-parser gives it; NotServed lists those that exist."""
    try:
        return _FORMATS[model_type.lower()]
    except KeyError:
        raise NotServed(
            f"model_type: no reasoning format {model_type!r}, only {', '.join(_FORMATS)}"
        ) from None


class ReasoningSplitter:
    """Splits a text that comes in pieces.

    `reasoning` and `answer` only ever grow: what may be part of a mark is held back until the next
    piece, or `finish`, tells.
    """

    def __init__(self, form: ReasoningFormat) -> None:
        self._form = form
        self._held = ""
        self._in_thoughts: bool | None = True if form.starts_thinking else None
        self._thought = False
        self.reasoning = ""
        self.answer = ""

    def feed(self, piece: str) -> None:
        self._held += piece
        self._open()
        if self._in_thoughts is True:
            self._think()
        if self._in_thoughts is False:
            after_thoughts = not self.answer and self._thought
            self.answer += self._held.lstrip() if after_thoughts else self._held
            self._held = ""

    def finish(self) -> None:
        """No more text comes; what was held back is no mark."""
        if self._in_thoughts is True:
            self.reasoning = (self.reasoning + self._held).rstrip()
        else:
            self.answer += self._held
        self._held = ""

    def _open(self) -> None:
        """Takes the opening mark away, which even a model that starts in thoughts may repeat."""
        if self.reasoning or self._in_thoughts is False:
            return
        text = self._held.lstrip()
        if text.startswith(self._form.opening):
            self._held = text.removeprefix(self._form.opening).lstrip()
            self._in_thoughts = True
        elif self._in_thoughts is None and not self._form.opening.startswith(text):
            self._in_thoughts = False

    def _think(self) -> None:
        before, closing, after = self._held.partition(self._form.closing)
        if closing:
            self.reasoning = (self.reasoning + before).strip()
            self._held, self._in_thoughts, self._thought = after, False, True
            return
        kept = _undecided(before, self._form)
        told = before[: len(before) - kept]
        self.reasoning += told if self.reasoning else told.lstrip()
        self._held = before[len(before) - kept :]


def _undecided(text: str, form: ReasoningFormat) -> int:
    """How many characters at the end may yet turn out to be, or to precede, a mark.

    White space is held back too: before the closing mark it is not told.
    """
    stripped = text.rstrip()
    for mark in (form.closing, form.opening):
        for length in range(min(len(mark) - 1, len(stripped)), 0, -1):
            if mark.startswith(stripped[-length:]):
                body = stripped[:-length].rstrip()
                return len(text) - len(body)
    return len(text) - len(stripped)
