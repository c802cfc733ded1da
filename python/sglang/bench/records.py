"""What is kept of every request. All times come from time.perf_counter()."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class Answer:
    """One request as the client saw it. `error` is empty when it succeeded.

    A chunk is what one read from the socket brought, so tokens that arrive together count as
    one chunk. chunk_gaps_s[i] is the time between chunk i and chunk i + 1, and chunk_tokens[i]
    the new tokens in the latter; the first chunk sets ttft_s instead.
    An answer without tokens, or not streamed, has ttft_s = latency_s.
    """

    start_s: float
    ttft_s: float = 0.0
    latency_s: float = 0.0
    chunk_gaps_s: list[float] = field(default_factory=list)
    chunk_tokens: list[int] = field(default_factory=list)
    prompt_tokens: int | None = None
    output_tokens: int = 0
    cached_tokens: int | None = None
    text: str = ""
    output_ids: list[int] | None = None
    error: str = ""


@dataclass(slots=True)
class RequestRecord:
    """An answer and its place in the run.

    due_s: when the conversation was to begin, counted from the start of the run.
    known_prompt_tokens: the prompt's length by the client's own count, if it has one.
    """

    conversation: int
    turn: int
    due_s: float
    known_prompt_tokens: int | None
    answer: Answer

    @property
    def ok(self) -> bool:
        return not self.answer.error

    @property
    def prompt_tokens(self) -> int:
        """The server's count; else the client's; else 0."""
        if self.answer.prompt_tokens is not None:
            return self.answer.prompt_tokens
        return self.known_prompt_tokens or 0

    @property
    def tpot_s(self) -> float | None:
        """Mean time per output token after the first; None below two tokens."""
        if self.answer.output_tokens < 2:
            return None
        return (self.answer.latency_s - self.answer.ttft_s) / (self.answer.output_tokens - 1)

    def token_latencies_s(self) -> list[float]:
        """Each chunk gap divided among the tokens of its chunk: [tokens after the first chunk]."""
        latencies: list[float] = []
        for gap_s, tokens in zip(self.answer.chunk_gaps_s, self.answer.chunk_tokens, strict=True):
            latencies += [gap_s / tokens] * tokens
        return latencies
