"""Schemas that XGrammar would follow only in part are refused, all others are not."""

from __future__ import annotations

import json
import random

import pytest

from benchmark.structured_cases import schema_case
from sglang.srt.constrained.grammar import Grammar, GrammarError
from sglang.srt.constrained.patterns import with_plain_patterns, without_counts
from sglang.srt.constrained.schema_support import unenforced_keyword


@pytest.mark.parametrize(
    ("schema", "keyword"),
    [
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"not": {"type": "string"}}, "not"),
        ({"type": "number", "multipleOf": 0.5}, "multipleOf of type number"),
        ({"type": "integer", "multipleOf": 5, "minimum": 3}, "minimum beside multipleOf"),
        ({"type": "string", "pattern": "a+", "minLength": 3}, "minLength beside pattern or format"),
        ({"type": "string", "format": "date", "pattern": "a"}, "format beside pattern"),
        ({"minimum": 3}, "minimum without type"),
        ({"anyOf": [{"type": "integer"}], "minimum": 3}, "minimum beside anyOf"),
        ({"enum": [1, "a"], "type": "string"}, "type beside enum"),
        ({"$ref": "#/$defs/a", "$defs": {"a": {}}, "minItems": 1}, "minItems beside $ref"),
        ({"allOf": [{"type": "integer"}, {"minimum": 3}]}, "allOf of several schemas"),
        ({"type": "object", "required": ["a"]}, "required for 'a'"),
        (
            {"type": "object", "properties": {"a": {"type": "array", "contains": {}}}},
            "contains (in /properties/a)",
        ),
        ({"type": "array", "items": {"if": {}}}, "if (in /items)"),
        ({"$defs": {"x": {"not": {}}}, "$ref": "#/$defs/x"}, "not (in /$defs/x)"),
    ],
)
def test_what_would_be_ignored_is_named(schema, keyword):
    found = unenforced_keyword(json.dumps(schema))
    assert found is not None and found.startswith(keyword)


@pytest.mark.parametrize(
    "schema",
    [
        True,
        {},
        {"type": "object"},
        {"type": "object", "uniqueItems": False},
        {"type": "string", "enum": ["a", "b"], "title": "T", "default": "a"},
        {"type": ["integer", "null"], "minimum": 3},
        {"type": "string", "format": "password", "minLength": 8},
        {"properties": {"a": {"type": "integer"}}, "required": ["a"]},
        {"type": "integer", "maxLength": 3},  # speaks of strings only
        {"anyOf": [{"type": "integer", "minimum": 3}, {"type": "null"}], "description": "d"},
        {"const": {"not": 1}},
    ],
)
def test_what_is_enforced_passes(schema):
    assert unenforced_keyword(json.dumps(schema)) is None


def test_the_schemas_of_the_benchmark_pass():
    rng = random.Random(1)
    assert {unenforced_keyword(schema_case(rng).text) for _ in range(200)} == {None}


def test_the_backend_refuses_what_it_would_ignore(make_xgrammar):
    with pytest.raises(GrammarError, match="does not enforce uniqueItems"):
        make_xgrammar().compile(Grammar("json_schema", '{"type": "array", "uniqueItems": true}'))


@pytest.mark.parametrize(
    ("pattern", "written"),
    [
        ("^[A-Z]{2}-x$", "^([A-Z][A-Z])-x$"),
        ("a{1,3}", "(a(a(a)?)?)"),
        ("a{2,}b", "(aaa*)b"),
        ("(a|b{2}){2}", "((a|(bb))(a|(bb)))"),
        (r"[\]]{2}\{3}", r"([\]][\]])\{3}"),
        ("a{0}b", "()b"),
        ("no counts?", "no counts?"),
    ],
)
def test_counts_are_written_out(pattern, written):
    assert without_counts(pattern) == written


@pytest.mark.parametrize("pattern", ["a{1,9999}", "(a", "a)", "((a{99}){99}){99}"])
def test_a_pattern_that_would_be_too_long_or_is_none_is_left_as_it_is(pattern):
    assert without_counts(pattern) is None
    schema = json.dumps({"type": "string", "pattern": pattern})
    assert json.loads(with_plain_patterns(schema)) == json.loads(schema)


def test_data_that_looks_like_a_pattern_stays():
    schema = {"properties": {"pattern": {"const": {"pattern": "a{2}"}}}}
    assert json.loads(with_plain_patterns(json.dumps(schema))) == schema
