"""Constraint: the tokens that may come next in one answer, whatever library says so."""

from __future__ import annotations

from collections.abc import Iterable

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

        def words(tokens: Iterable[int]) -> Words:
            return words_of(tokens, vocab_size)

        self._ends = words(self.end_ids)
        self._own_ends = words(backend.end_ids)
        self._stops = words([*self.end_ids, *sampling.stop_token_ids])
        self._avoided = self._own_ends if sampling.ignore_eos else words(())
        hidden = backend.special_ids - backend.end_ids
        self._text = ~words(() if grammar.kind == "structural_tag" else hidden)
        self._text &= words(range(vocab_size))  # a row may be padded
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
