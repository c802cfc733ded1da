"""RequestMetrics: what the HTTP process sees of requests, as plain counts.

They are read when someone scrapes /metrics (see prometheus.py). Counting happens for every token of
every request, on the thread that also streams them, so it is no more than a few additions.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

from sglang.srt.managers.answers import Answer
from sglang.srt.service_levels import OWN_REQUEST

_TTFT_BOUNDS_S = (
    *(0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1, 2, 4, 6, 8, 10),
    *(20, 40, 60, 80, 100, 200, 400),
)
_TOKEN_BOUNDS_S = (
    *(0.002, 0.004, 0.006, 0.008, 0.01, 0.015, 0.02, 0.025, 0.03, 0.035, 0.04, 0.05, 0.06, 0.08),
    *(0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1, 2, 4, 8),
)
_LENGTH_BOUNDS = tuple(2**power for power in range(4, 21))
_REQUEST_BOUNDS_S = (0.1, 0.2, 0.4, 0.6, 0.8, 1, 2, 4, 6, 8, 10, 20, 40, 60, 80, 100, 200, 400, 800)


class Histogram:
    """bounds: upper ones of the buckets, ascending; one bucket more has the rest."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        self.counts[bisect_left(self.bounds, value)] += times
        self.sum += value * times


class RequestMetrics:
    """Totals since the start. The server's own requests do not count."""

    def __init__(self) -> None:
        self.ttft_s = Histogram(_TTFT_BOUNDS_S)
        self.inter_token_s = Histogram(_TOKEN_BOUNDS_S)
        self.per_output_token_s = Histogram(_TOKEN_BOUNDS_S)
        """One value a request: the time after its first token, divided by the other tokens."""
        self.e2e_s = Histogram(_REQUEST_BOUNDS_S)
        self.prompt_lengths = Histogram(_LENGTH_BOUNDS)
        self.uncached_lengths = Histogram(_LENGTH_BOUNDS)
        self.answer_lengths = Histogram(_LENGTH_BOUNDS)
        self.finished = 0
        self.aborted = 0
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.generation_tokens = 0

    def took(self, answer: Answer, new_tokens: int, now_s: float) -> None:
        """The answer has news: so many tokens, its end, or both."""
        if answer.prompt.level is OWN_REQUEST:
            return
        if new_tokens:
            self._count_tokens(answer, new_tokens, now_s)
        if answer.finish is not None:
            self._count_end(answer, now_s)

    def left(self, answer: Answer) -> None:
        """Its client has gone before its end."""
        if answer.prompt.level is not OWN_REQUEST:
            self.aborted += 1

    def _count_tokens(self, answer: Answer, new_tokens: int, now_s: float) -> None:
        self.generation_tokens += new_tokens
        if answer.last_token_s is None:
            answer.first_token_s = now_s
            self.ttft_s.observe(now_s - answer.started_s)
        else:
            # Tokens that arrive together have waited for each other.
            self.inter_token_s.observe((now_s - answer.last_token_s) / new_tokens, new_tokens)
        answer.last_token_s = now_s

    def _count_end(self, answer: Answer, now_s: float) -> None:
        assert answer.finish is not None
        if answer.finish.type == "abort":
            self.aborted += 1
            return
        self.finished += 1
        self.prompt_tokens += answer.prompt_tokens
        self.cached_tokens += answer.cached_tokens
        self.prompt_lengths.observe(answer.prompt_tokens)
        self.uncached_lengths.observe(answer.prompt_tokens - answer.cached_tokens)
        self.answer_lengths.observe(answer.completion_tokens)
        self.e2e_s.observe(now_s - answer.started_s)
        if answer.first_token_s is not None and answer.completion_tokens > 1:
            decoding_s = now_s - answer.first_token_s
            self.per_output_token_s.observe(decoding_s / (answer.completion_tokens - 1))
