from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drift_scheduler import guard as guard_module
from drift_scheduler.estimator import Estimator
from drift_scheduler.guard import Cell, Guard
from drift_scheduler.profile import Kind, Sample, Split
from drift_scheduler.shapes import DecodeShape, PrefillShape

WHOLE = Split(132, 132, exclusive=True)
SPLIT = Split(100, 32)
STEP = DecodeShape(32, 64_000)
BATCH = PrefillShape.of([(1024, 4096)])
WORK = (Kind.DECODE, SPLIT, STEP, BATCH)

ratios = st.floats(0.3, 10.0)


def lognormal(rng, mean, deviation):
    return mean * math.exp(rng.gauss(0, deviation))


@pytest.mark.parametrize(
    ("work", "worst", "expected"),
    [
        (WORK, 1.30, 1.15),
        ((Kind.PREFILL, SPLIT, STEP, BATCH), 1.30, 1.15),
        ((Kind.DECODE, WHOLE, STEP, None), 1.05, 1.0),
        ((Kind.PREFILL, SPLIT, None, BATCH), 1.05, 1.0),
        ((Kind.FUSED, WHOLE, STEP, BATCH), 1.05, 1.0),
    ],
)
def test_with_nothing_seen_there_is_a_default(work, worst, expected):
    cell = Guard().cell(*work)
    assert (cell.worst, cell.expected) == (worst, expected)


def test_a_larger_ratio_raises_the_cell_at_once():
    guard = Guard()
    guard.observe(*WORK, 1.42)
    assert guard.cell(*WORK).worst == 1.42
    assert (guard.overruns, guard.observations) == (1, 1)
    guard.observe(*WORK, 1.40)
    assert (guard.overruns, guard.observations) == (1, 2)


def test_smaller_ratios_lower_it_slowly_and_not_below_those_of_late():
    guard = Guard()
    guard.observe(*WORK, 1.5)
    for _ in range(2 * guard_module.WINDOW):
        guard.observe(*WORK, 1.1)
    assert guard.cell(*WORK).worst > 1.1
    for _ in range(400):
        guard.observe(*WORK, 1.1)
    assert guard.cell(*WORK).worst == pytest.approx(1.1)
    guard.observe(*WORK, 1.15)
    for _ in range(guard_module.WINDOW):
        guard.observe(*WORK, 1.1)
    assert guard.cell(*WORK).worst == 1.15


@given(st.lists(ratios, min_size=1, max_size=400))
def test_the_worst_case_covers_all_that_was_seen_lately(seen):
    """Accidents apart: ratios far above the cell that the next one did not bear out."""
    guard = Guard()
    believed = []
    absurd = None
    for ratio in seen:
        limit = guard_module.ABSURD * guard.cell(*WORK).worst
        guard.observe(*WORK, ratio)
        if ratio > limit and absurd is None:
            absurd = ratio
            continue
        believed.append(min(absurd, ratio) if ratio > limit and absurd else ratio)
        absurd = None
        assert guard.cell(*WORK).worst >= max(believed[-guard_module.WINDOW :])
    cell = guard.cell(*WORK)
    assert cell.worst >= guard_module.LEAST_WORST
    assert guard.observations == len(seen)
    assert cell.expected <= max([1.15, *believed]) * (1 + 1e-9)
    assert cell.expected >= min([1.15, *believed]) * (1 - 1e-9)


def test_one_accident_is_not_believed_and_two_in_a_row_are():
    guard = Guard()
    for _ in range(20):
        guard.observe(*WORK, 1.2)
    calm = guard.cell(*WORK).worst
    guard.observe(*WORK, 5.0)
    assert guard.cell(*WORK).worst == calm
    assert guard.cell(*WORK).expected < 1.21
    guard.observe(*WORK, 1.2)
    guard.observe(*WORK, 5.0)
    assert guard.cell(*WORK).worst < 1.3
    guard.observe(*WORK, 4.0)
    assert guard.cell(*WORK).worst == 4.0
    assert guard.overruns == 3  # all of them took longer than promised


