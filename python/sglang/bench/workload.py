"""What a data set yields: conversations of one or more turns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

TokenIds = NDArray[np.int32]
Messages = list[dict[str, Any]]
Prompt = str | TokenIds | Messages


@dataclass(frozen=True, slots=True, eq=False)
class Turn:
    """What the user adds in one turn; the client puts the history before it.

    prompt: text, token ids [tokens] i32, or messages for a chat backend. prompt_tokens: its length
    if the client knows it. max_tokens: the tokens asked for. extra_body is laid over the request's
    own, headers are added to it.
    """

    prompt: Prompt
    prompt_tokens: int | None
    max_tokens: int
    extra_body: Mapping[str, Any] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class Conversation:
    """Turns asked one after the other, each when the answer before it is complete.

    trace_s: when a trace says the conversation begins, counted from the trace's first row kept.
    """

    turns: tuple[Turn, ...]
    trace_s: float | None = None
