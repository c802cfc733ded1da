"""llguidance behind the protocol of grammar.py."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from sglang.srt.constrained.grammar import (
    MAX_WHITESPACE_CHARS,
    Grammar,
    GrammarError,
    Words,
)
from sglang.srt.constrained.structural_tags import legacy_tags

if TYPE_CHECKING:
    import llguidance
    from llguidance._lib import JsonCompileOptions

# The library tells no sizes. A parser has tables of its own and grows with its text.
_BASE_BYTES = 64 << 10
_BYTES_PER_CHAR = 64
# A lexer state takes one or two kilobytes; the library's own limit would be half a gigabyte.
_MAX_LEXER_STATES = 50_000
_WHITESPACE = f"[ \\t\\r\\n]{{0,{MAX_WHITESPACE_CHARS}}}"
MAX_REASON_CHARS = 500


class LLGuidanceBackend:
    """any_whitespace: whether JSON may be laid out freely, or is compact; whitespace_pattern: the
    regex of what may stand between its parts, if not at most MAX_WHITESPACE_CHARS of any."""

    def __init__(
        self,
        tokens: llguidance.LLTokenizer,
        *,
        vocab_size: int,
        end_ids: Iterable[int],
        special_ids: Iterable[int] = (),
        any_whitespace: bool = True,
        whitespace_pattern: str | None = None,
    ) -> None:
        self.vocab_size = vocab_size
        self.end_ids = frozenset(end_ids)
        self.special_ids = frozenset(special_ids)
        self._tokens = tokens
        self._json_options: JsonCompileOptions = {"whitespace_flexible": any_whitespace}
        if any_whitespace:
            self._json_options["whitespace_pattern"] = whitespace_pattern or _WHITESPACE

    @classmethod
    def of_tokenizer(
        cls,
        tokenizer: Any,
        *,
        vocab_size: int,
        end_ids: frozenset[int],
        special_ids: frozenset[int],
        any_whitespace: bool,
        whitespace_pattern: str | None,
    ) -> LLGuidanceBackend:
        """tokenizer: of Hugging Face, a fast one."""
        from llguidance.hf import from_tokenizer

        tokens = from_tokenizer(tokenizer, n_vocab=vocab_size, eos_token=sorted(end_ids))
        return cls(
            tokens,
            vocab_size=vocab_size,
            end_ids=end_ids,
            special_ids=special_ids,
            any_whitespace=any_whitespace,
            whitespace_pattern=whitespace_pattern,
        )

    def compile(self, grammar: Grammar) -> CompiledLLGuidance:
        import llguidance

        try:
            matcher = llguidance.LLMatcher(
                self._tokens,
                self._definition(grammar),
                log_level=0,
                limits=llguidance.LLParserLimits(max_lexer_states=_MAX_LEXER_STATES),
            )
        except ValueError as error:
            raise _reason(error) from error
        if matcher.is_error():
            raise _reason(matcher.get_error())
        size_bytes = _BASE_BYTES + _BYTES_PER_CHAR * len(grammar.text)
        return CompiledLLGuidance(matcher, size_bytes)

    def _definition(self, grammar: Grammar) -> str:
        import llguidance

        text = grammar.text
        match grammar.kind:
            case "json_schema":
                return llguidance.LLMatcher.grammar_from_json_schema(
                    text, overrides=self._json_options
                )
            case "regex":
                return llguidance.LLMatcher.grammar_from_regex(text)
            case "ebnf":
                return llguidance.grammar_from("ebnf", text)
            case "structural_tag":
                return self._structural_tag(text)

    def _structural_tag(self, text: str) -> str:
        from llguidance import StructTag

        legacy = legacy_tags(text)
        if legacy is None:
            raise GrammarError(
                "the llguidance backend takes structural tags as structures and triggers only"
            )
        tags = []
        for tag in legacy.structures:
            trigger = next(t for t in legacy.triggers if t and tag.begin.startswith(t))
            schema = {**tag.schema, "x-guidance": self._json_options}
            tags.append(StructTag(trigger=trigger, begin=tag.begin, grammar=schema, end=tag.end))
        return StructTag.to_grammar(tags, assume_special=False)


class CompiledLLGuidance:
    def __init__(self, matcher: llguidance.LLMatcher, size_bytes: int) -> None:
        self._matcher = matcher
        self.size_bytes = size_bytes

    def matcher(self) -> LLGuidanceMatcher:
        return LLGuidanceMatcher(self._matcher.deep_copy())


class LLGuidanceMatcher:
    def __init__(self, matcher: llguidance.LLMatcher) -> None:
        self._matcher = matcher

    def fill(self, words: Words) -> None:
        self._matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
        if self._matcher.is_error():
            raise _reason(self._matcher.get_error())

    def accept(self, token: int) -> bool:
        return self._matcher.consume_token(token)


def _reason(error: object) -> GrammarError:
    return GrammarError(str(error).strip()[:MAX_REASON_CHARS])
