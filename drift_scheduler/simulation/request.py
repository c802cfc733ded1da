"""A simulated request, and the parts of its prompt that launches take."""

from __future__ import annotations

from dataclasses import dataclass

from drift_scheduler.attainment import Pace
from drift_scheduler.simulation.trace import TraceRequest
from drift_scheduler.slo import Slo


class SimRequest:
    """One request's life in an engine. Its answer has the length that the trace says.

    key: unique in the engine, and in order of arrival. prompt_tokens: to be filled before it can
    decode; after a retraction what it has answered belongs to them. filled: of those, in the KV
    pool. read_blocks: cached blocks among these, kept from being evicted; the rest is its own.
    pace: when its tokens are on the host, by which the engine goes. seen: when they are sent, which
    is after the launches of the same turn.
    """

    __slots__ = (
        "arrival_s",
        "block_tokens",
        "blocks",
        "cached_tokens",
        "due_s",
        "filled",
        "input_tokens",
        "key",
        "last_step",
        "next_step",
        "output_tokens",
        "pace",
        "prompt_tokens",
        "read_blocks",
        "seen",
        "slo",
        "times_overtaken",
    )

    def __init__(self, key: str, request: TraceRequest, slo: Slo) -> None:
        self.key = key
        self.slo = slo
        self.arrival_s = request.arrival_s
        self.input_tokens = request.input_tokens
        self.prompt_tokens = request.input_tokens
        self.output_tokens = request.output_tokens
        self.blocks = request.blocks
        self.block_tokens = request.block_tokens
        self.pace = Pace(request.arrival_s, slo.tbt_s)
        self.seen = Pace(request.arrival_s, slo.tbt_s)
        self.due_s = 0.0  # its next token, when it was last queued
        self.cached_tokens: int | None = None  # when first taken up
        self.filled = 0
        self.read_blocks = 0
        self.times_overtaken = 0  # in a row, by prompts that fitted where it did not
        # Decode steps are numbered per engine: it takes part in next_step..last_step.
        self.next_step = 0
        self.last_step = -1

    @property
    def sharable_blocks(self) -> tuple[int, ...]:
        """Those that it could find cached: one token at least is computed."""
        return self.blocks[: (self.prompt_tokens - 1) // self.block_tokens]

    @property
    def steps(self) -> int:
        """Decode steps that it needs: filling the prompt gives one token already."""
        return self.output_tokens - (self.prompt_tokens - self.input_tokens) - 1

    @property
    def has_first_token(self) -> bool:
        """Whether filling the prompt has given its token already."""
        return self.pace.tokens > self.prompt_tokens - self.input_tokens

    @property
    def uncached_tokens(self) -> int:
        """Of its prompt, when it was first taken up."""
        return self.input_tokens - (self.cached_tokens or 0)


@dataclass(frozen=True, slots=True)
class Fill:
    """A request's part in a launch that fills prompts: its tokens start..end-1."""

    request: SimRequest
    start: int
    end: int
    completes_prompt: bool

    @property
    def tokens(self) -> int:
        return self.end - self.start
