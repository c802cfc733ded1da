"""What a grammar library is asked for, and what it gives.

A set of tokens is a row of words [ceil(vocab_size / 32)] i32: bit i of word w is token 32 * w + i.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, NamedTuple, Protocol, get_args

import numpy as np
import numpy.typing as npt

GrammarKind = Literal["json_schema", "regex", "ebnf", "structural_tag"]
GRAMMAR_KINDS: tuple[GrammarKind, ...] = get_args(GrammarKind)
Words = npt.NDArray[np.int32]

# Between two parts of freely laid out JSON. Without an end to it, models that are small or warm
# write newlines until their last token. xgrammar's automata grow with it.
MAX_WHITESPACE_CHARS = 24


class Grammar(NamedTuple):
    """A grammar as a client wrote it."""

    kind: GrammarKind
    text: str


class GrammarError(Exception):
    """The grammar cannot be followed; the text is for the client."""

    status_code = 400


class NoWorker(GrammarError):
    """The grammar may be well, but there is nobody to compile it."""

    status_code = 503


class Matcher(Protocol):
    """How far one answer has come in its grammar."""

    def fill(self, words: Words) -> None:
        """Sets exactly the tokens that may come next; the model's ends of sequence are among them
        if the answer may end here. Raises GrammarError when the library gives up."""
        ...

    def accept(self, token: int) -> bool:
        """Goes on behind an ordinary token; False if it may not come next."""
        ...


class CompiledGrammar(Protocol):
    """Shared by all answers that follow the grammar."""

    @property
    def size_bytes(self) -> int: ...

    def matcher(self) -> Matcher: ...


class GrammarBackend(Protocol):
    """A grammar library that knows the model's tokens."""

    @property
    def vocab_size(self) -> int:
        """Tokens in a row: at least those that the model can choose."""
        ...

    @property
    def end_ids(self) -> frozenset[int]:
        """Ids that end a sequence; at least one."""
        ...

    @property
    def special_ids(self) -> frozenset[int]:
        """Tokens that are not text; clients mostly do not see them."""
        ...

    def compile(self, grammar: Grammar) -> CompiledGrammar:
        """May take seconds; called from several threads. Raises GrammarError with the reason."""
        ...


def words_for(vocab_size: int) -> int:
    return -(-vocab_size // 32)


def words_of(tokens: Iterable[int], vocab_size: int) -> Words:
    """The set of these tokens; those outside the vocabulary are left out."""
    bits = np.zeros(32 * words_for(vocab_size), dtype=np.bool_)
    bits[[token for token in tokens if 0 <= token < vocab_size]] = True
    return np.packbits(bits, bitorder="little").view(np.int32)
