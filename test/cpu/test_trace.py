"""A window as JSON and as trace events: nothing is lost, and viewers can read it."""

from __future__ import annotations

import json
import math

import pytest

from drift_scheduler.dispatcher import Forecast
from drift_scheduler.lane import Phase, Span
from drift_scheduler.partition import Partition
from drift_scheduler.samples import QueueSample
from drift_scheduler.shapes import DecodeShape, PrefillShape
from drift_scheduler.timeline import LaneRun, PolicyChange, Timeline, TimelinePage
from drift_scheduler.trace import trace_events
from drift_scheduler.window import TimelineWindow, as_json

WHOLE = Partition(0, 132, 132, exclusive=True)
SPLIT = Partition(1, 100, 32)

DECODE = LaneRun(
    Phase.DECODE,
    SPLIT,
    Span(100.0, 100.012),
    requests=8,
    tokens=8,
    decode=DecodeShape(8, 4000),
    prefill=PrefillShape(512, 512**2, 0, 1),
    forecast=Forecast(0.010, 0.011),
    reason="split: 12 ms to spare",
    settled_s=100.0125,
)
PREFILL = LaneRun(
    Phase.PREFILL,
    SPLIT,
    Span(100.001, 100.021),
    requests=1,
    tokens=512,
    layers=4,
    prefill=PrefillShape(512, 512**2, 0, 1),
)
FUSED = LaneRun(Phase.DECODE, WHOLE, Span(100.012, 100.040), requests=9, tokens=72, fused_tokens=64)
SAMPLE = QueueSample(100.005, 3, 900, 8, 0.025, math.inf, SPLIT, 7, 1410.0)


def window(runs=(DECODE, PREFILL, FUSED), samples=(SAMPLE,), policies=()) -> TimelineWindow:
    page = TimelinePage(
        now_s=100.05,
        runs=list(runs),
        samples=list(samples),
        policies=list(policies),
        next_run=len(runs),
        next_sample=len(samples),
        end_run=len(runs),
        end_sample=len(samples),
        truncated=False,
    )
    return TimelineWindow.of_pages([page], total_sms=132)


def test_json_has_times_since_the_oldest_run_and_units_in_its_names():
    shown = json.loads(json.dumps(as_json(window())))
    assert shown["window_ms"] == 50.0
    assert shown["total_sms"] == 132
    assert shown["truncated"] is False
    assert shown["runs"][0] == {
        "phase": "decode",
        "mode": "split",
        "partition": "p100/d32",
        "prefill_sms": 100,
        "decode_sms": 32,
        "start_ms": 0.0,
        "end_ms": 12.0,
        "requests": 8,
        "tokens": 8,
        "fused_tokens": 0,
        "layers": 0,
        "decode_requests": 8,
        "decode_context_tokens": 4000,
        "prefill_requests": 1,
        "prefill_tokens": 512,
        "prefill_squares": 512**2,
        "prefill_cross": 0,
        "actual_ms": 12.0,
        "expected_ms": 10.0,
        "worst_ms": 11.0,
        "unnoticed_ms": 0.5,
        "reason": "split: 12 ms to spare",
    }
    assert shown["runs"][1]["expected_ms"] is None
    assert [run["mode"] for run in shown["runs"]] == ["split", "split", "fused"]
    assert shown["samples"] == [
        {
            "time_ms": 5.0,
            "waiting_prompts": 3,
            "waiting_tokens": 900,
            "running_requests": 8,
            "token_slack_ms": 25.0,
            "first_token_slack_ms": None,
            "partition": "p100/d32",
            "repartitions_since_start": 7,
            "sm_clock_mhz": 1410.0,
        }
    ]


def test_policies_are_those_of_the_window_and_the_one_it_began_with():
    changes = [
        PolicyChange(20.0, "turns"),
        PolicyChange(90.0, "adaptive"),
        PolicyChange(100.02, "chunked:64"),
    ]
    shown = as_json(window(policies=changes))
    assert shown["policies"] == [
        {"from_ms": 0.0, "policy": "adaptive"},
        {"from_ms": 20.0, "policy": "chunked:64"},
    ]


def test_an_empty_window_has_no_events_but_names():
    empty = window(runs=(), samples=())
    assert as_json(empty)["window_ms"] == 0.0
    assert {event["ph"] for event in trace_events(empty)["traceEvents"]} == {"M"}


def test_pages_are_put_together_up_to_the_first_ones_time():
    timeline = Timeline()
    for run in (DECODE, PREFILL):
        timeline.add(run)
    first = timeline.page(100.03, 10.0, 1)
    timeline.add(FUSED)  # settled at 100.04, after the window was asked for
    second = timeline.page(100.041, 10.0, 5, first.next_run, first.next_sample)
    whole = TimelineWindow.of_pages([first, second], 132)
    assert list(whole.runs) == [DECODE, PREFILL]
    assert whole.now_s == 100.03


def events(kind: str, **fields) -> list[dict]:
    made = trace_events(window(**fields))
    return [event for event in json.loads(json.dumps(made))["traceEvents"] if event["ph"] == kind]


def test_each_lane_is_a_named_thread():
    names = {
        event["tid"]: event["args"]["name"]
        for event in events("M")
        if event["name"] == "thread_name"
    }
    assert sorted(names.values()) == ["decode lane", "prefill lane"]
    lanes = {event["name"]: names[event["tid"]] for event in events("X")}
    assert lanes == {
        "decode p100/d32": "decode lane",
        "prefill p100/d32": "prefill lane",
        "fused": "decode lane",
    }


def test_a_slice_says_what_ran_and_what_was_expected():
    slice_ = events("X")[0]
    assert (slice_["ts"], slice_["dur"]) == (0.0, 12000.0)
    assert slice_["cat"] == "split"
    expected = {
        "expected_ms": 10.0,
        "worst_ms": 11.0,
        "actual_ms": 12.0,
        "reason": "split: 12 ms to spare",
        "decode_context_tokens": 4000,
    }
    assert expected.items() <= slice_["args"].items()


def test_counters_follow_the_sms_of_each_phase():
    counters = [
        (event["name"], event["ts"], event["args"]["value"]) for event in events("C", samples=())
    ]
    # The decode lane goes from one partition to the other without a gap.
    assert counters == [
        ("decode SMs", 0.0, 32),
        ("decode SMs", 12000.0, 132),
        ("decode SMs", 40000.0, 0),
        ("prefill SMs", 1000.0, 100),
        ("prefill SMs", 21000.0, 0),
    ]


def test_a_slack_that_is_infinite_is_no_number():
    counters = {event["name"]: event["args"]["value"] for event in events("C", runs=())}
    assert counters == {
        "waiting prompts": 3,
        "waiting tokens": 900,
        "running requests": 8,
        "slack of next token (ms)": 25.0,
        "SM clock (MHz)": 1410.0,
    }


def test_a_change_of_policy_is_an_instant_of_all_tracks():
    [change] = events("i", policies=[PolicyChange(100.01, "turns")])
    assert change["name"] == "policy turns"
    assert change["s"] == "g"
    assert change["ts"] == pytest.approx(10000.0)


def test_every_event_can_be_placed():
    for event in trace_events(window())["traceEvents"]:
        assert event["pid"] == 1
        if event["ph"] != "M":
            assert event["ts"] >= 0
