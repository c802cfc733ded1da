"""RequestLogprobs: what is known of one request's log-probabilities, and what of it is sent."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from sglang.srt.logprobs import LogprobNews, LogprobRows, LogprobWish, TokenScores


class RequestLogprobs:
    """Owned by the engine thread.

    Of the prompt the answer covers positions `wish.start` and on. The first of them has no value;
    the others have theirs from the logits of the token before, so that of the positions
    start..len(prompt)-2 the logits are needed, each of them once in a request's life.
    """

    def __init__(self, wish: LogprobWish, prompt: npt.NDArray[np.int32]) -> None:
        self._wish = wish
        self._prompt = prompt
        self._launched = wish.start  # positions before it need no logits, or have had them
        self._prompt_scores: list[TokenScores] = []
        self._prompt_sent = wish.start == len(prompt)
        self._output_scores: list[TokenScores] = []

    @property
    def reuse_limit(self) -> int | None:
        """Tokens that may come from the prefix cache, None if all: their logits do not."""
        return self._launched if self._launched < len(self._prompt) - 1 else None

    def launch(self, start: int, end: int) -> range:
        """Which positions of start..end-1, which are being computed, are to give logits."""
        stop = min(end, len(self._prompt) - 1)
        scored = range(max(start, self._launched), stop)
        self._launched = max(self._launched, stop)
        return scored

    def take_prompt(self, scores: TokenScores) -> None:
        """Of the positions that the oldest launch which has not given them named."""
        self._prompt_scores.append(scores)

    def take_output(self, scores: TokenScores) -> None:
        """Of one more output token."""
        self._output_scores.append(scores)

    def news(self, output: Sequence[int], sent: int) -> LogprobNews:
        """What has come, given all output tokens and how many of them were sent before."""
        fresh, self._output_scores = self._output_scores, []
        assert len(fresh) == len(output) - sent, f"{len(output) - sent} tokens, {len(fresh)} scores"
        return LogprobNews(
            prompt=self._prompt_rows(),
            output=LogprobRows.of(output[sent:], TokenScores.joined(fresh), self._wish)
            if fresh
            else None,
        )

    def _prompt_rows(self) -> LogprobRows | None:
        if self._prompt_sent:
            return None
        self._prompt_sent = True
        wish = self._wish
        scores = TokenScores.joined([TokenScores.unknown(wish), *self._prompt_scores])
        self._prompt_scores.clear()
        end = wish.start + len(scores.chosen)
        return LogprobRows.of(self._prompt[wish.start : end].tolist(), scores, wish)
