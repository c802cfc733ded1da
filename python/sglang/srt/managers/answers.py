"""One answer as it grows, and the news of it."""

from __future__ import annotations

from copy import copy

import msgspec

from sglang.srt.managers.answer_logprobs import AnswerLogprobs
from sglang.srt.managers.prompts import TokenizedPrompt
from sglang.srt.messages import FinishReason, TextBatch


class Answer(msgspec.Struct, eq=False):
    """One answer as far as it has come. `index` is its place in the call, prompt by prompt.

    rid: the client's or made up. call_id: the same for all answers of a call. wire_id: unique.
    logprobs: None unless the prompt asked for them.
    """

    index: int
    rid: str
    call_id: str
    wire_id: str
    prompt: TokenizedPrompt
    started_s: float
    # Kept by RequestMetrics.
    first_token_s: float | None = None
    last_token_s: float | None = None
    output_ids: list[int] = []
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    retractions: int = 0
    finish: FinishReason | None = None
    finished_s: float | None = None
    logprobs: AnswerLogprobs | None = None
    _text: str = ""
    _pieces: list[str] = []

    @property
    def text(self) -> str:
        self._join()
        return self._text

    @property
    def e2e_latency_s(self) -> float | None:
        return None if self.finished_s is None else self.finished_s - self.started_s

    def snapshot(self) -> Answer:
        """The answer as it is now; it does not follow later changes."""
        self._join()
        twin = copy(self)
        twin.output_ids = self.output_ids.copy()
        twin._pieces = []
        if self.logprobs is not None:
            twin.logprobs = self.logprobs.since(0, 0)
        return twin

    def take(self, batch: TextBatch, i: int, now_s: float) -> None:
        """Adds entry i of a batch."""
        if batch.text[i]:
            self._pieces.append(batch.text[i])
        self.output_ids += batch.new_ids[i]
        self.prompt_tokens = batch.prompt_tokens[i]
        self.cached_tokens = batch.cached_tokens[i]
        self.completion_tokens = batch.completion_tokens[i]
        self.retractions = batch.retractions[i]
        self.finish = batch.finish[i]
        news = batch.logprobs.get(self.wire_id)
        if news is not None and self.logprobs is not None:
            self.logprobs.take(news)
        if self.finish is not None:
            self.finished_s = now_s

    def _join(self) -> None:
        if self._pieces:
            self._text += "".join(self._pieces)
            self._pieces.clear()


class Update(msgspec.Struct, frozen=True, eq=False):
    """News of one answer: what came since its last update, and the answer as it was then.

    The reader may be slow: what arrives in the meantime belongs to the next update.
    """

    answer: Answer
    new_text: str
    new_ids: list[int]
    new_logprobs: AnswerLogprobs | None = None
