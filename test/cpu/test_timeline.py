"""Totals are those of the intervals, samples those of the queue, pages hold what was asked."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drift_scheduler.backlog import Backlog, Prompt
from drift_scheduler.dispatcher import Forecast
from drift_scheduler.lane import Phase, Span
from drift_scheduler.partition import Partition
from drift_scheduler.samples import SAMPLE_INTERVAL_S, QueueSample, QueueSampler
from drift_scheduler.shapes import PrefillShape
from drift_scheduler.timeline import LaneRun, RunMode, Timeline, TimelinePage
from drift_scheduler.view import LoadView, PrefillView

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


@settings(max_examples=200, derandomize=True)
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


def forecast_run(duration_s: float, worst_s: float | None, **fields) -> LaneRun:
    forecast = None if worst_s is None else Forecast(worst_s / 2, worst_s)
    return replace(run(Phase.DECODE, 0, duration_s), forecast=forecast, **fields)


def test_runs_are_counted_by_how_they_had_the_device():
    timeline = Timeline()
    timeline.add(run(Phase.DECODE, 0, 1))
    timeline.add(run(Phase.PREFILL, 1, 2))
    timeline.add(run(Phase.DECODE, 2, 3, SPLIT))
    timeline.add(run(Phase.PREFILL, 2, 3, SPLIT))
    timeline.add(replace(run(Phase.DECODE, 3, 4), fused_tokens=1))
    counts = timeline.counts
    assert [counts[f"{mode}_runs"] for mode in RunMode] == [1, 1, 2, 1]


def test_an_overrun_took_longer_than_its_worst_case():
    timeline = Timeline()
    for item in (
        forecast_run(1.0, worst_s=1.0),
        forecast_run(1.1, worst_s=1.0),
        forecast_run(9.0, worst_s=None),
    ):
        timeline.add(item)
    assert timeline.counts["forecasts"] == 2
    assert timeline.counts["overruns"] == 1


def load(*, running: int = 0, waiting: int = 0, **fields) -> LoadView:
    defaults = {"decode_in_flight": 0, "prefill": None}
    return LoadView(waiting=waiting, running=running, **{**defaults, **fields})


def samples_of(timeline: Timeline) -> list[QueueSample]:
    return timeline.page(now_s=1e9, seconds=2e9, limit=10**6).samples


def test_samples_are_taken_every_few_milliseconds_at_most():
    timeline = Timeline()
    for turn in range(1000):
        timeline.look(load(running=1), WHOLE, turn * 0.001, 0.0)
    taken = [sample.time_s for sample in samples_of(timeline)]
    gaps_s = [later - earlier for earlier, later in itertools.pairwise(taken)]
    assert len(taken) > 150
    assert all(SAMPLE_INTERVAL_S - 1e-9 <= gap_s < SAMPLE_INTERVAL_S + 0.0011 for gap_s in gaps_s)


def test_before_the_first_launch_there_is_nothing_to_sample():
    timeline = Timeline()
    timeline.look(load(waiting=1), None, 0.0, 0.0)
    assert samples_of(timeline) == []
    timeline.look(load(waiting=1, waiting_tokens=30), SPLIT, 1.0, 0.0)
    [sample] = samples_of(timeline)
    assert (sample.waiting_prompts, sample.waiting_tokens, sample.partition) == (1, 30, SPLIT)


def test_a_launch_on_another_partition_is_a_repartition():
    timeline = Timeline()
    launched = [WHOLE, WHOLE, SPLIT, None, SPLIT, None, WHOLE]
    for turn, partition in enumerate(launched):
        timeline.look(load(), partition, float(turn), 0.0)
    assert timeline.counts["repartitions"] == 2
    assert [sample.repartitions for sample in samples_of(timeline)] == [0, 0, 1, 1, 1, 1, 2]
    assert [sample.partition for sample in samples_of(timeline)][3] == SPLIT


@pytest.mark.parametrize(
    ("view", "decode_ended_s", "slack_s"),
    [
        (load(running=1, tbt_s=0.5), 9.8, 0.3),
        (load(running=1, tbt_s=0.5), 9.0, -0.5),
        (load(running=1, tbt_s=0.5, joined_due_s=10.1), 9.8, 0.1),
        (load(running=1), 9.8, math.inf),
    ],
    ids=["on time", "late", "who has just joined", "nobody minds"],
)
def test_slack_of_the_next_token(view, decode_ended_s, slack_s):
    sampler = QueueSampler()
    sampler.look(view, WHOLE, 0, 5.0, 5.0)
    sample = sampler.look(view, WHOLE, 0, 10.0, decode_ended_s)
    assert sample is not None
    assert sample.token_slack_s == pytest.approx(slack_s)


class FakeClock:
    mhz = None

    def read_mhz(self):
        return self.mhz


def test_a_sample_says_how_fast_the_sms_ran():
    clock = FakeClock()
    timeline = Timeline(sm_clock=clock)
    for turn, mhz in enumerate([None, 1980.0, 1410.0]):
        clock.mhz = mhz
        timeline.look(load(), WHOLE, float(turn), 0.0)
    assert [sample.sm_clock_mhz for sample in samples_of(timeline)] == [None, 1980.0, 1410.0]


def test_a_step_that_ended_before_anybody_ran_gave_nobody_a_token():
    sampler = QueueSampler()
    sampler.look(load(running=0), WHOLE, 0, 10.0, 3.0)
    sample = sampler.look(load(running=1, tbt_s=0.5), WHOLE, 0, 20.0, 3.0)
    assert sample is not None
    assert sample.token_slack_s == pytest.approx(0.5)


def test_nobody_runs_and_no_token_is_due():
    sample = QueueSampler().look(load(tbt_s=0.5), WHOLE, 0, 10.0, 9.9)
    assert sample is not None
    assert sample.token_slack_s == math.inf
    assert sample.first_token_slack_s == math.inf


@pytest.mark.parametrize(("batch_due_s", "slack_s"), [(math.inf, 2.0), (11.0, 1.0)])
def test_slack_of_a_first_token_is_that_of_the_most_urgent_prompt(batch_due_s, slack_s):
    backlog = Backlog()
    backlog.add(Prompt("late", new=10, cached=0, arrival_s=0.0, due_s=15.0))
    backlog.add(Prompt("soon", new=10, cached=0, arrival_s=1.0, due_s=12.0))
    batch = PrefillView(PrefillShape(10, 100, 0), 0, 8, 0, None, due_s=batch_due_s)
    view = load(waiting=2, backlog=backlog, prefill=batch)
    sample = QueueSampler().look(view, WHOLE, 0, 10.0, 0.0)
    assert sample is not None
    assert sample.first_token_slack_s == pytest.approx(slack_s)


def all_pages(timeline: Timeline, now_s: float, seconds: float, limit: int) -> list[TimelinePage]:
    pages = [timeline.page(now_s, seconds, limit)]
    while pages[-1].next_run < pages[0].end_run or pages[-1].next_sample < pages[0].end_sample:
        before = pages[-1]
        pages.append(timeline.page(now_s, seconds, limit, before.next_run, before.next_sample))
        assert len(pages) < 100
    return pages


@settings(max_examples=100, derandomize=True)
@given(
    added=st.integers(0, 40),
    seconds=st.integers(1, 50),
    limit=st.integers(1, 9),
    capacity=st.integers(1, 12),
)
def test_pages_hold_the_window_once_and_in_order(added, seconds, limit, capacity):
    timeline = Timeline(capacity)
    runs = [run(Phase.DECODE, i, i + 1) for i in range(added)]
    for item in runs:
        timeline.add(item)
        timeline.look(load(), WHOLE, item.span.end_s, 0.0)
    pages = all_pages(timeline, float(added), seconds, limit)
    in_window = [item for item in runs if item.span.end_s >= added - seconds]
    kept = in_window[-2 * capacity :]
    assert [item for page in pages for item in page.runs] == kept
    assert [sample.time_s for page in pages for sample in page.samples] == [
        item.span.end_s for item in kept
    ]
    assert all(len(page.runs) <= limit and len(page.samples) <= limit for page in pages)
    if len(kept) < len(in_window):
        assert pages[0].truncated


def test_a_window_that_is_kept_whole_is_not_truncated():
    timeline = Timeline(capacity=5)
    for i in range(20):
        timeline.add(run(Phase.DECODE, i, i + 1))
    assert not timeline.page(now_s=20.0, seconds=3.0, limit=100).truncated
    assert timeline.page(now_s=20.0, seconds=15.0, limit=100).truncated


def test_what_was_dropped_between_two_pages_is_missed_and_said():
    timeline = Timeline(capacity=2)
    for i in range(4):
        timeline.add(run(Phase.DECODE, i, i + 1))
    first = timeline.page(4.0, 10.0, 1)
    for i in range(4, 8):
        timeline.add(run(Phase.DECODE, i, i + 1))
    second = timeline.page(4.0, 10.0, 1, first.next_run, first.next_sample)
    assert not first.truncated
    assert second.truncated
    assert second.runs[0].span.start_s == 4


def test_the_policy_is_the_last_one_named():
    timeline = Timeline()
    assert timeline.policy == ""
    timeline.policy_changed("turns", 1.0)
    timeline.policy_changed("chunked:64", 2.0)
    timeline.policy_changed("chunked:64", 2.5)
    assert timeline.policy == "chunked:64"
    page = timeline.page(3.0, 10.0, 10)
    assert [(change.time_s, change.policy) for change in page.policies] == [
        (1.0, "turns"),
        (2.0, "chunked:64"),
    ]


def test_parked_batches_are_counted():
    timeline = Timeline()
    timeline.preempted()
    assert timeline.counts["preemptions"] == 1
