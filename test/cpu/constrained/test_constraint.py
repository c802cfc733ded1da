"""The tokens that a constraint allows, against all words of small languages."""

from __future__ import annotations

import itertools
import json
import random
import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmark.structured_cases import cases
from sglang.srt.constrained.grammar import MAX_WHITESPACE_CHARS, Grammar, GrammarError

LETTERS = "abc"
LONGEST = 7
ALL_WORDS = [
    "".join(word)
    for length in range(LONGEST + 1)
    for word in itertools.product(LETTERS, repeat=length)
]
BOOLEANS = {"type": "array", "items": {"type": "boolean"}, "minItems": 1}
# In every form that a schema comes in, the text before its array.
FORMS = [
    ("json_schema", BOOLEANS, ""),
    (
        "structural_tag",
        {
            "structures": [{"begin": "<f>", "schema": BOOLEANS, "end": "</f>"}],
            "triggers": ["<f"],
        },
        "<f>",
    ),
    (
        "structural_tag",
        {
            "type": "structural_tag",
            "format": {
                "type": "sequence",
                "elements": [
                    {"type": "const_string", "value": "<g>"},
                    {"type": "json_schema", "json_schema": BOOLEANS},
                ],
            },
        },
        "<g>",
    ),
]
SHARED = settings(
    max_examples=40,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)


def regexes() -> st.SearchStrategy[str]:
    """Of languages over three letters, with no word that ALL_WORDS lacks."""
    leaves = [("a", 1), ("b", 1), ("c", 1), ("[ab]", 1), ("[a-c]", 1), ("(ab|c)", 2)]
    longest = st.recursive(
        st.sampled_from(leaves),
        lambda inner: st.one_of(
            st.tuples(inner, inner).map(lambda two: (two[0][0] + two[1][0], two[0][1] + two[1][1])),
            st.tuples(inner, inner).map(
                lambda two: (f"({two[0][0]}|{two[1][0]})", max(two[0][1], two[1][1]))
            ),
            inner.map(lambda one: (f"({one[0]})?", one[1])),
            inner.map(lambda one: (f"({one[0]}){{1,2}}", 2 * one[1])),
        ),
        max_leaves=5,
    )
    return longest.filter(lambda one: one[1] <= LONGEST).map(lambda one: one[0])


def words_of(regex: str) -> set[str]:
    return {word for word in ALL_WORDS if re.fullmatch(regex, word)}


def check_walk(backend, vocabulary, constraint, words: set[str], seed: int) -> None:
    """Along a random answer, exactly the tokens that lead on to a word are allowed.

    Where only one character can follow, llguidance allows the tokenizer's own token for it alone.
    """
    forces = type(backend).__name__ == "LLGuidanceBackend"
    rng = random.Random(seed)
    tokens: list[int] = []
    text = ""
    while True:
        expected = {
            token
            for token in range(len(vocabulary.entries))
            if token not in (vocabulary.eos, vocabulary.special)
            and any(word.startswith(text + vocabulary.entries[token]) for word in words)
        }
        if text in words:
            expected.add(vocabulary.eos)
        allowed = vocabulary.allowed(constraint.allowed(len(tokens)))
        following = {vocabulary.entries[token][0] for token in expected}
        if forces and len(following) == 1 and text not in words:
            assert allowed and allowed <= expected, repr(text)
        else:
            assert allowed == expected, repr(text)
        token = rng.choice(sorted(allowed))
        assert constraint.take(token) is None
        if token == vocabulary.eos:
            return
        tokens.append(token)
        text = vocabulary.text(tokens)


@SHARED
@given(regex=regexes(), seed=st.integers(0, 2**32))
def test_a_regex_allows_exactly_the_tokens_that_lead_to_a_word(
    backend, vocabulary, constrain, regex, seed
):
    constraint = constrain(backend, "regex", regex)
    check_walk(backend, vocabulary, constraint, words_of(regex), seed)


@SHARED
@given(regex=regexes(), seed=st.integers(0, 2**32))
def test_a_pattern_in_a_schema_is_followed_to_the_letter(
    backend, vocabulary, constrain, regex, seed
):
    language = words_of(regex)
    schema = json.dumps({"type": "string", "pattern": f"^({regex})$"})
    constraint = constrain(backend, "json_schema", schema)
    check_walk(backend, vocabulary, constraint, {f'"{word}"' for word in language}, seed)


@SHARED
@given(seed=st.integers(0, 2**32))
def test_an_enum_allows_exactly_its_values(backend, vocabulary, constrain, seed):
    values = ["a", "ab", "abca", 12, None, True]
    constraint = constrain(backend, "json_schema", json.dumps({"enum": values}))
    check_walk(backend, vocabulary, constraint, {json.dumps(value) for value in values}, seed)


