"""XGrammar behind the protocol of grammar.py."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from sglang.srt.constrained.grammar import (
    MAX_WHITESPACE_CHARS,
    Grammar,
    GrammarError,
    Words,
    words_of,
)
from sglang.srt.constrained.patterns import with_plain_patterns
from sglang.srt.constrained.schema_support import unenforced_keyword
from sglang.srt.constrained.structural_tags import legacy_tags

if TYPE_CHECKING:
    import xgrammar

# "[12:00:00] /some/where/file.cc:123: " in front of what the library has to say.
_WHERE = re.compile(r"^\[[\d:]+\] \S+:\d+: (Check failed: \(.*?\) is false: )?")
MAX_THREADS = 4
# The library's own cache. Whole grammars are kept elsewhere, but schemas share parts, such as
# strings and numbers: with it a new one compiles two to three times as fast.
SHARED_PARTS_BYTES = 64 << 20
# A string with a length limit may hold raw control characters, says the library. JSON forbids
# them, and does without: tabs are no part of the layout then. In a structural tag they may be text.
_NOT_IN_JSON = re.compile(rb"[\x00-\x09\x0b\x0c\x0e-\x1f]")
_NOT_IN_TAGS = re.compile(rb"[\x00-\x08\x0b\x0c\x0e-\x1f]")
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
        self._hidden = {
            "json_schema": _tokens_with(_NOT_IN_JSON, tokens, vocab_size),
            "structural_tag": _tokens_with(_NOT_IN_TAGS, tokens, vocab_size),
        }
        # Lanes want processors too.
        threads = max(1, min(MAX_THREADS, (os.cpu_count() or 1) // 4))
        self._compiler = xgrammar.GrammarCompiler(
            tokens, max_threads=threads, cache_limit_bytes=SHARED_PARTS_BYTES
        )

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
            return CompiledXGrammar(self._compile(grammar), self._hidden.get(grammar.kind))
        except GrammarError:
            raise
        except Exception as error:
            raise GrammarError(_WHERE.sub("", str(error)).strip()[:MAX_REASON_CHARS]) from error

    def _compile(self, grammar: Grammar) -> xgrammar.CompiledGrammar:
        text = grammar.text
        match grammar.kind:
            case "json_schema":
                return self._compiler.compile_json_schema(
                    with_plain_patterns(text),
                    any_whitespace=self._any_whitespace,
                    max_whitespace_cnt=MAX_WHITESPACE_CHARS if self._any_whitespace else None,
                )
            case "regex":
                return self._compiler.compile_regex(text)
            case "ebnf":
                return self._compiler.compile_grammar(text)
            case "structural_tag":
                return self._compiler.compile_structural_tag(
                    _structural_tag(text, MAX_WHITESPACE_CHARS if self._any_whitespace else 1)
                )


class CompiledXGrammar:
    """hidden: tokens that are never allowed."""

    def __init__(self, compiled: xgrammar.CompiledGrammar, hidden: Words | None) -> None:
        self._compiled = compiled
        self._hidden = hidden
        self.size_bytes: int = compiled.memory_size_bytes

    def matcher(self) -> XGrammarMatcher:
        import xgrammar

        return XGrammarMatcher(xgrammar.GrammarMatcher(self._compiled), self._hidden)


class XGrammarMatcher:
    def __init__(self, matcher: xgrammar.GrammarMatcher, hidden: Words | None) -> None:
        self._matcher = matcher
        self._shown = None if hidden is None else ~hidden

    def fill(self, words: Words) -> None:
        self._matcher.fill_next_token_bitmask(words.reshape(1, -1))
        if self._shown is not None:
            words &= self._shown

    def accept(self, token: int) -> bool:
        accepted: bool = self._matcher.accept_token(token)
        return accepted


def _structural_tag(text: str, max_whitespace_chars: int) -> str:
    """The library's own form; the older one, a list of tags and triggers, is translated. Where
    its JSON says nothing of whitespace, so much may stand between two parts."""
    import xgrammar

    legacy = legacy_tags(text)
    if legacy is None:
        tag = json.loads(text)
    else:
        tag = xgrammar.StructuralTag.from_legacy_structural_tag(
            [
                xgrammar.StructuralTagItem(
                    begin=tag.begin, schema=json.dumps(tag.schema), end=tag.end
                )
                for tag in legacy.structures
            ],
            legacy.triggers,
        ).model_dump()
    _limit_whitespace(tag, max_whitespace_chars)
    return json.dumps(tag)


def _limit_whitespace(part: Any, chars: int) -> None:
    if isinstance(part, list):
        for inner in part:
            _limit_whitespace(inner, chars)
    elif isinstance(part, dict):
        if part.get("type") != "json_schema":
            _limit_whitespace(list(part.values()), chars)
        elif part.get("max_whitespace_cnt") is None:
            part["max_whitespace_cnt"] = chars


def _tokens_with(bytes_like: re.Pattern[bytes], tokens: Any, vocab_size: int) -> Words:
    found = (i for i, text in enumerate(tokens.decoded_vocab) if bytes_like.search(text))
    return words_of(found, vocab_size)
