from __future__ import annotations

import random

import pytest

from drift_scheduler.host_delay import LEAST_S, MOST_S, OVER, START_S, HostDelay


@pytest.mark.parametrize("seed", range(3))
def test_few_steps_are_delayed_by_more(seed):
    rng = random.Random(seed)
    delay = HostDelay()
    over = 0
    for _ in range(60_000):
        delay_s = rng.lognormvariate(-7.0, 0.8)
        over += delay_s > delay.allowance_s
        delay.observe(delay_s)
    assert over / 60_000 == pytest.approx(OVER, rel=0.3)


def test_it_follows_a_host_that_gets_busy_and_calm_again():
    delay = HostDelay()
    assert delay.allowance_s == START_S
    for _ in range(200):
        delay.observe(4e-3)
    assert delay.allowance_s == pytest.approx(4e-3, abs=0.4e-3)
    for _ in range(4000):
        delay.observe(0.0)
    assert delay.allowance_s == LEAST_S


def test_it_has_a_limit():
    delay = HostDelay()
    for _ in range(1000):
        delay.observe(1.0)
    assert delay.allowance_s == MOST_S
