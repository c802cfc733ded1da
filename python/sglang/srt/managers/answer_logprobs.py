"""Log-probabilities of an answer, in the form in which clients get them."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np

from sglang.srt.logprobs import LogprobNews, LogprobRows

# (log-probability, token id, its text); the first is None where it is not known, -inf where the
# token could not be chosen; the text is None unless texts were asked for.
TokenLogprob = tuple[float | None, int, str | None]
Alternatives = list[TokenLogprob] | None  # None where nothing precedes the token


class LogprobLists(msgspec.Struct, eq=False):
    """Element i of each list speaks of the same token.

    tokens: the tokens of the text themselves. top: the likeliest in the place of each, descending;
    listed: the ids that were asked for, in that order. Both hold empty lists if nothing was asked.
    """

    tokens: list[TokenLogprob] = []
    top: list[Alternatives] = []
    listed: list[Alternatives] = []

    def extend(self, rows: LogprobRows) -> None:
        count = len(rows)
        chosen = np.frombuffer(rows.chosen, np.float32)
        known = ~np.isnan(chosen)
        ids = np.frombuffer(rows.ids, np.int32).tolist()
        self.tokens += [
            (value if has_value else None, token, text)
            for value, has_value, token, text in zip(
                chosen.tolist(), known.tolist(), ids, _texts(rows.texts, count), strict=True
            )
        ]
        top = np.frombuffer(rows.top_values, np.float32)
        top_ids = np.frombuffer(rows.top_ids, np.int32).tolist()
        top_texts = _texts(rows.top_texts, len(top_ids))
        listed = np.frombuffer(rows.listed, np.float32)
        listed_ids = rows.listed_ids or []
        listed_texts = _texts(rows.listed_texts, len(listed_ids))
        self.top += _rows(top.tolist(), top_ids, top_texts, known.tolist())
        self.listed += _rows(
            listed.tolist(), listed_ids * count, [*listed_texts] * count, known.tolist()
        )

    def since(self, count: int) -> LogprobLists:
        """Without the first `count` tokens."""
        return LogprobLists(self.tokens[count:], self.top[count:], self.listed[count:])


class AnswerLogprobs(msgspec.Struct, eq=False):
    """Of the prompt from the position asked for, and of all tokens made so far.

    The first token of `prompt` has no value. Of `output` there is one element for each of the
    answer's output_ids, a matched stop token included.

    Each value is the logarithm of a softmax over the whole vocabulary. Of an output token it is
    that of the logits that it was chosen by, biases and penalties applied, divided by the
    temperature (not if that is 0), before top-k, top-p and min-p; of a prompt token that of the
    model's own logits.
    """

    prompt: LogprobLists
    output: LogprobLists

    @classmethod
    def empty(cls) -> AnswerLogprobs:
        return cls(LogprobLists(), LogprobLists())

    def take(self, news: LogprobNews) -> None:
        if news.prompt is not None:
            self.prompt.extend(news.prompt)
        if news.output is not None:
            self.output.extend(news.output)

    def since(self, prompt: int, output: int) -> AnswerLogprobs:
        """Without so many tokens of either; since(0, 0) does not follow later changes."""
        return AnswerLogprobs(self.prompt.since(prompt), self.output.since(output))


def _texts(texts: Sequence[str], count: int) -> Sequence[str | None]:
    return texts if texts else [None] * count


def _rows(
    values: list[float], ids: list[int], texts: Sequence[str | None], known: list[bool]
) -> list[Alternatives]:
    """The flat lists, in as many rows as `known` has; no alternatives where that is false."""
    width = len(values) // max(len(known), 1)
    flat: list[TokenLogprob] = list(zip(values, ids, texts, strict=True))
    return [
        flat[row * width : (row + 1) * width] if is_known else None
        for row, is_known in enumerate(known)
    ]
