"""One iteration over answers: what it waits for, and how it ends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

from sglang.srt.errors import SglangError
from sglang.srt.managers.answers import Answer, Update


class EngineFailed(SglangError):
    """The engine died or the server stopped before the answer was complete."""


class Call:
    """The answers that one iteration waits for, and which of them have news."""

    def __init__(self, answers: list[Answer], stream: bool) -> None:
        self.answers = answers
        self._stream = stream  # if not, only finished answers are news
        self._fresh: dict[int, None] = {}
        self._news = asyncio.Event()
        self._failure: str | None = None
        # What is already handed out: characters, ids, and log-probabilities of the prompt.
        self._shown = [(0, 0, 0)] * len(answers)

    def noticed(self, answer: Answer) -> None:
        if self._stream or answer.finish is not None:
            self._fresh[answer.index] = None
            self._news.set()

    def fail(self, message: str) -> None:
        self._failure = message
        self._news.set()

    async def updates(self) -> AsyncGenerator[Update, None]:
        unfinished = {answer.index for answer in self.answers}
        while unfinished:
            await self._news.wait()
            self._news.clear()
            fresh, self._fresh = self._fresh, {}
            for index in fresh:
                # An answer that ended while an earlier one was handed out is fresh twice.
                if index in unfinished:
                    answer = self.answers[index]
                    if answer.finish is not None:
                        unfinished.remove(index)
                    yield self._update(answer)
            if self._failure is not None and unfinished:
                raise EngineFailed(self._failure)

    def _update(self, answer: Answer) -> Update:
        text = answer.text
        chars, ids, of_prompt = self._shown[answer.index]
        logprobs = answer.logprobs
        known = 0 if logprobs is None else len(logprobs.prompt.tokens)
        self._shown[answer.index] = (len(text), len(answer.output_ids), known)
        return Update(
            answer.snapshot(),
            text[chars:],
            answer.output_ids[ids:],
            None if logprobs is None else logprobs.since(of_prompt, ids),
        )
