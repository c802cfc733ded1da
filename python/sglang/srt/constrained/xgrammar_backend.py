"""XGrammar behind the protocol of grammar.py."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from sglang.srt.constrained.grammar import Grammar, GrammarError, Words
from sglang.srt.constrained.schema_support import unenforced_keyword
from sglang.srt.constrained.structural_tags import legacy_tags

if TYPE_CHECKING:
    import xgrammar

# "[12:00:00] /some/where/file.cc:123: " in front of what the library has to say.
_WHERE = re.compile(r"^\[[\d:]+\] \S+:\d+: (Check failed: \(.*?\) is false: )?")
MAX_THREADS = 4
MAX_REASON_CHARS = 500


class XGrammarBackend:
    """any_whitespace: whether JSON may be laid out freely, or is compact."""

    def __init__(
        self,
        tokens: xgrammar.TokenizerInfo,
        *,
        vocab_size: int,
        end_ids: Iterable[int],
        special_ids: Iterable[int] = (),
        any_whitespace: bool = True,
    ) -> None:
        import xgrammar

        self.vocab_size = vocab_size
        self.end_ids = frozenset(end_ids)
        self.special_ids = frozenset(special_ids)
        self._any_whitespace = any_whitespace
        # Without a cache: what is kept, and how much of it, is decided in one place for all
        # libraries. Lanes want processors too.
        threads = max(1, min(MAX_THREADS, (os.cpu_count() or 1) // 4))
        self._compiler = xgrammar.GrammarCompiler(tokens, max_threads=threads, cache_enabled=False)

    @classmethod
    def of_tokenizer(
        cls,
        tokenizer: Any,
        *,
        vocab_size: int,
        end_ids: frozenset[int],
        special_ids: frozenset[int],
        any_whitespace: bool,
    ) -> XGrammarBackend:
        """tokenizer: of Hugging Face."""
        import xgrammar

        tokens = xgrammar.TokenizerInfo.from_huggingface(
            tokenizer, vocab_size=vocab_size, stop_token_ids=sorted(end_ids)
        )
        return cls(
            tokens,
            vocab_size=vocab_size,
            end_ids=end_ids,
            special_ids=special_ids,
            any_whitespace=any_whitespace,
        )

    def compile(self, grammar: Grammar) -> CompiledXGrammar:
        if grammar.kind == "json_schema":
            keyword = unenforced_keyword(grammar.text)
            if keyword is not None:
                raise GrammarError(f"the xgrammar backend does not enforce {keyword}")
        # The library raises errors of many types, among them plain RuntimeError, all of which
        # speak of the text it was given.
        try:
            return CompiledXGrammar(self._compile(grammar))
        except GrammarError:
            raise
        except Exception as error:
            raise GrammarError(_WHERE.sub("", str(error)).strip()[:MAX_REASON_CHARS]) from error

    def _compile(self, grammar: Grammar) -> xgrammar.CompiledGrammar:
        text = grammar.text
        match grammar.kind:
            case "json_schema":
                return self._compiler.compile_json_schema(text, any_whitespace=self._any_whitespace)
            case "regex":
                return self._compiler.compile_regex(text)
            case "ebnf":
                return self._compiler.compile_grammar(text)
            case "structural_tag":
                return self._compiler.compile_structural_tag(_structural_tag(text))


class CompiledXGrammar:
    def __init__(self, compiled: xgrammar.CompiledGrammar) -> None:
        self._compiled = compiled
        self.size_bytes: int = compiled.memory_size_bytes

    def matcher(self) -> XGrammarMatcher:
        import xgrammar

        return XGrammarMatcher(xgrammar.GrammarMatcher(self._compiled))


class XGrammarMatcher:
    def __init__(self, matcher: xgrammar.GrammarMatcher) -> None:
        self._matcher = matcher

    def fill(self, words: Words) -> None:
        self._matcher.fill_next_token_bitmask(words.reshape(1, -1))

    def accept(self, token: int) -> bool:
        accepted: bool = self._matcher.accept_token(token)
        return accepted


def _structural_tag(text: str) -> Any:
    """The library's own form; the older one, a list of tags and triggers, is translated."""
    import xgrammar

    legacy = legacy_tags(text)
    if legacy is None:
        return text
    return xgrammar.StructuralTag.from_legacy_structural_tag(
        [
            xgrammar.StructuralTagItem(begin=tag.begin, schema=json.dumps(tag.schema), end=tag.end)
            for tag in legacy.structures
        ],
        legacy.triggers,
    )
