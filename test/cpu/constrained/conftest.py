"""A vocabulary that is small enough to check by brute force, and both grammar libraries on it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest

from sglang.srt.constrained.constraint import Constraint
from sglang.srt.constrained.grammar import Grammar, GrammarBackend, Words
from sglang.srt.sampling_params import SamplingParams

TEXTS = [*map(chr, range(0x20, 0x7F)), "\n", "\t", "ab", "bca", "aaa", "cab", '": ', '{"', "true"]
EOS = len(TEXTS)
SPECIAL = EOS + 1  # a token that is no text, though it looks like one
ENTRIES = [*TEXTS, "<eos>", "abc"]
VOCAB_SIZE = len(ENTRIES)


class Vocabulary(NamedTuple):
    entries: list[str]
    eos: int
    special: int

    @property
    def size(self) -> int:
        return len(self.entries)

    def allowed(self, words: Words) -> set[int]:
        bits = np.unpackbits(words.view(np.uint8), bitorder="little")
        return set(np.flatnonzero(bits).tolist())

    def text(self, tokens: list[int]) -> str:
        return "".join(self.entries[token] for token in tokens if token != self.eos)


class _Tokens:
    """What llguidance asks of a tokenizer."""

    eos_token_id = EOS
    bos_token_id = None
    tokens = [entry.encode() for entry in ENTRIES]  # noqa: RUF012
    special_token_ids = [EOS, SPECIAL]  # noqa: RUF012

    def __call__(self, text: str | bytes) -> list[int]:
        plain = text.decode() if isinstance(text, bytes) else text
        return [ENTRIES.index(character) for character in plain]


def _xgrammar(**options: Any) -> GrammarBackend:
    xgrammar = pytest.importorskip("xgrammar")
    from sglang.srt.constrained.xgrammar_backend import XGrammarBackend

    tokens = xgrammar.TokenizerInfo(
        [entry.encode() for entry in ENTRIES],
        xgrammar.VocabType.RAW,
        vocab_size=VOCAB_SIZE,
        stop_token_ids=[EOS],
    )
    return XGrammarBackend(
        tokens, vocab_size=VOCAB_SIZE, end_ids=[EOS], special_ids=[EOS, SPECIAL], **options
    )


def _llguidance(**options: Any) -> GrammarBackend:
    llguidance = pytest.importorskip("llguidance")
    from sglang.srt.constrained.llguidance_backend import LLGuidanceBackend

    tokens = llguidance.LLTokenizer(
        llguidance.TokenizerWrapper(_Tokens()), n_vocab=VOCAB_SIZE, eos_token=[EOS]
    )
    return LLGuidanceBackend(
        tokens, vocab_size=VOCAB_SIZE, end_ids=[EOS], special_ids=[EOS, SPECIAL], **options
    )


MAKERS = {"xgrammar": _xgrammar, "llguidance": _llguidance}
MakeBackend = Callable[..., GrammarBackend]
Constrain = Callable[..., Constraint]


@pytest.fixture(scope="session")
def vocabulary() -> Vocabulary:
    return Vocabulary(ENTRIES, EOS, SPECIAL)


@pytest.fixture(scope="session", params=sorted(MAKERS))
def make_backend(request: pytest.FixtureRequest) -> MakeBackend:
    """make_backend(any_whitespace=..., ...) of each library."""
    return MAKERS[request.param]


@pytest.fixture(scope="session")
def make_xgrammar() -> MakeBackend:
    return _xgrammar


@pytest.fixture(scope="session")
def make_llguidance() -> MakeBackend:
    return _llguidance


@pytest.fixture(scope="session")
def backend(make_backend: MakeBackend) -> GrammarBackend:
    return make_backend()


@pytest.fixture(scope="session")
def constrain() -> Constrain:
    """constrain(backend, kind, text, **sampling): a constraint at its beginning."""

    def make(backend: GrammarBackend, kind: Any, text: str, **sampling: Any) -> Constraint:
        grammar = Grammar(kind, text)
        params = SamplingParams(**{kind: text}, **sampling)
        return Constraint(grammar, backend.compile(grammar), backend, params)

    return make