@SHARED
@given(seed=st.integers(0, 2**32))
def test_an_ebnf_grammar_allows_exactly_its_words(backend, vocabulary, constrain, seed):
    grammar = 'root ::= "a" tail | "cab"\ntail ::= "b" | "c" tail2\ntail2 ::= [ab] "c"'
    constraint = constrain(backend, "ebnf", grammar)
    words = {"ab", "cab", "acac", "acbc"}
    check_walk(backend, vocabulary, constraint, words, seed)


@settings(SHARED, max_examples=60)
@given(seed=st.integers(0, 2**32))
def test_whatever_is_chosen_among_the_allowed_the_answer_is_valid(
    make_backend, vocabulary, constrain, seed
):
    backend = make_backend(any_whitespace=False)
    rng = random.Random(seed)
    for case in cases(seed, schemas=1, regexes=1):
        constraint = constrain(backend, case.kind, case.text)
        tokens: list[int] = []
        while not tokens or tokens[-1] != vocabulary.eos:
            allowed = vocabulary.allowed(constraint.allowed(len(tokens)))
            if len(tokens) > 1500:
                break  # an endless regex that was never left
            tokens.append(rng.choice(sorted(allowed)))
            assert constraint.take(tokens[-1]) is None
        else:
            assert case.problem(vocabulary.text(tokens)) is None


def test_a_constraint_that_is_complete_ends_however_many_tokens_were_asked_for(
    backend, vocabulary, constrain
):
    constraint = constrain(backend, "regex", "a|ab", min_new_tokens=9, ignore_eos=True)
    assert vocabulary.allowed(constraint.allowed(0)) >= {vocabulary.entries.index("a")}
    constraint.take(vocabulary.entries.index("a"))
    # It could end here, but something may still follow.
    assert vocabulary.allowed(constraint.allowed(1)) == {vocabulary.entries.index("b")}
    constraint.take(vocabulary.entries.index("b"))
    assert vocabulary.allowed(constraint.allowed(2)) == {vocabulary.eos}


def test_ignore_eos_keeps_an_endless_answer_going(backend, vocabulary, constrain):
    constraint = constrain(backend, "regex", "[ab]+", ignore_eos=True)
    for generated in range(20):
        allowed = vocabulary.allowed(constraint.allowed(generated))
        assert vocabulary.eos not in allowed
        constraint.take(min(allowed))


def test_min_new_tokens_holds_until_it_is_reached(backend, vocabulary, constrain):
    constraint = constrain(backend, "regex", "[ab]+", min_new_tokens=3)
    ends = []
    for generated in range(6):
        ends.append(vocabulary.eos in vocabulary.allowed(constraint.allowed(generated)))
        constraint.take(vocabulary.entries.index("a"))
    assert ends == [False, False, False, True, True, True]


def test_special_tokens_are_not_taken_for_the_text_they_look_like(backend, vocabulary, constrain):
    constraint = constrain(backend, "regex", "[a-z]+")
    assert vocabulary.special not in vocabulary.allowed(constraint.allowed(0))


def test_a_special_token_among_the_stop_ids_ends_an_answer_where_it_may_end(
    backend, vocabulary, constrain
):
    constraint = constrain(
        backend, "regex", "a+", stop_token_ids=[vocabulary.special, vocabulary.entries.index("b")]
    )
    assert constraint.end_ids == {vocabulary.eos, vocabulary.special}
    assert vocabulary.special not in vocabulary.allowed(constraint.allowed(0))
    constraint.take(vocabulary.entries.index("a"))
    assert vocabulary.special in vocabulary.allowed(constraint.allowed(1))


def test_a_dead_end_ends_the_answer_and_says_so(make_xgrammar, vocabulary, constrain):
    constraint = constrain(make_xgrammar(), "regex", "a\u00e9")  # no token has such a letter
    constraint.take(vocabulary.entries.index("a"))
    assert vocabulary.allowed(constraint.allowed(1)) == {vocabulary.eos}
    assert "no token" in (constraint.take(vocabulary.eos) or "")


def test_a_token_that_was_not_allowed_is_told(backend, vocabulary, constrain):
    constraint = constrain(backend, "regex", "ab")
    constraint.allowed(0)
    assert "does not follow" in (constraint.take(vocabulary.entries.index("z")) or "")


