"""The flags choose the grammar library, which then speaks the model's own tokens."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest

from sglang.srt import served_model
from sglang.srt.constrained.constraint import Constraint
from sglang.srt.constrained.factory import load_backend, make_grammars
from sglang.srt.constrained.grammar import Grammar
from sglang.srt.errors import ConfigError
from sglang.srt.sampling_params import SamplingParams
from sglang.srt.server_args import ServerArgs
from sglang.srt.tokenizer import load_tokenizer

EOS = frozenset({2})


@pytest.fixture(scope="module")
def tokenizer(smollm2_path):
    return load_tokenizer(smollm2_path)


@pytest.mark.parametrize("name", ["xgrammar", "llguidance"])
def test_a_library_speaks_the_models_tokens(name, tokenizer, monkeypatch):
    pytest.importorskip(name)
    monkeypatch.setattr(served_model, "load_served_tokenizer", lambda args: tokenizer)
    args = ServerArgs(model_path="m", grammar_backend=name)
    backend = load_backend(args, vocab_size=len(tokenizer) + 64, eos_token_ids=EOS)
    grammar = Grammar("regex", "[^x]{1,99}")
    constraint = Constraint(grammar, backend.compile(grammar), backend, SamplingParams())
    bits = np.unpackbits(constraint.allowed(0).view(np.uint8), bitorder="little")
    allowed = np.flatnonzero(bits).tolist()
    # Special tokens look like text without an x, the padding behind the vocabulary like nothing.
    assert not {0, 1, 2} & set(allowed)
    assert max(allowed) < len(tokenizer)
    ordinary = tokenizer.encode("hello", add_special_tokens=False)
    assert ordinary[0] in allowed
    assert tokenizer.encode("x", add_special_tokens=False)[0] not in allowed
    for token in ordinary:
        constraint.allowed(1)
        assert constraint.take(token) is None


def test_a_library_that_is_not_installed_is_told_with_the_extra_that_has_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"llguidance is not installed.*sglang-drift\[grammar\]"):
        make_grammars(ServerArgs(model_path="m", grammar_backend="llguidance"), 100, EOS)


def test_without_the_flag_nothing_is_loaded_at_start(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    grammars = make_grammars(ServerArgs(model_path="m"), 100, EOS)
    assert grammars.compiler is not None and len(grammars) == 0


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        ({"grammar_backend": "none"}, "--grammar-backend none"),
        ({"skip_tokenizer_init": True}, "--skip-tokenizer-init"),
    ],
)
def test_a_server_that_cannot_have_grammars_says_why(flags, why):
    grammars = make_grammars(ServerArgs(model_path="m", **flags), 100, EOS)
    assert grammars.compiler is None
    assert why in grammars._refusal


def test_a_model_without_an_end_of_sequence_is_refused(monkeypatch):
    class Tokenizer:
        eos_token_id = None

    monkeypatch.setattr(served_model, "load_served_tokenizer", lambda args: Tokenizer())
    pytest.importorskip("xgrammar")
    with pytest.raises(ConfigError, match="ends a sequence"):
        load_backend(ServerArgs(model_path="m"), 100, frozenset())
