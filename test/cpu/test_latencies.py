from __future__ import annotations

import dataclasses
import random

import pytest

from drift_scheduler.clock import ClockRatio
from drift_scheduler.dispatcher import Forecast
from drift_scheduler.estimator import Estimator
from drift_scheduler.guard import Guard
from drift_scheduler.lane import Phase, Span
from drift_scheduler.latencies import Latencies
from drift_scheduler.partition import Partition
from drift_scheduler.profile import GuardCell, Kind, Sample, Split
from drift_scheduler.shapes import NOTHING_RUNNING, DecodeShape, PrefillShape
from drift_scheduler.timeline import LaneRun

SMS, LAYERS = 132, 32
WHOLE = Partition(0, SMS, SMS, exclusive=True)
SPLIT = Partition(2, 100, 32)
STEP = DecodeShape(32, 64_000)
BATCH = PrefillShape.of([(1024, 4096)])
NO_PROMPTS = PrefillShape(0, 0, 0, requests=0)


@pytest.fixture(scope="module")
def estimator():
    batches = [PrefillShape.of([(n, r)]) for n in (256, 1024, 4096) for r in (0, 4096)]
    steps = [DecodeShape(b, b * c) for b in (1, 8, 32, 64) for c in (500, 2000)]
    samples = []
    for split, speed in ((Split(SMS, SMS, True), 1.0), (Split(100, 32), 0.6)):
        for batch in batches:
            seconds = (5e-3 + 2.5e-5 * batch.tokens + 1e-9 * batch.cross) / speed
            samples.append(Sample(Kind.PREFILL, split, seconds, prefill=batch, layers=4))
        for step in steps:
            seconds = (5e-3 + 4e-8 * step.context) / speed
            samples.append(Sample(Kind.DECODE, split, seconds, decode=step))
    return Estimator.fit(samples, SMS)


@pytest.fixture
def guard():
    return Guard()


@pytest.fixture
def latencies(estimator, guard):
    return Latencies(estimator, guard, LAYERS)


def run(phase, took_s, partition=SPLIT, *, start_s=100.0, **fields):
    span = Span(start_s, start_s + took_s)
    return LaneRun(phase, partition, span, requests=1, tokens=1, **fields)


def ratios(forecast: Forecast, solo_s: float):
    return pytest.approx((forecast.expected_s / solo_s, forecast.worst_s / solo_s))


def test_a_forecast_is_the_prediction_times_what_the_guard_knows(latencies, estimator):
    decode_s = estimator.decode_s(STEP, 32)
    prefill_s = estimator.prefill_s(BATCH, 100)
    assert ratios(latencies.decode(STEP, SPLIT, BATCH), decode_s) == (1.15, 1.15 * 1.13)
    assert ratios(latencies.decode(STEP, SPLIT, None), decode_s) == (1.0, 1.05)
    assert ratios(latencies.prefill(BATCH, SPLIT, STEP), prefill_s) == (1.15, 1.15 * 1.13)
    assert ratios(latencies.prefill(BATCH, SPLIT, None), prefill_s) == (1.0, 1.05)
    fused_s = estimator.fused_s(STEP, BATCH)
    assert ratios(latencies.fused(STEP, BATCH), fused_s) == (1.0, 1.05)
    whole_s = estimator.decode_s(STEP, SMS)
    assert whole_s < decode_s
    assert ratios(latencies.decode(STEP, WHOLE, None), whole_s) == (1.0, 1.05)


def test_nothing_beside_is_the_same_as_none(latencies):
    assert latencies.decode(STEP, SPLIT, NO_PROMPTS) == latencies.decode(STEP, SPLIT, None)
    assert latencies.prefill(BATCH, SPLIT, NOTHING_RUNNING) == latencies.prefill(BATCH, SPLIT, None)