@pytest.mark.parametrize("seed", range(4))
def test_fewer_than_one_in_a_hundred_overrun_and_the_margin_stays_small(seed):
    """Two partitions, six shapes each, with noise of 4 % around slowdowns of their own."""
    rng = random.Random(seed)
    guard = Guard()
    works = [
        (Kind.DECODE, Split(132 - sms, sms), DecodeShape(requests, 2000 * requests), BATCH)
        for sms in (32, 64)
        for requests in (1, 4, 16, 32, 64, 128)
    ]
    slowdowns = [rng.uniform(1.05, 1.3) for _ in works]
    margins = []
    for turn in range(12_000):
        if turn == 2000:
            warm = (guard.overruns, guard.observations)
        which = rng.randrange(len(works))
        ratio = lognormal(rng, slowdowns[which], 0.04)
        margins.append(guard.cell(*works[which]).worst / ratio)
        guard.observe(*works[which], ratio)
    overruns, observations = guard.overruns - warm[0], guard.observations - warm[1]
    assert observations == 10_000
    assert overruns < 0.01 * observations
    assert sum(margins[2000:]) / 10_000 < 1.25
    for work, slowdown in zip(works, slowdowns, strict=True):
        assert guard.cell(*work).expected == pytest.approx(slowdown, rel=0.02)


def test_heavy_tails_are_learnt_too():
    """One step in fifty takes a third longer: too often for an accident."""
    rng = random.Random(1)
    guard = Guard()
    overruns = 0
    for turn in range(5000):
        if turn == 500:
            overruns = guard.overruns
        guard.observe(*WORK, lognormal(rng, 1.4 if rng.random() < 0.02 else 1.05, 0.02))
    assert guard.overruns - overruns < 0.01 * 4500


def test_a_lasting_change_is_followed_both_ways():
    rng = random.Random(2)
    guard = Guard()
    for level in (1.1, 1.35, 1.1):
        for _ in range(1500):
            guard.observe(*WORK, lognormal(rng, level, 0.02))
        cell = guard.cell(*WORK)
        assert level < cell.worst < level * 1.12
        assert cell.expected == pytest.approx(level, rel=0.02)


def test_an_unseen_cell_answers_as_the_nearest_one_of_its_partition():
    guard = Guard()
    near, far = DecodeShape(16, 64_000), DecodeShape(1, 1000)
    for _ in range(2000):
        guard.observe(Kind.DECODE, SPLIT, near, BATCH, 1.2)
        guard.observe(Kind.DECODE, SPLIT, far, BATCH, 1.1)
        guard.observe(Kind.DECODE, Split(116, 16), STEP, BATCH, 1.4)
    assert guard.cell(*WORK).worst == pytest.approx(1.2)
    assert guard.cell(Kind.DECODE, SPLIT, DecodeShape(2, 1000), BATCH).worst == pytest.approx(1.1)
    # A partition without cells: the next one's.
    other = guard.cell(Kind.DECODE, Split(108, 24), STEP, BATCH)
    assert other.worst in (guard.cell(*WORK).worst, pytest.approx(1.4))
    # Alone, or the other phase: none of this counts.
    assert guard.cell(Kind.DECODE, SPLIT, STEP, None).worst == 1.05
    assert guard.cell(Kind.PREFILL, SPLIT, STEP, BATCH).worst == 1.30


def test_a_nearer_cell_takes_over_once_it_is_seen():
    guard = Guard()
    asked = (Kind.DECODE, SPLIT, DecodeShape(8, 8000), BATCH)
    assert guard.cell(*asked).worst == 1.30
    guard.observe(Kind.DECODE, SPLIT, DecodeShape(128, 500_000), BATCH, 1.6)
    assert guard.cell(*asked).worst == 1.6
    for _ in range(2000):
        guard.observe(Kind.DECODE, SPLIT, DecodeShape(8, 4000), BATCH, 1.2)
    assert guard.cell(*asked).worst == pytest.approx(1.2)


