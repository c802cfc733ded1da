"""`slo` in bodies: it reaches the engine in seconds, and a refusal reaches the client as 503."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from drift_scheduler.slo import Slo
from sglang.srt.messages import FinishReason

HI = [{"role": "user", "content": "Hi"}]
BODIES: list[tuple[str, dict[str, Any]]] = [
    ("/generate", {"text": "Hi"}),
    ("/v1/completions", {"prompt": "Hi"}),
    ("/v1/chat/completions", {"messages": HI}),
]
SHED = FinishReason(type="abort", message="too late", status_code=503)


@pytest.fixture
def levelled(serve: Any) -> Iterator[Any]:
    """A server with a default and a class."""
    with serve(slo_ttft_ms=500.0, slo_classes={"batch": {"tbt_ms": 1000.0}}) as served:
        served.engine.says("Hello")
        yield served


def test_levels_reach_the_engine(levelled: Any) -> None:
    asked: list[tuple[Any, Slo, str]] = [
        (None, Slo(ttft_s=0.5), "default"),
        ("batch", Slo(ttft_s=0.5, tbt_s=1.0), "batch"),
        ({"ttft_ms": 200, "tbt_ms": 20.5}, Slo(ttft_s=0.2, tbt_s=0.0205), "custom"),
    ]
    for path, body in BODIES:
        for slo, expected, name in asked:
            response = levelled.client.post(path, json={**body, "slo": slo})
            assert response.status_code == 200, response.text
            request = levelled.engine.last_request
            assert (request.slo, request.slo_class) == (expected, name)
    assert levelled.client.get("/server_info").json()["slo_classes"] == {"batch": {"tbt_ms": 1000}}


def test_each_prompt_of_a_batch_may_have_its_own(levelled: Any) -> None:
    body = {"text": ["a", "b"], "sampling_params": {"n": 2}, "slo": ["batch", {"tbt_ms": 5}]}
    assert levelled.client.post("/generate", json=body).status_code == 200
    received = levelled.engine.scheduler.received
    assert [request.slo_class for request in received] == ["batch", "batch", "custom", "custom"]
    assert {request.slo.ttft_s for request in received} == {0.5}


def test_completions_of_a_batch_share_theirs(levelled: Any) -> None:
    body = {"prompt": ["a", "b"], "slo": "batch"}
    assert levelled.client.post("/v1/completions", json=body).status_code == 200
    assert {request.slo_class for request in levelled.engine.scheduler.received} == {"batch"}


def test_health_checks_ask_for_nothing_and_have_no_class(levelled: Any) -> None:
    assert levelled.client.get("/health").status_code == 200
    request = levelled.engine.last_request
    assert (request.slo, request.slo_class) == (Slo(), "")


@pytest.mark.parametrize(("path", "body"), BODIES, ids=lambda value: str(value)[:12])
@pytest.mark.parametrize("stream", [False, True])
def test_shed_requests_get_503_and_may_retry(
    server: Any, path: str, body: dict[str, Any], stream: bool
) -> None:
    server.engine.refuses(SHED)
    response = server.client.post(path, json={**body, "stream": stream, "slo": {"ttft_ms": 1}})
    assert response.status_code == 503
    assert response.headers["retry-after"] == "1"
    assert response.json() == {
        "object": "error",
        "message": "too late",
        "type": "503",
        "param": None,
        "code": 503,
    }


def test_a_shed_prompt_of_a_batch_leaves_the_others(server: Any) -> None:
    ids = server.engine.tokenizer("fine", add_special_tokens=False)["input_ids"]
    server.engine.scheduler.script = lambda request: (
        [SHED] if request.slo_class == "custom" else [*ids, FinishReason(type="stop")]
    )
    body = {"text": ["a", "b"], "stream": True, "slo": [{"ttft_ms": 1}, None]}
    lines = server.client.post("/generate", json=body).text.split("\n\n")[:-2]
    last = {e["index"]: e for e in (json.loads(line.removeprefix("data: ")) for line in lines)}
    assert last[0]["meta_info"]["finish_reason"]["status_code"] == 503
    assert last[1]["text"] == "fine"
