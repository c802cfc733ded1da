"""Busy and overlap totals are those of the intervals."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drift_scheduler.lane import Phase, Span
from drift_scheduler.partition import Partition
from drift_scheduler.timeline import LaneRun, Timeline

WHOLE = Partition(0, 4, 4, exclusive=True)
SPLIT = Partition(1, 3, 1)


def run(phase: Phase, start_s: float, end_s: float, partition: Partition = WHOLE) -> LaneRun:
    return LaneRun(phase, partition, Span(start_s, end_s), requests=1, tokens=1)


# Gaps and lengths of one phase's runs, in ticks: runs follow each other without overlap.
runs_of_a_phase = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=12)


def ticks_of(pattern: list[tuple[int, int]]) -> list[tuple[int, int]]:
    spans, now = [], 0
    for gap, length in pattern:
        spans.append((now + gap, now + gap + length))
        now += gap + length
    return spans


@settings(max_examples=200, deadline=None, derandomize=True)
@given(prefill=runs_of_a_phase, decode=runs_of_a_phase, order=st.randoms(use_true_random=False))
def test_totals_equal_a_count_of_every_tick(prefill, decode, order):
    spans = {Phase.PREFILL: ticks_of(prefill), Phase.DECODE: ticks_of(decode)}
    timeline = Timeline()
    # Each phase in its own order, the two interleaved in any way.
    turns = [phase for phase, of_phase in spans.items() for _ in of_phase]
    order.shuffle(turns)
    left = {phase: iter(of_phase) for phase, of_phase in spans.items()}
    for phase in turns:
        timeline.add(run(phase, *next(left[phase])))

    busy = {
        phase: {tick for start, end in of_phase for tick in range(start, end)}
        for phase, of_phase in spans.items()
    }
    for phase in Phase:
        assert timeline.busy_s(phase) == len(busy[phase])
    assert timeline.both_busy_s == len(busy[Phase.PREFILL] & busy[Phase.DECODE])


def test_recent_runs_are_kept_oldest_first_and_totals_count_all():
    timeline = Timeline(capacity=2)
    runs = [run(Phase.DECODE, i, i + 1) for i in range(5)]
    for item in runs:
        timeline.add(item)
    assert timeline.runs(Phase.DECODE) == runs[-2:]
    assert timeline.runs(Phase.PREFILL) == []
    assert timeline.busy_s(Phase.DECODE) == 5


def test_steps_in_which_prompts_rode_are_counted_apart():
    timeline = Timeline()
    timeline.add(run(Phase.DECODE, 0, 1))
    timeline.add(replace(run(Phase.DECODE, 1, 4), tokens=9, fused_tokens=8))
    timeline.add(run(Phase.DECODE, 4, 6))
    assert timeline.fused_busy_s == 3
    assert timeline.busy_s(Phase.DECODE) == 6


def test_launches_are_counted_by_partition():
    timeline = Timeline()
    timeline.add(run(Phase.DECODE, 0, 1, SPLIT))
    timeline.add(run(Phase.PREFILL, 0, 1, SPLIT))
    timeline.add(run(Phase.DECODE, 1, 2, WHOLE))
    assert (timeline.launches(SPLIT), timeline.launches(WHOLE)) == (2, 1)
    assert timeline.launches(Partition(2, 2, 2)) == 0


def test_a_span_knows_its_length():
    assert Span(1.5, 4.0).duration_s == pytest.approx(2.5)
