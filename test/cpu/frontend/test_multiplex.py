"""The endpoints that show the timeline and change the policy, over HTTP."""

from __future__ import annotations

import time
from typing import Any

import pytest

from drift_scheduler.lane import Phase, Span
from drift_scheduler.partition import Partition
from drift_scheduler.timeline import LaneRun

SPLIT = Partition(1, 100, 32)
KEY = {"authorization": "Bearer hush"}


def add_runs(served: Any, count: int, age_s: float = 1.0) -> None:
    """Runs of 1 ms that follow each other, the first one `age_s` ago."""
    start_s = time.monotonic() - age_s
    for i in range(count):
        span = Span(start_s + i * 0.001, start_s + (i + 1) * 0.001)
        served.engine.scheduler.timeline.add(LaneRun(Phase.DECODE, SPLIT, span, i + 1, i + 1))


def test_a_timeline_of_many_pages_arrives_whole(serve: Any) -> None:
    with serve() as served:
        add_runs(served, 50)
        shown = served.client.get("/pd_multiplex/timeline", params={"seconds": "5"}).json()
    assert [run["requests"] for run in shown["runs"]] == list(range(1, 51))
    assert shown["runs"][0]["start_ms"] == 0.0
    assert shown["runs"][-1]["end_ms"] == pytest.approx(50.0, abs=0.001)
    assert shown["total_sms"] == 132
    assert shown["truncated"] is False
    assert shown["totals"]["split_runs"] == 50
    assert [change["policy"] for change in shown["policies"]] == ["turns"]


def test_older_runs_are_left_out(serve: Any) -> None:
    with serve() as served:
        add_runs(served, 3, age_s=600.0)
        add_runs(served, 2)
        shown = served.client.get("/pd_multiplex/timeline").json()
    assert len(shown["runs"]) == 2


def test_the_trace_has_the_runs_as_slices(serve: Any) -> None:
    with serve() as served:
        add_runs(served, 9)
        events = served.client.get("/pd_multiplex/trace").json()["traceEvents"]
    assert [event["name"] for event in events if event["ph"] == "X"] == ["decode p100/d32"] * 9


@pytest.mark.parametrize("path", ["timeline", "trace"])
@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "inf", "soon", ""])
def test_bad_seconds_are_named(server: Any, path: str, seconds: str) -> None:
    response = server.client.get(f"/pd_multiplex/{path}", params={"seconds": seconds})
    assert response.status_code == 400
    assert response.json()["error"]["message"].startswith("seconds: ")


def test_the_policy_of_a_running_server_is_changed(serve: Any) -> None:
    with serve(enable_pdmux=True) as served:
        assert served.client.get("/pd_multiplex/policy").json() == {"policy": "turns"}
        changed = served.client.post("/pd_multiplex/policy", json={"policy": "table"})
        assert (changed.status_code, changed.json()) == (200, {"policy": "table"})
        assert served.client.get("/pd_multiplex/policy").json() == {"policy": "table"}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"policy": "best"}, "policy: expected one of turns, table, got 'best'"),
        ({"policy": 3}, "policy: "),
        ({}, "policy: is required"),
        ({"policy": "table", "force": True}, "force: is not a known field"),
    ],
)
def test_a_policy_that_is_none_changes_nothing(serve: Any, body: Any, message: str) -> None:
    with serve(enable_pdmux=True) as served:
        refused = served.client.post("/pd_multiplex/policy", json=body)
        assert refused.status_code == 400
        assert refused.json()["error"]["message"].startswith(message)
        assert served.client.get("/pd_multiplex/policy").json() == {"policy": "turns"}


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_without_multiplexing_the_flag_is_named(server: Any, method: str) -> None:
    response = server.client.request(method, "/pd_multiplex/policy", json={"policy": "table"})
    assert response.status_code == 400
    assert "--enable-pd-multiplex" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", "timeline"), ("GET", "trace"), ("GET", "policy"), ("POST", "policy")],
)
def test_the_key_is_asked_for(serve: Any, method: str, path: str) -> None:
    with serve(api_key="hush", enable_pdmux=True) as served:
        body = {"policy": "table"}
        refused = served.client.request(method, f"/pd_multiplex/{path}", json=body)
        allowed = served.client.request(method, f"/pd_multiplex/{path}", json=body, headers=KEY)
    assert refused.status_code == 401
    assert allowed.status_code == 200
