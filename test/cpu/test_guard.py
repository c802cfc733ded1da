from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drift_scheduler import guard as guard_module
from drift_scheduler.estimator import Estimator
from drift_scheduler.guard import Cell, Guard, Margin
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
        (WORK, 1.15 * 1.13, 1.15),
        ((Kind.PREFILL, SPLIT, STEP, BATCH), 1.15 * 1.13, 1.15),
        ((Kind.DECODE, WHOLE, STEP, None), 1.05, 1.0),
        ((Kind.PREFILL, SPLIT, None, BATCH), 1.05, 1.0),
        ((Kind.FUSED, WHOLE, STEP, BATCH), 1.05, 1.0),
    ],
)
def test_with_nothing_seen_there_is_a_default(work, worst, expected):
    cell = Guard().cell(*work)
    assert (cell.worst, cell.expected) == (pytest.approx(worst), expected)


def test_a_run_over_the_worst_case_raises_the_margin_and_others_lower_it():
    guard = Guard()
    guard.observe(*WORK, 1.15)
    margin = guard.cell(*WORK).margin.factor
    assert (guard.overruns, guard.observations) == (0, 1)
    guard.observe(*WORK, 1.15 * margin * 1.01)
    assert (guard.overruns, guard.observations) == (1, 2)
    raised = guard.cell(*WORK).margin.factor
    assert raised == pytest.approx(margin * (1 + guard_module.RISE))
    for _ in range(round(1 / guard_module.OVERRUNS)):
        guard.observe(*WORK, 1.15)
    assert guard.cell(*WORK).margin.factor == pytest.approx(margin, rel=0.001)
    assert guard.overruns == 1


@given(st.lists(ratios, min_size=1, max_size=400))
def test_factors_stay_within_what_was_seen(seen):
    guard = Guard()
    for ratio in seen:
        guard.observe(*WORK, ratio)
        cell = guard.cell(*WORK)
        assert cell.worst >= cell.expected
        assert min([1.15, *seen]) * (1 - 1e-9) <= cell.expected <= max([1.15, *seen]) * (1 + 1e-9)
    assert guard.observations == len(seen)
    assert guard.overruns <= len(seen)


@pytest.mark.parametrize("seed", range(3))
def test_the_share_of_overruns_does_not_depend_on_how_times_are_distributed(seed):
    """Nor on a drift: only on OVERRUNS."""
    rng = random.Random(seed)

    def pareto(turn):
        return 1.0 + 0.01 * rng.paretovariate(1.5)

    def two_humps(turn):
        return rng.choice((1.0, 1.3)) + rng.uniform(0, 0.02)

    def drifting(turn):
        return lognormal(rng, 1.2 + 0.2 * math.sin(turn / 1500), 0.05)

    for draw in (pareto, two_humps, drifting):
        guard = Guard()
        for turn in range(20_000):
            guard.observe(*WORK, draw(turn))
        assert guard.overruns / 20_000 == pytest.approx(guard_module.OVERRUNS, rel=0.4)


def test_one_accident_is_not_believed_and_two_in_a_row_are():
    guard = Guard()
    for _ in range(20):
        guard.observe(*WORK, 1.2)
    calm = guard.cell(*WORK)
    expected, worst = calm.expected, calm.worst
    guard.observe(*WORK, 5.0)
    assert guard.cell(*WORK).worst == pytest.approx(worst * (1 + guard_module.RISE))
    assert guard.cell(*WORK).expected == expected
    guard.observe(*WORK, 1.2)
    guard.observe(*WORK, 5.0)
    assert guard.cell(*WORK).expected == pytest.approx(expected, rel=0.01)
    guard.observe(*WORK, 4.0)
    assert guard.cell(*WORK).expected > expected + 0.1
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
    assert guard.cell(*WORK).expected == pytest.approx(1.2)
    assert guard.cell(Kind.DECODE, SPLIT, DecodeShape(2, 1000), BATCH).expected == pytest.approx(
        1.1
    )
    # A partition without cells: the next one's.
    other = guard.cell(Kind.DECODE, Split(108, 24), STEP, BATCH)
    assert other.expected in (pytest.approx(1.2), pytest.approx(1.4))
    # Alone, or the other phase: none of this counts.
    assert guard.cell(Kind.DECODE, SPLIT, STEP, None).worst == 1.05
    assert guard.cell(Kind.PREFILL, SPLIT, STEP, BATCH).expected == 1.15