def test_a_new_cell_begins_where_its_stand_in_is():
    guard = Guard()
    guard.observe(Kind.DECODE, SPLIT, DecodeShape(16, 64_000), BATCH, 1.45)
    guard.observe(*WORK, 1.1)
    assert 1.4 < guard.cell(*WORK).worst < 1.45


def test_rows_make_the_same_guard_again():
    rng = random.Random(3)
    guard = Guard()
    works = [
        WORK,
        (Kind.PREFILL, SPLIT, STEP, BATCH),
        (Kind.PREFILL, WHOLE, None, BATCH),
        (Kind.DECODE, WHOLE, STEP, None),
        (Kind.FUSED, WHOLE, STEP, BATCH),
    ]
    for work in works:
        for _ in range(30):
            guard.observe(*work, lognormal(rng, 1.2, 0.04), clock_mhz=1500.0)
    rows = guard.rows()
    again = Guard(rows)
    assert sorted(map(repr, again.rows())) == sorted(map(repr, rows))
    for work in works:
        cell, same = guard.cell(*work), again.cell(*work)
        assert (same.worst, same.expected) == (cell.worst, cell.expected)
        assert (same.observations, same.worst_mhz) == (30, 1500.0)
    alone = next(row for row in rows if row.partition == WHOLE and row.kind is Kind.DECODE)
    assert alone.tokens is None and alone.cached is None
    assert (alone.requests, alone.context) == (6, 16)


def test_a_guard_starts_from_a_profiles_samples():
    solo = [
        Sample(Kind.DECODE, SPLIT, 0.02, decode=STEP),
        Sample(Kind.PREFILL, SPLIT, 0.1, prefill=BATCH, layers=4),
    ]
    beside = [
        Sample(Kind.DECODE, SPLIT, 0.024, decode=STEP, prefill=BATCH, beside=True, clock_mhz=1500),
        Sample(Kind.DECODE, SPLIT, 0.026, decode=STEP, prefill=BATCH, beside=True, clock_mhz=1400),
    ]
    estimator = Estimator.fit(solo, 132)
    guard = Guard.of_samples(estimator, [*solo, *beside])
    cell = guard.cell(*WORK)
    assert cell.expected == pytest.approx(1.25, rel=0.01)
    assert cell.worst == pytest.approx(1.3 * guard_module.OVER_A_MEDIAN, rel=0.01)
    assert cell.worst_mhz == 1400
    assert guard.cell(Kind.DECODE, SPLIT, STEP, None).worst == pytest.approx(
        guard_module.OVER_A_MEDIAN, rel=0.01
    )
    assert guard.observations == 0


def test_the_clock_of_the_worst_case_is_that_of_when_it_was_seen():
    cell = Cell(worst=1.1, expected=1.0)
    cell.observe(1.3, 1400.0)
    for _ in range(100):
        cell.observe(1.1, 1900.0)
    assert (cell.worst, cell.worst_mhz) == (1.3, 1400.0)
    assert 1700 < cell.expected_mhz < 1900


def test_a_slow_run_at_a_lower_clock_is_no_overrun():
    guard = Guard()
    for _ in range(10):
        guard.observe(*WORK, 1.2, clock_mhz=1800.0)
    before = guard.overruns
    worst = guard.cell(*WORK).worst
    guard.observe(*WORK, worst * 1.15, clock_mhz=1500.0)
    assert guard.overruns == before
    assert guard.cell(*WORK).worst == pytest.approx(worst * 1.15)
    assert guard.cell(*WORK).worst_mhz == 1500.0


@pytest.mark.parametrize("ratio", [0.0, -1.0, math.inf, math.nan])
def test_an_impossible_ratio_is_refused(ratio):
    with pytest.raises(ValueError, match="ratio="):
        Guard().observe(*WORK, ratio)
