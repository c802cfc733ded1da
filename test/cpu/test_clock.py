from __future__ import annotations

import pytest

from drift_scheduler.clock import MAX_FACTOR, ClockRatio, slowdown


def test_a_lower_clock_slows_work_in_proportion():
    assert slowdown(1980, 1650) == pytest.approx(1.2)


def test_the_factor_has_bounds():
    assert slowdown(1400, 1980) == 1.0
    assert slowdown(1980, 100) == MAX_FACTOR


@pytest.mark.parametrize(("reference", "now"), [(None, 1500.0), (1500.0, None), (None, None)])
def test_what_is_not_known_changes_nothing(reference, now):
    assert slowdown(reference, now) == 1.0


def test_after_the_half_life_an_older_reading_counts_half():
    clock = ClockRatio(half_life_s=0.5)
    clock.feed(2000, 0.0)
    clock.feed(1000, 0.5)
    assert clock.at(0.5) == pytest.approx(1500)
    clock.feed(1000, 1.0)
    assert clock.at(1.0) == pytest.approx(1250)


def test_readings_go_stale():
    clock = ClockRatio()
    assert clock.at(0.0) is None
    clock.feed(1800, 10.0)
    assert clock.at(11.0) == 1800
    assert clock.at(11.1) is None
    # The smoothing starts anew: what was read before the gap has no part in it.
    clock.feed(1200, 12.0)
    assert clock.at(12.0) == 1200


def test_readings_that_say_nothing_are_left_out():
    clock = ClockRatio()
    clock.feed(1800, 10.0)
    clock.feed(None, 10.1)
    clock.feed(0.0, 10.2)
    clock.feed(900, 9.0)  # from before the last
    assert clock.at(10.2) == 1800


def test_a_half_life_must_be_positive():
    with pytest.raises(ValueError, match="half_life_s=0"):
        ClockRatio(half_life_s=0)
