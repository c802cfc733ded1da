"""Grammars are compiled once, in workers, within a limit, and kept within bounds."""

from __future__ import annotations

import select
from collections.abc import Callable

import pytest

from sglang.srt.constrained.compiler import (
    LOAD_LIMIT_S,
    MAX_GIVEN_UP,
    GrammarCompiler,
)
from sglang.srt.constrained.grammar import Grammar, GrammarError, NoWorker
from sglang.srt.errors import ConfigError


class Compiled:
    def __init__(self, size_bytes: int) -> None:
        self.size_bytes = size_bytes

    def matcher(self):
        raise NotImplementedError


class Backend:
    """The size of what it makes is in the text; "bad" is no grammar, "bug" one of ours."""

    vocab_size = 8
    end_ids = special_ids = frozenset({1})

    def __init__(self) -> None:
        self.compiled: list[str] = []

    def compile(self, grammar: Grammar) -> Compiled:
        self.compiled.append(grammar.text)
        if grammar.text == "bad":
            raise GrammarError("it is bad")
        if grammar.text == "bug":
            raise ZeroDivisionError("oops")
        return Compiled(int(grammar.text.partition(" ")[2] or 1))


class Setup:
    """A compiler whose workers run when the test says, and whose time it makes."""

    def __init__(self, **options) -> None:
        self.backend = Backend()
        self.works: list[Callable[[], None]] = []
        self.now_s = 0.0
        load = options.pop("load", lambda: self.backend)
        self.compiler = GrammarCompiler(
            load,
            clock=lambda: self.now_s,
            spawn=lambda work: self.works.append(work),
            **options,
        )

    def ask(self, text: str):
        return self.compiler.ask(Grammar("regex", text))

    def run(self, count: int = 100) -> None:
        works, self.works = self.works[:count], self.works[count:]
        for work in works:
            work()

    def poll(self) -> dict[str, object]:
        return {grammar.text: outcome for grammar, outcome in self.compiler.poll().items()}

    def finish(self) -> dict[str, object]:
        outcomes: dict[str, object] = {}
        while self.works:
            self.run()
            outcomes |= self.poll()
        return outcomes


@pytest.fixture
def loaded() -> Setup:
    setup = Setup()
    setup.compiler.load_now()
    return setup


def test_a_grammar_asked_for_twice_is_compiled_once(loaded):
    assert loaded.ask("a") is None
    assert loaded.ask("a") is None
    assert set(loaded.finish()) == {"a"}
    assert loaded.ask("a") is not None
    assert loaded.backend.compiled == ["a"]
    assert loaded.compiler.counts.cache_hits == 1


def test_the_backend_is_loaded_with_the_first_grammar():
    setup = Setup()
    setup.ask("a")
    setup.ask("b")
    assert len(setup.works) == 1 and setup.backend.compiled == []
    assert set(setup.finish()) == {"a", "b"}


def test_a_backend_that_cannot_be_loaded_refuses_every_grammar():
    def load():
        raise ConfigError("xgrammar is not installed")

    setup = Setup(load=load)
    setup.ask("a")
    [outcome] = setup.finish().values()
    assert "not installed" in str(outcome)
    assert "not installed" in str(setup.ask("b"))
    assert setup.works == []


def test_a_backend_that_takes_too_long_to_load_keeps_nobody():
    setup = Setup()
    setup.ask("a")
    setup.now_s = LOAD_LIMIT_S
    assert isinstance(setup.poll()["a"], GrammarError)
    setup.ask("b")
    assert set(setup.finish()) == {"b"}


def test_no_more_workers_than_allowed_are_at_work():
    setup = Setup(workers=2)
    setup.compiler.load_now()
    for text in "abcd":
        setup.ask(text)
    assert len(setup.works) == 2
    setup.run(1)
    assert set(setup.poll()) == {"a"}
    assert len(setup.works) == 2
    assert set(setup.finish()) == {"b", "c", "d"}


def test_a_bad_grammar_is_told_and_remembered(loaded):
    loaded.ask("bad")
    assert str(loaded.finish()["bad"]) == "it is bad"
    assert str(loaded.ask("bad")) == "it is bad"
    assert loaded.backend.compiled == ["bad"]