def test_answers_share_what_is_compiled_but_not_how_far_they_are(backend, vocabulary, constrain):
    first = constrain(backend, "regex", "ab")
    compiled = backend.compile(Grammar("regex", "ab"))
    one, two = compiled.matcher(), compiled.matcher()
    assert one.accept(vocabulary.entries.index("a"))
    assert not one.accept(vocabulary.entries.index("a"))
    assert two.accept(vocabulary.entries.index("a"))
    assert vocabulary.entries.index("a") in vocabulary.allowed(first.allowed(0))


def test_json_is_compact_where_whitespace_is_disabled(make_backend, vocabulary, constrain):
    schema = json.dumps(BOOLEANS)
    free = constrain(make_backend(), "json_schema", schema)
    compact = constrain(make_backend(any_whitespace=False), "json_schema", schema)
    for constraint, spaced in ((free, True), (compact, False)):
        constraint.take(vocabulary.entries.index("["))
        allowed = vocabulary.allowed(constraint.allowed(1))
        assert (vocabulary.entries.index("\n") in allowed) is spaced


def after_array_and(text, kind, definition, before, backend, vocabulary, constrain):
    """The entries that may come behind `[` and the text."""
    if "format" in definition and "Guidance" in type(backend).__name__:
        pytest.skip("llguidance knows the older form alone")
    constraint = constrain(backend, kind, json.dumps(definition))
    taken = [*before, "[", *text]
    for character in taken:
        assert constraint.take(vocabulary.entries.index(character)) is None
    allowed = vocabulary.allowed(constraint.allowed(len(taken)))
    return {vocabulary.entries[token] for token in allowed}


@pytest.mark.parametrize(("kind", "definition", "before"), FORMS)
@settings(SHARED, max_examples=20)
@given(text=st.text(" \n\t", min_size=MAX_WHITESPACE_CHARS, max_size=MAX_WHITESPACE_CHARS))
def test_whitespace_has_an_end(kind, definition, before, backend, vocabulary, constrain, text):
    behind = after_array_and(text, kind, definition, before, backend, vocabulary, constrain)
    assert behind == {"t", "true", "f"}


@pytest.mark.parametrize(("kind", "definition", "before"), FORMS[1:])
def test_flags_of_whitespace_hold_within_tags(
    kind, definition, before, make_backend, vocabulary, constrain
):
    compact = make_backend(any_whitespace=False)
    behind = after_array_and("", kind, definition, before, compact, vocabulary, constrain)
    if "Guidance" in type(compact).__name__:
        assert behind == {"t", "true", "f"}
    else:  # xgrammar's tags cannot do without
        behind = after_array_and(" ", kind, definition, before, compact, vocabulary, constrain)
        assert behind == {"t", "true", "f"}


def test_a_whitespace_pattern_says_what_stands_between_parts(
    make_llguidance, vocabulary, constrain
):
    backend = make_llguidance(whitespace_pattern="[\t]{0,1}")
    constraint = constrain(backend, "json_schema", '{"type": "array"}')
    constraint.take(vocabulary.entries.index("["))
    allowed = vocabulary.allowed(constraint.allowed(1))
    assert vocabulary.entries.index("\t") in allowed
    assert vocabulary.entries.index(" ") not in allowed


def test_a_structural_tag_constrains_from_its_trigger_on(backend, vocabulary, constrain):
    tag = {
        "type": "structural_tag",
        "structures": [{"begin": "<f>", "schema": {"type": "boolean"}, "end": "</f>"}],
        "triggers": ["<f"],
    }
    constraint = constrain(backend, "structural_tag", json.dumps(tag))
    generated = 0
    for character in "hi <f>":
        token = vocabulary.entries.index(character)
        assert token in vocabulary.allowed(constraint.allowed(generated))
        assert constraint.take(token) is None
        generated += 1
    allowed = vocabulary.allowed(constraint.allowed(generated))
    assert vocabulary.entries.index("t") in allowed
    assert vocabulary.entries.index("h") not in allowed
    assert vocabulary.eos not in allowed


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("regex", "("),
        ("regex", "a{3,1}"),
        ("json_schema", '{"type":'),
        ("json_schema", '{"type": "nonsense"}'),
        ("json_schema", "[]"),
        ("ebnf", "root ::= ("),
        ("ebnf", 'root ::= "a" nowhere'),
        ("structural_tag", "[]"),
        ("structural_tag", '{"type": "structural_tag"}'),
        ("structural_tag", '{"structures": [], "triggers": []}'),
        (
            "structural_tag",
            '{"structures": [{"begin": "x", "schema": {}, "end": ""}], "triggers": ["y"]}',
        ),
    ],
)
def test_a_bad_grammar_is_refused_with_a_reason(backend, kind, text):
    with pytest.raises(GrammarError) as caught:
        backend.compile(Grammar(kind, text))
    reason = str(caught.value)
    assert reason and ".cc" not in reason
