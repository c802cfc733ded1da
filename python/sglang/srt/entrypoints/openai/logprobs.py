"""Log-probabilities as OpenAI's two forms have them, and what a request asks of them.

A matched stop token is no part of an answer's text, and has no entry.
"""

from __future__ import annotations

from typing import Any

from sglang.srt.errors import RequestError
from sglang.srt.logprobs import LogprobWish
from sglang.srt.managers.answer_logprobs import (
    Alternatives,
    AnswerLogprobs,
    LogprobLists,
    TokenLogprob,
)
from sglang.srt.managers.answers import Answer

MAX_CHAT_TOP = 20
_IMPOSSIBLE = -9999.0  # JSON has no infinity


def chat_wish(logprobs: bool | None, top: int | None) -> LogprobWish | None:
    """Raises RequestError naming the field."""
    if not logprobs:
        if top:
            raise RequestError("top_logprobs: needs logprobs: true", "top_logprobs")
        return None
    if not 0 <= (top or 0) <= MAX_CHAT_TOP:
        raise RequestError(
            f"top_logprobs: must be in [0, {MAX_CHAT_TOP}], got {top}", "top_logprobs"
        )
    return LogprobWish(top=top or 0, texts=True)


def completion_wish(top: int | None, *, echo: bool, vocab_size: int) -> LogprobWish | None:
    """With `echo` the prompt's tokens have them, too. Raises RequestError naming the field."""
    if top is None:
        return None
    wish = LogprobWish(top=top, texts=True)
    try:
        wish.check(vocab_size)
    except RequestError as error:
        text = str(error).replace("top_logprobs_num", "logprobs")
        raise RequestError(text, "logprobs") from None
    return LogprobWish(start=0, top=top, texts=True) if echo else wish


def shown(lists: LogprobLists, answer: Answer) -> LogprobLists:
    """Without the stop token that ended the answer; `lists` ends where the answer does."""
    finish = answer.finish
    if (
        finish is None
        or not isinstance(finish.matched, int)
        or answer.prompt.sampling.no_stop_trim
        or not lists.tokens
    ):
        return lists
    return LogprobLists(lists.tokens[:-1], lists.top[:-1], lists.listed[:-1])


def chat_entries(lists: LogprobLists) -> list[dict[str, Any]]:
    """Elements of a chat choice's logprobs.content."""
    return [
        {**_chat_token(token), "top_logprobs": [_chat_token(other) for other in top or ()]}
        for token, top in zip(lists.tokens, lists.top, strict=True)
    ]


class CompletionLogprobs:
    """A completion's logprobs, piece by piece; offsets are characters of the choice's text."""

    def __init__(self) -> None:
        self._offset = 0

    def of(self, news: AnswerLogprobs, answer: Answer) -> dict[str, Any]:
        """news: what came since the last time. Prompt tokens, if there are any, come first."""
        fields: dict[str, list[Any]] = {
            "text_offset": [],
            "token_logprobs": [],
            "tokens": [],
            "top_logprobs": [],
        }
        for lists in (news.prompt, shown(news.output, answer)):
            for token, top in zip(lists.tokens, lists.top, strict=True):
                value, _, text = token
                fields["text_offset"].append(self._offset)
                fields["token_logprobs"].append(_finite(value))
                fields["tokens"].append(text)
                fields["top_logprobs"].append(_by_text(token, top))
                self._offset += len(text or "")
        return fields


def _by_text(token: TokenLogprob, top: Alternatives) -> dict[str, float | None] | None:
    """The likeliest tokens and the one that was taken; None where nothing precedes it."""
    if top is None:
        return None
    likeliest = {text or "": _finite(value) for value, _, text in top}
    return {**likeliest, token[2] or "": _finite(token[0])}


def _chat_token(token: TokenLogprob) -> dict[str, Any]:
    value, _, text = token
    return {"token": text, "bytes": list((text or "").encode()), "logprob": _finite(value)}


def _finite(value: float | None) -> float | None:
    return value if value is None else max(value, _IMPOSSIBLE)