def test_a_worker_that_fails_says_how(loaded, caplog):
    loaded.ask("bug")
    assert "ZeroDivisionError" in str(loaded.finish()["bug"])


def test_a_grammar_that_takes_too_long_is_given_up_and_its_worker_replaced():
    setup = Setup(workers=1, limit_s=10)
    setup.compiler.load_now()
    setup.ask("slow")
    setup.ask("b")
    setup.now_s = 9.9
    assert setup.poll() == {}
    setup.now_s = 10.0
    assert "within 10 s" in str(setup.poll()["slow"])
    slow, fast = setup.works
    setup.works = []
    fast()
    assert set(setup.poll()) == {"b"}
    slow()
    assert setup.poll() == {}  # nobody waits for it
    assert setup.ask("slow") is not None  # but it is kept
    assert not setup.compiler.busy


def test_a_grammar_that_was_given_up_is_not_begun_anew_while_its_worker_is_at_it():
    setup = Setup(workers=1, limit_s=10)
    setup.compiler.load_now()
    setup.ask("slow")
    setup.now_s = 10.0
    setup.poll()
    assert "within 10 s" in str(setup.ask("slow"))
    assert len(setup.works) == 1
    setup.run()
    assert setup.poll() == {}
    assert not isinstance(setup.ask("slow"), GrammarError | None)


def test_the_time_of_those_that_wait_for_a_worker_does_not_count():
    setup = Setup(workers=1, limit_s=10)
    setup.compiler.load_now()
    setup.ask("a")
    setup.ask("b")
    setup.now_s = 9.0
    setup.run()
    assert set(setup.poll()) == {"a"}
    setup.now_s = 18.0
    assert setup.poll() == {}
    assert set(setup.finish()) == {"b"}


def test_after_too_many_were_given_up_no_further_one_is_taken_until_one_ends():
    setup = Setup(workers=1, limit_s=10)
    setup.compiler.load_now()
    for i in range(MAX_GIVEN_UP):
        setup.ask(f"slow{i}")
        if i == MAX_GIVEN_UP - 1:
            setup.ask("behind")
        setup.now_s += 10
        outcomes = setup.poll()
    assert isinstance(outcomes["behind"], NoWorker)
    assert isinstance(setup.ask("a"), NoWorker)
    setup.run(1)
    setup.poll()
    assert setup.ask("a") is None


def test_a_grammar_that_nobody_waits_for_any_more_is_not_compiled():
    setup = Setup(workers=1)
    setup.compiler.load_now()
    setup.ask("a")
    setup.ask("b")
    setup.compiler.forget(Grammar("regex", "a"))  # at work already: it is kept
    setup.compiler.forget(Grammar("regex", "b"))
    assert set(setup.finish()) == {"a"}
    assert setup.backend.compiled == ["a"]


def test_the_cache_keeps_the_last_used_ones_within_its_bytes():
    setup = Setup(cache_bytes=1100)
    setup.compiler.load_now()
    for text in ("a 400", "b 400"):
        setup.ask(text)
        setup.finish()
    assert setup.ask("a 400") is not None
    setup.ask("c 400")
    setup.finish()
    assert setup.ask("b 400") is None
    assert setup.ask("a 400") is not None
    setup.finish()
    setup.ask("huge 5000")
    setup.finish()
    assert setup.ask("huge 5000") is None


def test_the_bell_rings_when_something_is_known_and_is_silent_after_poll(loaded):
    def rings() -> bool:
        return bool(select.select([loaded.compiler.fileno()], [], [], 0)[0])

    loaded.ask("a")
    assert not rings()
    loaded.run()
    assert rings()
    loaded.poll()
    assert not rings()


def test_real_threads_compile_too():
    backend = Backend()
    compiler = GrammarCompiler(lambda: backend)
    grammar = Grammar("regex", "a")
    assert compiler.ask(grammar) is None
    outcomes: dict[Grammar, object] = {}
    while grammar not in outcomes:
        assert select.select([compiler.fileno()], [], [], 20)[0], "no word from the workers"
        outcomes |= compiler.poll()
    compiler.close()
