"""Constraint: the tokens that may come next in one answer, whatever library says so."""

from __future__ import annotations

import functools

import numpy as np

from sglang.srt.constrained.grammar import (
    CompiledGrammar,
    Grammar,
    GrammarBackend,
    GrammarError,
    Words,
    words_of,
)
from sglang.srt.sampling_params import SamplingParams


class Constraint:
    """Owned by its request, on the engine thread; what is compiled is shared.

    An answer ends with an end of sequence, or with a special token among the client's
    stop_token_ids. Where it may end, min_new_tokens and ignore_eos keep it from ending only as
    long as something else may follow: an answer that is complete ends. Special tokens are not
    text, though a library may take them for what they are called; only structural tags name them.
    """

    def __init__(
        self,
        grammar: Grammar,
        compiled: CompiledGrammar,
        backend: GrammarBackend,
        sampling: SamplingParams,
    ) -> None:
        self._matcher = compiled.matcher()
        self._minimum = sampling.min_new_tokens
        vocab_size = backend.vocab_size
        self.end_ids = backend.end_ids | (backend.special_ids & {*sampling.stop_token_ids})

        self._ends = _words_of(self.end_ids, vocab_size)
        self._own_ends = _words_of(backend.end_ids, vocab_size)
        self._stops = _words_of(self.end_ids | {*sampling.stop_token_ids}, vocab_size)
        self._avoided = self._own_ends if sampling.ignore_eos else np.zeros_like(self._ends)
        hidden = backend.special_ids - backend.end_ids
        if grammar.kind == "structural_tag":
            hidden = frozenset()
        self._text = _all_but(hidden, vocab_size)
        self._allowed: Words | None = None
        self._dead_end: str | None = None

    def allowed(self, generated: int) -> Words:
        """The tokens that may come next, behind `generated` ones. Never empty: at a dead end an
        end of sequence is allowed, which `take` then refuses."""
        if self._allowed is None:
            self._allowed = self._look(generated)
        return self._allowed

    def take(self, token: int) -> str | None:
        """Goes on behind a token; says why, if it may not come next."""
        self._allowed = None
        if self._dead_end is not None:
            return self._dead_end
        if token in self.end_ids or self._matcher.accept(token):
            return None
        return f"token {token} does not follow the grammar"

    def _look(self, generated: int) -> Words:
        words: Words = np.zeros(len(self._text), dtype=np.int32)
        try:
            self._matcher.fill(words)
        except GrammarError as error:
            self._dead_end = str(error)
            return self._own_ends
        words &= self._text
        if (words & self._own_ends).any():
            words |= self._ends
        without = words & ~(self._stops if generated < self._minimum else self._avoided)
        if without.any():
            return without
        if not words.any():
            self._dead_end = "no token of the model can follow here"
            return self._own_ends
        return words


# A vocabulary is large and requests are many: each of their sets is made once.
_words_of = functools.lru_cache(maxsize=64)(words_of)


@functools.lru_cache(maxsize=4)
def _all_but(hidden: frozenset[int], vocab_size: int) -> Words:
    """A row may be padded: what is behind the vocabulary is not in it."""
    everything = words_of(range(vocab_size), vocab_size)
    return everything & ~words_of(hidden, vocab_size)
