"""What a data set yields: conversations of one or more turns."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

TokenIds = NDArray[np.int32]
Prompt = str | TokenIds


@dataclass(frozen=True, slots=True, eq=False)
class Turn:
    """What the user adds in one turn; the client puts the history before it.

    prompt: text, or token ids [tokens] i32. prompt_tokens: its length if the client knows it.
    max_tokens: the tokens asked for.
    """

    prompt: Prompt
    prompt_tokens: int | None
    max_tokens: int


@dataclass(frozen=True, slots=True, eq=False)
class Conversation:
    """Turns asked one after the other, each when the answer before it is complete.

    trace_s: when a trace says the conversation begins, counted from the trace's first row kept.
    """

    turns: tuple[Turn, ...]
    trace_s: float | None = None
