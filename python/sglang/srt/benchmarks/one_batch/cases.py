"""What is measured: decode steps, prefills, and whole generations of one batch."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PrefillCase:
    """`requests` prompts in one batch, each with `new_tokens` behind `cached_tokens`."""

    new_tokens: int
    cached_tokens: int = 0
    requests: int = 1

    @property
    def length(self) -> int:
        """Tokens of each request, cached and new."""
        return self.cached_tokens + self.new_tokens

    def __str__(self) -> str:
        batch = "" if self.requests == 1 else f"{self.requests}x"
        return f"{batch}{self.new_tokens}+{self.cached_tokens}"

    @classmethod
    def parse(cls, text: str) -> PrefillCase:
        """Reads "8192", "2048+32768" or "4x512+8192"; ValueError otherwise."""
        match = re.fullmatch(r"(?:(\d+)x)?(\d+)(?:\+(\d+))?", text)
        if match is None or not int(match[2]) or match[1] == "0":
            raise ValueError(f"expected NEW+CACHED or BATCHxNEW+CACHED tokens, got {text!r}")
        return cls(int(match[2]), int(match[3] or 0), int(match[1] or 1))


@dataclass(frozen=True, slots=True)
class DecodeCase:
    """One step of `requests` sequences that are `length` tokens long, the new one included."""

    requests: int
    length: int

    def __str__(self) -> str:
        return f"{self.requests}x{self.length}"

    @classmethod
    def parse(cls, text: str) -> DecodeCase:
        """Reads "48x8800"; ValueError otherwise."""
        match = re.fullmatch(r"(\d+)x(\d+)", text)
        if match is None or not int(match[1]) or not int(match[2]):
            raise ValueError(f"expected BATCHxLENGTH, got {text!r}")
        return cls(int(match[1]), int(match[2]))


@dataclass(frozen=True, slots=True)
class GenerationCase:
    """SGLang's own case: a batch of prompts is prefilled, then decoded to `output_tokens`."""

    requests: int
    input_tokens: int
    output_tokens: int

    @property
    def length(self) -> int:
        return self.input_tokens + self.output_tokens

    @property
    def prefill(self) -> PrefillCase:
        return PrefillCase(self.input_tokens, 0, self.requests)

    def __str__(self) -> str:
        return f"{self.requests}x{self.input_tokens}->{self.output_tokens}"


Case = DecodeCase | PrefillCase | GenerationCase

# Of an 8B model on an 80 GB GPU: the batches at which decode is bound by its KV cache, by both
# and by the weights; a long prompt, a turn of a long conversation and a short turn.
DEFAULT_DECODE = (
    DecodeCase(48, 8800),
    DecodeCase(128, 2048),
    DecodeCase(32, 1024),
    DecodeCase(1, 1024),
)
DEFAULT_PREFILL = (PrefillCase(8192, 0), PrefillCase(2048, 32768), PrefillCase(512, 8192))


def pool_tokens(case: Case, page_size: int) -> int:
    """Slots that the case takes in whole pages."""
    return case.requests * (-(-case.length // page_size) * page_size)