QUESTIONS = (
    lambda latencies: latencies.decode(STEP, SPLIT, BATCH),
    lambda latencies: latencies.decode(STEP, WHOLE, None),
    lambda latencies: latencies.prefill(BATCH, SPLIT, STEP),
    lambda latencies: latencies.prefill(BATCH, WHOLE, None),
    lambda latencies: latencies.fused(STEP, BATCH),
)
RUNS = (
    lambda s: run(Phase.DECODE, s, decode=STEP, prefill=BATCH),
    lambda s: run(Phase.DECODE, s, WHOLE, decode=STEP),
    # A slice of a quarter of the layers.
    lambda s: run(Phase.PREFILL, s / 4, prefill=BATCH, decode=STEP, layers=LAYERS // 4),
    lambda s: run(Phase.PREFILL, s, WHOLE, prefill=BATCH, layers=LAYERS),
    lambda s: run(Phase.DECODE, s, WHOLE, decode=STEP, prefill=BATCH, fused_tokens=1024),
)


@pytest.mark.parametrize("which", range(len(QUESTIONS)))
def test_runs_that_take_longer_are_forecast_longer_and_no_others(latencies, guard, which):
    rng = random.Random(0)
    before = [question(latencies) for question in QUESTIONS]
    took_s = 1.4 * before[which].worst_s
    for _ in range(1000):
        latencies.observe(RUNS[which](took_s * rng.uniform(0.95, 1.05)))
    forecasts = [question(latencies) for question in QUESTIONS]
    after = forecasts[which]
    # Once warm the forecast is unbiased, whatever the estimator is off by.
    assert after.expected_s == pytest.approx(took_s, rel=0.02)
    assert took_s * 1.04 < after.worst_s < took_s * 1.12
    assert guard.observations == 1000
    assert forecasts[:which] + forecasts[which + 1 :] == before[:which] + before[which + 1 :]


@pytest.mark.parametrize(
    "uninformative",
    [
        run(Phase.DECODE, 0.1),
        run(Phase.DECODE, 0.1, decode=NOTHING_RUNNING),
        run(Phase.DECODE, 0.0, decode=STEP),
        run(Phase.DECODE, 0.1, WHOLE, decode=STEP, fused_tokens=100),
        run(Phase.PREFILL, 0.1, layers=4),
        run(Phase.PREFILL, 0.1, layers=4, prefill=NO_PROMPTS),
        run(Phase.PREFILL, 0.1, layers=0, prefill=BATCH),
    ],
)
def test_runs_that_tell_nothing_are_left_out(latencies, guard, uninformative):
    latencies.observe(uninformative)
    assert guard.observations == 0
    assert guard.rows() == []


def test_prompts_may_ride_with_nothing_running(latencies, guard):
    took_s = latencies.fused(NOTHING_RUNNING, BATCH).expected_s
    latencies.observe(
        run(Phase.DECODE, took_s, WHOLE, decode=NOTHING_RUNNING, prefill=BATCH, fused_tokens=1024)
    )
    (row,) = guard.rows()
    assert row.kind is Kind.FUSED
    assert row.expected == pytest.approx(1.0)


def test_a_lower_clock_than_the_cells_lengthens_the_forecast(estimator):
    clock = ClockRatio(half_life_s=0.01)
    guard = Guard(
        [
            GuardCell(
                Kind.DECODE,
                Split(100, 32),
                BATCH.tokens.bit_length(),
                (4096).bit_length(),
                STEP.requests.bit_length(),
                STEP.context.bit_length(),
                worst=1.3,
                expected=1.2,
                observations=1000,
                clock_mhz=1500.0,
            )
        ]
    )
    latencies = Latencies(estimator, guard, LAYERS, clock)
    solo_s = estimator.decode_s(STEP, 32)
    other = run(Phase.PREFILL, 0.1, WHOLE, prefill=BATCH, layers=LAYERS, start_s=9.9)
    assert ratios(latencies.decode(STEP, SPLIT, BATCH), solo_s) == (1.2, 1.3)
    clock.feed(1500.0, 10.0)
    latencies.observe(other)
    # The clock is that of the cell: the slowdown has it already.
    assert ratios(latencies.decode(STEP, SPLIT, BATCH), solo_s) == (1.2, 1.3)
    clock.feed(1250.0, 10.5)
    latencies.observe(dataclasses.replace(other, span=Span(10.4, 10.5)))
    assert ratios(latencies.decode(STEP, SPLIT, BATCH), solo_s) == (1.2 * 1.2, 1.3 * 1.2)
    clock.feed(1980.0, 11.0)
    latencies.observe(dataclasses.replace(other, span=Span(10.9, 11.0)))
    assert ratios(latencies.decode(STEP, SPLIT, BATCH), solo_s) == (1.2, 1.3)
    # Nobody reads the clock any more.
    clock.feed(1000.0, 11.5)
    latencies.observe(dataclasses.replace(other, span=Span(19.9, 20.0)))
    assert ratios(latencies.decode(STEP, SPLIT, BATCH), solo_s) == (1.2, 1.3)


def test_a_model_has_layers(estimator, guard):
    with pytest.raises(ValueError, match="num_layers=0"):
        Latencies(estimator, guard, 0)
