"""SamplingParams.parse: defaults, every range at its edges, and errors that name the field."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang.srt.errors import RequestError
from sglang.srt.sampling_params import MAX_STOP_STRINGS, SamplingParams

_VOCAB = 100


def _parse(**fields: Any) -> SamplingParams:
    return SamplingParams.parse(fields, vocab_size=_VOCAB)


def _refused(**fields: Any) -> RequestError:
    with pytest.raises(RequestError) as caught:
        _parse(**fields)
    return caught.value


def test_nothing_given_means_the_public_defaults() -> None:
    assert SamplingParams.parse(None, vocab_size=_VOCAB) == _parse() == SamplingParams()
    params = _parse()
    assert (params.max_new_tokens, params.min_new_tokens, params.n) == (128, 0, 1)
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (1.0, 1.0, -1, 0.0)
    assert (params.stop, params.stop_token_ids, params.sampling_seed) == ([], [], None)
    assert params.skip_special_tokens
    assert params.spaces_between_special_tokens
    assert not params.ignore_eos
    assert not params.no_stop_trim


@pytest.mark.parametrize("name", SamplingParams.__struct_fields__)
def test_null_means_the_default_except_for_max_new_tokens(name: str) -> None:
    params = _parse(**{name: None})
    if name == "max_new_tokens":
        assert params.max_new_tokens is None
    else:
        assert params == SamplingParams()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_new_tokens", 0),
        ("max_new_tokens", 10**6),
        ("min_new_tokens", 128),
        ("temperature", 0),
        ("temperature", 0.0),
        ("temperature", 5),
        ("top_p", 1),
        ("top_p", 1e-9),
        ("top_k", -1),
        ("top_k", 1),
        ("top_k", 2**30),
        ("min_p", 0),
        ("min_p", 1),
        ("n", 4),
        ("stop", ["a"] * MAX_STOP_STRINGS),
        ("stop_token_ids", [0, _VOCAB - 1]),
        ("ignore_eos", True),
        ("sampling_seed", -(2**63)),
        ("sampling_seed", 2**63 - 1),
        ("sampling_seed", 0),
    ],
)
def test_values_inside_the_range_are_taken_as_they_are(name: str, value: Any) -> None:
    assert getattr(_parse(**{name: value}), name) == value


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("max_new_tokens", -1, "at least 0, got -1"),
        ("min_new_tokens", -1, "at least 0, got -1"),
        ("min_new_tokens", 129, "at most max_new_tokens=128"),
        ("temperature", -0.1, "at least 0, got -0.1"),
        ("temperature", math.inf, "finite"),
        ("temperature", math.nan, "finite"),
        ("temperature", True, "finite number, got True"),
        ("temperature", "hot", "finite number, got 'hot'"),
        ("top_p", 0, "in (0, 1], got 0.0"),
        ("top_p", 1.01, "in (0, 1], got 1.01"),
        ("min_p", -0.01, "in [0, 1], got -0.01"),
        ("min_p", 1.5, "in [0, 1], got 1.5"),
        ("frequency_penalty", 2.1, "in [-2, 2], got 2.1"),
        ("presence_penalty", -2.5, "in [-2, 2], got -2.5"),
        ("presence_penalty", "1", "finite number"),
        ("repetition_penalty", 0, "in (0, 2], got 0.0"),
        ("repetition_penalty", 2.01, "in (0, 2], got 2.01"),
        ("logit_bias", [1], "must be an object"),
        ("logit_bias", {"100": 1}, "'100', which is no token id in [0, 100)"),
        ("logit_bias", {"-1": 1}, "'-1', which is no token id"),
        ("logit_bias", {"five": 1}, "'five', which is no token id"),
        ("logit_bias", {"5": "1"}, "finite number, got '1'"),
        ("logit_bias", {"5": math.inf}, "finite number, got inf"),
        ("top_k", 0, "-1 (off) or at least 1, got 0"),
        ("top_k", -2, "-1 (off) or at least 1, got -2"),
        ("top_k", 1.5, "int"),
        ("top_k", "5", "int"),
        ("n", 0, "in [1, 128], got 0"),
        ("stop", ["a"] * (MAX_STOP_STRINGS + 1), "at most 32 strings, got 33"),
        ("stop", ["a", ""], "empty string"),
        ("stop", [1], "str"),
        ("stop_regex", ["a"] * (MAX_STOP_STRINGS + 1), "at most 32 patterns, got 33"),
        ("stop_regex", "(", "is not a regular expression"),
        ("stop_regex", "a" * 257, "longer than 256 bytes"),
        ("stop_regex", ["ok", "a*"], "matches the empty text"),
        ("stop_regex", r"(a)\1", "uses groupref"),
        ("stop_regex", "(?=a)b", "uses assert"),
        ("stop_regex", "(a{1,40}){1,40}", "more than 512 states"),
        ("stop_regex", [1], "str"),
        ("stream_interval", 0, "at least 1, got 0"),
        ("stop_token_ids", [_VOCAB], "100 is outside the vocabulary [0, 100)"),
        ("stop_token_ids", [-1], "-1 is outside"),
        ("stop_token_ids", ["1"], "int"),
        ("ignore_eos", "yes", "bool"),
        ("sampling_seed", 2**63, "64 bits"),
        ("sampling_seed", -(2**63) - 1, "64 bits"),
    ],
)
def test_values_outside_the_range_are_refused_by_name(name: str, value: Any, reason: str) -> None:
    error = _refused(**{name: value})
    assert error.field == name
    assert name in str(error)
    assert reason in str(error)


def test_min_new_tokens_has_no_upper_end_without_max_new_tokens() -> None:
    assert _parse(max_new_tokens=None, min_new_tokens=10_000).min_new_tokens == 10_000
    assert _refused(max_new_tokens=3, min_new_tokens=4).field == "min_new_tokens"


def test_a_single_stop_string_becomes_a_list() -> None:
    assert _parse(stop="END").stop == ["END"]
    assert _parse(stop="").stop == []


def test_unknown_names_are_refused() -> None:
    error = _refused(temprature=0.5)
    assert error.field == "temprature"
    assert "is not a sampling parameter" in str(error)


def test_biases_are_by_token_id() -> None:
    biases = {7: -1.0, 99: 2.5}
    assert _parse(logit_bias={"7": -1, 99: 2.5}).logit_bias == biases
    assert _parse(logit_bias={}).logit_bias == {}


def test_penalties_at_their_edges_are_taken() -> None:
    params = _parse(frequency_penalty=-2, presence_penalty=2, repetition_penalty=2)
    assert params.penalises
    assert not _parse(frequency_penalty=0, repetition_penalty=1).penalises


@pytest.mark.parametrize("fields", [[], "greedy", 5, [("top_k", 1)]])
def test_anything_but_an_object_is_refused(fields: Any) -> None:
    with pytest.raises(RequestError, match="must be an object") as caught:
        SamplingParams.parse(fields, vocab_size=_VOCAB)
    assert caught.value.field == "sampling_params"


@pytest.mark.parametrize(
    ("name", "neutral", "asking"),
    [
        ("custom_params", None, {"a": 1}),
        ("beam_width", None, 2),
        ("watermark", None, True),
    ],
)
def test_what_is_not_served_may_be_named_but_not_asked_for(
    name: str, neutral: Any, asking: Any
) -> None:
    assert _parse(**{name: neutral}) == _parse(**{name: None}) == SamplingParams()
    error = _refused(**{name: asking})
    assert error.field == name
    assert "not supported" in str(error)


@pytest.mark.parametrize(
    ("fields", "grammar"),
    [
        ({"regex": "a+"}, ("regex", "a+")),
        ({"ebnf": 'root ::= "a"', "regex": ""}, ("ebnf", 'root ::= "a"')),
        ({"json_schema": '{"type": "object"}'}, ("json_schema", '{"type": "object"}')),
        ({"json_schema": {"type": "object"}}, ("json_schema", '{"type":"object"}')),
        ({"structural_tag": {"é": [1]}, "regex": None}, ("structural_tag", '{"é":[1]}')),
        ({"json_schema": "", "regex": "", "ebnf": "", "structural_tag": ""}, None),
        ({}, None),
    ],
)
def test_an_answer_may_follow_one_grammar(
    fields: dict[str, Any], grammar: tuple[str, str] | None
) -> None:
    assert _parse(**fields).grammar == grammar


@pytest.mark.parametrize(
    ("fields", "name", "problem"),
    [
        ({"regex": "a", "ebnf": "b"}, "ebnf", "beside regex"),
        ({"regex": {}}, "regex", "must be a string, got dict"),
        ({"json_schema": []}, "json_schema", "a string or an object, got list"),
        ({"json_schema": {"a": math.nan}}, "json_schema", "is not JSON"),
        ({"regex": "\ud800"}, "regex", "Unicode"),
        ({"regex": "a\0"}, "regex", "null character"),
        ({"regex": "é" * 600_000}, "regex", "at most 1048576 bytes"),
    ],
)
def test_what_is_no_grammar_is_refused(fields: dict[str, Any], name: str, problem: str) -> None:
    error = _refused(**fields)
    assert error.field == name
    assert problem in str(error)


@pytest.mark.parametrize(
    ("fields", "greedy"),
    [
        ({"temperature": 0}, True),
        ({"temperature": 9e-7}, True),
        ({"temperature": 1e-6}, False),
        ({"top_k": 1}, True),
        ({"top_k": 2}, False),
        ({}, False),
    ],
)
def test_greedy(fields: dict[str, Any], greedy: bool) -> None:
    assert _parse(**fields).greedy is greedy


@pytest.mark.parametrize("name", ["temperature", "top_p", "min_p"])
def test_integers_too_large_for_a_float_are_refused(name: str) -> None:
    assert _refused(**{name: 10**400}).field == name


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_new_tokens", 2**64),
        ("min_new_tokens", 2**64),
        ("top_k", 2**64),
        ("n", 2**64),
        ("stop", "\ud800"),
    ],
)
def test_what_msgpack_cannot_carry_is_refused(name: str, value: Any) -> None:
    fields = {"max_new_tokens": None, name: value}
    assert _refused(**fields).field == name


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=5,
)


@given(
    fields=st.dictionaries(
        st.sampled_from([*SamplingParams.__struct_fields__, "regex", "logit_bias", "other"]),
        _JSON | st.integers(-2, 200) | st.floats(-1, 2),
    )
)
def test_any_object_is_either_checked_or_refused(fields: dict[str, Any]) -> None:
    """Nothing a client can write raises anything else, and what passes keeps its promises."""
    try:
        params = SamplingParams.parse(json.loads(json.dumps(fields)), vocab_size=_VOCAB)
    except RequestError:
        return
    assert params.max_new_tokens is None or params.max_new_tokens >= params.min_new_tokens >= 0
    assert math.isfinite(params.temperature)
    assert params.temperature >= 0
    assert 0 < params.top_p <= 1
    assert 0 <= params.min_p <= 1
    assert params.top_k == -1 or params.top_k >= 1
    assert params.n >= 1
    assert all(params.stop)
    assert all(0 <= token < _VOCAB for token in params.stop_token_ids)
