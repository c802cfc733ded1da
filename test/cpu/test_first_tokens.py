"""First tokens are let go when the step starts which their requests join."""

from __future__ import annotations

import math

import pytest

from drift_scheduler.first_tokens import FirstTokens, may_hold
from drift_scheduler.slo import Slo


def test_with_no_step_in_flight_the_token_goes_out_with_the_launch():
    tokens = FirstTokens()
    tokens.hold("a")
    assert tokens.step_launched() == ["a"]
    assert tokens.step_launched() == []


def test_it_goes_out_when_the_steps_before_have_settled():
    tokens = FirstTokens()
    tokens.step_launched()
    tokens.step_launched()
    tokens.hold("a")
    tokens.hold("b")
    assert tokens.step_launched() == []
    tokens.hold("later")
    assert tokens.step_settled() == []
    assert tokens.step_settled() == ["a", "b"]
    assert tokens.step_launched() == []
    assert tokens.step_settled() == ["later"]


def test_those_without_a_step_are_released():
    tokens = FirstTokens()
    tokens.step_launched()
    tokens.hold("a")
    tokens.step_launched()
    tokens.hold("b")
    assert tokens.release() == ["b"]
    assert tokens.release() == []
    assert tokens.step_settled() == ["a"]


@pytest.mark.parametrize(
    ("slo", "due_s", "holds"),
    [
        (Slo(), math.inf, False),  # nobody minds gaps
        (Slo(tbt_s=0.5), math.inf, True),
        (Slo(tbt_s=0.5), 11.01, True),
        (Slo(tbt_s=0.5), 10.99, False),  # two gaps later it would be late
        (Slo(tbt_s=0.5), 9.0, True),  # it is late already
    ],
)
def test_who_is_held(slo, due_s, holds):
    assert may_hold(slo, due_s, now_s=10.0) is holds
