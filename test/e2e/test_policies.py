"""One server under one policy after another: the same tokens, and the plans that its name says."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from benchmark.greedy import Answered, ask_all

NEW_TOKENS = 12
PROMPTS = [
    "The capital of France is",
    "def fibonacci(n: int) -> int:\n    if n < 2:\n        return n\n    return",
    "Once upon a time, in a village at the foot of a mountain, there lived a clockmaker who " * 8,
    "Water boils at a lower temperature on a mountain because the air pressure",
]


@pytest.fixture(scope="module")
def under(server: Any) -> Iterator[Any]:
    """under(policy): answers to the prompts, asked all at once with an empty cache, and the change
    of the lanes' counts. The server's own policy is put back."""
    client = server.client
    before = client.http.get("/pd_multiplex/policy").json()["policy"]

    def run(policy: str) -> tuple[list[Answered], dict[str, float]]:
        answer = client.http.post("/pd_multiplex/policy", json={"policy": policy})
        assert answer.status_code == 200, answer.text
        client.flush_cache()
        start = client.state()["pd_multiplex"]
        answers = ask_all(server.base_url, PROMPTS, NEW_TOKENS, at_once=len(PROMPTS))
        end = client.state()["pd_multiplex"]
        assert end["policy"] == policy
        spent = {
            key: value - start[key] for key, value in end.items() if isinstance(value, int | float)
        }
        return answers, spent

    yield run
    client.http.post("/pd_multiplex/policy", json={"policy": before})


@pytest.fixture(scope="module")
def plain(under: Any) -> list[Answered]:
    answers, spent = under("turns")
    assert spent["both_busy_s"] == spent["fused_busy_s"] == 0
    return [answered.output for answered in answers]


@pytest.mark.parametrize(
    "policy",
    ["adaptive", "adaptive:fused-only", "adaptive:turns-only", "static", "temporal", "table"],
)
def test_a_policy_changes_no_token(server: Any, under: Any, plain: list[Any], policy: str) -> None:
    if policy == "static":
        split = server.client.state()["pd_multiplex"]["partitions"][1]
        policy = f"static:{split['prefill_sms']}/{split['decode_sms']}"
    answers, _ = under(policy)
    assert [answered.output for answered in answers] == plain


def test_chunked_steps_carry_the_prompts(under: Any, plain: list[Any]) -> None:
    answers, spent = under("chunked:64")
    assert [answered.output for answered in answers] == plain
    assert spent["fused_busy_s"] > 0
    assert spent["prefill_busy_s"] == 0


def test_an_unknown_policy_is_refused_and_the_old_one_stays(server: Any) -> None:
    before = server.client.http.get("/pd_multiplex/policy").json()
    answer = server.client.http.post("/pd_multiplex/policy", json={"policy": "static:7/7"})
    assert answer.status_code == 400
    assert "no partition 7/7" in answer.text
    assert server.client.http.get("/pd_multiplex/policy").json() == before
