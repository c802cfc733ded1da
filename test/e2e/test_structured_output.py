"""Answers of a real, multiplexed server follow the grammars that they were asked to follow."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jsonschema_rs
import pytest

from benchmark.structured_cases import cases

PROMPT = "Here is an example of what was asked for:\n"
STORY = "The lighthouse keeper climbed the stairs one last time, and"
LIMIT = 150


def generate(client: Any, text: str, **sampling: Any) -> Any:
    return client.generate(text, {"max_new_tokens": LIMIT, "temperature": 1.0, **sampling})


def test_constrained_and_other_requests_side_by_side(client: Any) -> None:
    """Other requests get the tokens that they get alone."""
    plain = {"temperature": 0, "max_new_tokens": 24, "ignore_eos": True}
    alone = client.generate(STORY, plain)["output_ids"]
    asked = cases(seed=7, schemas=5, regexes=3)
    with ThreadPoolExecutor(16) as pool:
        constrained = [
            pool.submit(
                generate, client, f"{i} {PROMPT}", **{case.kind: case.text, "sampling_seed": i}
            )
            for i, case in enumerate(asked)
        ]
        others = [pool.submit(client.generate, STORY, plain) for _ in range(3)]
        answers = [future.result() for future in constrained]
        assert [future.result()["output_ids"] for future in others] == [alone] * 3
    finished = 0
    for case, answer in zip(asked, answers, strict=True):
        if answer["meta_info"]["finish_reason"]["type"] == "stop":
            assert case.problem(answer["text"]) is None
            finished += 1
    assert finished >= 3  # regexes end soon, schemas may run into the limit
    grammars = client.state()["grammars"]
    assert grammars["compiled"] >= len(asked)
    assert grammars["waiting"] == 0


def test_a_stream_follows_its_schema(client: Any) -> None:
    schema = {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 12},
            "age": {"type": "integer", "minimum": 0, "maximum": 120},
        },
        "required": ["name", "age"],
        "additionalProperties": False,
    }
    sampling = {"json_schema": schema, "max_new_tokens": LIMIT, "temperature": 0}
    with client.stream(PROMPT, sampling) as events:
        texts = [event["text"] for event in events]
    assert len(texts) > 2
    value = json.loads(texts[-1])
    assert jsonschema_rs.validator_for(schema).is_valid(value)


def test_n_answers_follow_the_same_regex(client: Any) -> None:
    answers = generate(client, "A date: ", regex="20[0-9]{2}-(0[1-9]|1[0-2])", n=3)
    for answer in answers:
        assert answer["text"][:2] == "20" and len(answer["text"]) == 7
        assert answer["meta_info"]["finish_reason"]["type"] == "stop"


@pytest.mark.parametrize(
    ("sampling", "part"),
    [
        ({"regex": "(oh"}, "sampling_params.regex"),
        ({"json_schema": {"type": "nonsense"}}, "sampling_params.json_schema"),
        ({"json_schema": {"type": "array", "uniqueItems": True}}, "uniqueItems"),
        ({"ebnf": "root ::="}, "sampling_params.ebnf"),
        ({"structural_tag": "{}"}, "sampling_params.structural_tag"),
        ({"regex": "a", "ebnf": "b"}, "beside regex"),
    ],
)
def test_a_bad_grammar_is_answered_with_400(client: Any, sampling: Any, part: str) -> None:
    response = client.http.post("/generate", json=client.body("x", sampling))
    assert response.status_code == 400
    assert part in response.text
