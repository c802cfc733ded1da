"""How prefill and decode share the device, as the flags say it.

    table        at the same time on disjoint parts, divided by a table of decode batch sizes
    chunked:N    prompts ride in decode steps of up to N tokens, on the whole device

Without either they take turns on the whole device.
"""

from __future__ import annotations

from dataclasses import dataclass

from sglang.srt.flags import token_count
from sglang.srt.pdmux_config import PdmuxConfig

TABLE = "table"


@dataclass(frozen=True, slots=True)
class ChunkedSteps:
    """Prompts ride in decode steps. step_tokens: tokens of a step at most, those of running
    requests included; None takes the size of a prefill chunk."""

    step_tokens: int | None = None


# None: they take turns.
MultiplexPolicy = PdmuxConfig | ChunkedSteps | None


def parse_chunked(text: str) -> ChunkedSteps | None:
    """Reads "chunked:512" or "chunked:1K"; None for "table". ValueError otherwise."""
    if text == TABLE:
        return None
    name, _, count = text.partition(":")
    if name == "chunked":
        try:
            step_tokens = token_count(count)
        except ValueError:
            step_tokens = 0
        if step_tokens >= 1:
            return ChunkedSteps(step_tokens)
    raise ValueError(f"expected table or chunked:N with N tokens a step, got {text!r}")
