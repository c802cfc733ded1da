"""One answer's text read for thoughts and calls, as far as the request wants either."""

from __future__ import annotations

from sglang.srt.parsers.pieces import Message, Piece, Reasoning, Text, joined
from sglang.srt.parsers.reasoning.think_tags import ReasoningParser
from sglang.srt.parsers.tool_calls.base import ToolCallParser


class AnswerReader:
    """`feed` it the answer as it comes, then `finish`.

    hold_reasoning: thoughts are told all at once, when they are complete.
    """

    def __init__(
        self,
        reasoning: ReasoningParser | None = None,
        tools: ToolCallParser | None = None,
        *,
        hold_reasoning: bool = False,
    ) -> None:
        self._reasoning = reasoning
        self._tools = tools
        self._hold_reasoning = hold_reasoning
        self._thoughts: list[str] = []

    @property
    def thinking(self) -> bool:
        """Whether the answer so far ends inside the model's thoughts."""
        return self._reasoning is not None and not self._reasoning.closed

    def feed(self, text: str) -> list[Piece]:
        """What is known now that was not before."""
        pieces: list[Piece] = [Text(text)]
        if self._reasoning is not None:
            pieces = self._reasoning.feed(text)
        return self._released(self._with_calls(pieces), last=False)

    def finish(self) -> list[Piece]:
        """The text has ended: what is left."""
        pieces = self._with_calls([] if self._reasoning is None else self._reasoning.finish())
        if self._tools is not None:
            pieces += self._tools.finish()
        return self._released(pieces, last=True)

    def read(self, text: str) -> Message:
        """The whole answer at once."""
        return joined([*self.feed(text), *self.finish()])

    def _with_calls(self, pieces: list[Piece]) -> list[Piece]:
        if self._tools is None:
            return [piece for piece in pieces if not isinstance(piece, Text) or piece.text]
        read: list[Piece] = []
        for piece in pieces:
            read += self._tools.feed(piece.text) if isinstance(piece, Text) else [piece]
        return read

    def _released(self, pieces: list[Piece], last: bool) -> list[Piece]:
        if not self._hold_reasoning:
            return pieces
        self._thoughts += [piece.text for piece in pieces if isinstance(piece, Reasoning)]
        others: list[Piece] = [piece for piece in pieces if not isinstance(piece, Reasoning)]
        if self._thoughts and (last or not self.thinking):
            others.insert(0, Reasoning("".join(self._thoughts)))
            self._thoughts.clear()
        return others