def test_a_nearer_cell_takes_over_once_it_is_seen():
    guard = Guard()
    asked = (Kind.DECODE, SPLIT, DecodeShape(8, 8000), BATCH)
    assert guard.cell(*asked).expected == 1.15
    for _ in range(200):
        guard.observe(Kind.DECODE, SPLIT, DecodeShape(128, 500_000), BATCH, 1.6)
    assert guard.cell(*asked).expected == pytest.approx(1.6, rel=0.01)
    for _ in range(200):
        guard.observe(Kind.DECODE, SPLIT, DecodeShape(8, 4000), BATCH, 1.2)
    assert guard.cell(*asked).expected == pytest.approx(1.2, rel=0.01)


def test_a_new_cell_begins_where_its_stand_in_is():
    guard = Guard()
    for _ in range(200):
        guard.observe(Kind.DECODE, SPLIT, DecodeShape(16, 64_000), BATCH, 1.45)
    guard.observe(*WORK, 1.15)
    assert guard.cell(*WORK).expected == pytest.approx(1.35, rel=0.01)  # one of three


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
        assert (same.worst, same.expected) == (pytest.approx(cell.worst), cell.expected)
        assert (same.observations, same.clock_mhz) == (30 + guard_module.STAND_IN, 1500.0)
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
    assert cell.clock_mhz == 1450
    assert guard.cell(Kind.DECODE, SPLIT, STEP, None).worst == pytest.approx(
        guard_module.OVER_A_MEDIAN, rel=0.01
    )
    assert guard.observations == 0


def test_the_slowest_run_of_a_sample_is_the_worst_case():
    solo = [
        Sample(Kind.DECODE, SPLIT, 0.02, decode=STEP, slowest_s=0.022),
        Sample(Kind.PREFILL, SPLIT, 0.1, prefill=BATCH, layers=4, slowest_s=0.1),
    ]
    guard = Guard.of_samples(Estimator.fit(solo, 132), solo)
    assert guard.cell(Kind.DECODE, SPLIT, STEP, None).margin.factor == pytest.approx(1.1)
    assert guard.cell(Kind.PREFILL, SPLIT, None, BATCH).margin.factor == pytest.approx(1.0)


def test_the_clock_of_a_cell_follows_that_of_its_runs():
    cell = Cell(1.1, Margin(1.1), 1, clock_mhz=1400.0)
    for _ in range(100):
        cell.observe(1.1, 1900.0)
    assert 1800 < cell.clock_mhz < 1900


def test_a_slow_run_at_a_lower_clock_is_no_overrun():
    guard = Guard()
    for _ in range(10):
        guard.observe(*WORK, 1.2, clock_mhz=1800.0)
    before = guard.overruns
    cell = guard.cell(*WORK)
    worst, margin = cell.worst, cell.margin.factor
    guard.observe(*WORK, worst * 1.15, clock_mhz=1500.0)
    assert guard.overruns == before
    assert guard.cell(*WORK).margin.factor < margin
    guard.observe(*WORK, worst * 1.25, clock_mhz=1500.0)
    assert guard.overruns == before + 1


@pytest.mark.parametrize("ratio", [0.0, -1.0, math.inf, math.nan])
def test_an_impossible_ratio_is_refused(ratio):
    with pytest.raises(ValueError, match="ratio="):
        Guard().observe(*WORK, ratio)
