"""The grammar backend that the flags ask for."""

from __future__ import annotations

import importlib.util
from typing import Any

from sglang.srt.constrained.compiler import GrammarCompiler
from sglang.srt.constrained.grammar import GrammarBackend
from sglang.srt.constrained.grammar_queue import GrammarQueue
from sglang.srt.errors import ConfigError
from sglang.srt.server_args import ServerArgs

DEFAULT_BACKEND = "xgrammar"


def make_grammars(args: ServerArgs, vocab_size: int, eos_token_ids: frozenset[int]) -> GrammarQueue:
    """Loads the backend if a flag names it. Raises ConfigError naming the flag."""
    if args.grammar_backend == "none":
        return GrammarQueue(None, "the server was started with --grammar-backend none")
    if args.skip_tokenizer_init:
        return GrammarQueue(None, "the server has no tokenizer (--skip-tokenizer-init)")
    compiler = GrammarCompiler(lambda: load_backend(args, vocab_size, eos_token_ids))
    if args.grammar_backend is not None:
        compiler.load_now()
    return GrammarQueue(compiler)


def require_installed(name: str | None) -> None:
    """Raises ConfigError if the library of that name is missing; "none", or no name, needs none."""
    if name not in (None, "none") and importlib.util.find_spec(name) is None:
        raise ConfigError(
            f"--grammar-backend {name}: {name} is not installed, "
            "pip install 'sglang-drift[grammar]' has it"
        )


def load_backend(
    args: ServerArgs, vocab_size: int, eos_token_ids: frozenset[int]
) -> GrammarBackend:
    """vocab_size: of the model. Takes seconds. Raises ConfigError."""
    name = args.grammar_backend or DEFAULT_BACKEND
    require_installed(name)
    from sglang.srt.served_model import load_served_tokenizer

    tokenizer = load_served_tokenizer(args)
    end_ids = eos_token_ids or _end_of(tokenizer)
    if not end_ids:
        raise ConfigError(
            f"--grammar-backend {name}: neither the model nor its tokenizer names a token that "
            "ends a sequence"
        )
    # A tokenizer may know more tokens than the model, or fewer.
    rows = max(vocab_size, len(tokenizer))
    special_ids = _special_ids(tokenizer)
    any_whitespace = not args.constrained_json_disable_any_whitespace
    if name == "llguidance":
        from sglang.srt.constrained.llguidance_backend import LLGuidanceBackend

        return LLGuidanceBackend.of_tokenizer(
            tokenizer,
            vocab_size=rows,
            end_ids=end_ids,
            special_ids=special_ids,
            any_whitespace=any_whitespace,
            whitespace_pattern=args.constrained_json_whitespace_pattern,
        )
    from sglang.srt.constrained.xgrammar_backend import XGrammarBackend

    return XGrammarBackend.of_tokenizer(
        tokenizer,
        vocab_size=rows,
        end_ids=end_ids,
        special_ids=special_ids,
        any_whitespace=any_whitespace,
    )


def _end_of(tokenizer: Any) -> frozenset[int]:
    end = tokenizer.eos_token_id
    return frozenset() if end is None else frozenset({end})


def _special_ids(tokenizer: Any) -> frozenset[int]:
    """Those that the text of an answer leaves out by default."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return frozenset(tokenizer.all_special_ids) | {
        token for token, entry in added.items() if entry.special
    }
