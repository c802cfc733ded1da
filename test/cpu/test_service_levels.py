"""Service levels: which SLO a request's own `slo` amounts to, and what is said about wrong ones."""

from __future__ import annotations

import math
from typing import Any

import pytest

from drift_scheduler.slo import Slo
from sglang.srt.errors import RequestError
from sglang.srt.service_levels import ServiceLevel, ServiceLevels

LEVELS = ServiceLevels({"ttft_ms": 500, "tbt_ms": 50}, {"batch": {"tbt_ms": 1000}})
DEFAULT = ServiceLevel(Slo(ttft_s=0.5, tbt_s=0.05), "default")


@pytest.mark.parametrize("asked", [None, "default", {}, {"ttft_ms": None}, {"tbt_ms": 50}])
def test_who_asks_for_nothing_else_gets_the_default(asked: Any) -> None:
    assert LEVELS.resolve(asked) == DEFAULT


@pytest.mark.parametrize(
    ("asked", "level"),
    [
        ("batch", ServiceLevel(Slo(ttft_s=0.5, tbt_s=1.0), "batch")),
        ({"tbt_ms": 20}, ServiceLevel(Slo(ttft_s=0.5, tbt_s=0.02), "custom")),
        ({"ttft_ms": 900.0}, ServiceLevel(Slo(ttft_s=0.9, tbt_s=0.05), "custom")),
        (
            {"ttft_ms_per_token": 0.5},
            ServiceLevel(Slo(ttft_s=0.5, ttft_per_token_s=0.0005, tbt_s=0.05), "custom"),
        ),
    ],
)
def test_what_is_left_open_is_the_server_s(asked: Any, level: ServiceLevel) -> None:
    assert LEVELS.resolve(asked) == level


def test_a_server_without_limits_takes_those_of_a_request() -> None:
    levels = ServiceLevels({}, {})
    assert levels.resolve(None).slo == Slo()
    assert levels.resolve({"tbt_ms": 5}).slo == Slo(tbt_s=0.005)


@pytest.mark.parametrize(
    ("asked", "field", "message"),
    [
        (5, "slo", "must be an object or the name of a class, got 5"),
        ([{"tbt_ms": 5}], "slo", "must be an object"),
        ("interactive", "slo", "no class 'interactive', this server has default, batch"),
        ({"tbt": 5}, "slo.tbt", "is not a known limit; known are ttft_ms, ttft_ms_per_token, tbt"),
        ({"tbt_ms": "5"}, "slo.tbt_ms", "must be a number of milliseconds greater than 0, got '5'"),
        ({"tbt_ms": True}, "slo.tbt_ms", "must be a number"),
        ({"tbt_ms": 0}, "slo.tbt_ms", "must be a number of milliseconds greater than 0, got 0"),
        ({"ttft_ms": -1}, "slo.ttft_ms", "must be a number"),
        ({"ttft_ms": math.nan}, "slo.ttft_ms", "must be a number"),
        ({"ttft_ms": 10**400}, "slo.ttft_ms", "must be within"),
        ({"ttft_ms": 1e-320}, "slo.ttft_ms", "must be within"),
    ],
)
def test_what_cannot_be_asked_is_named(asked: Any, field: str, message: str) -> None:
    with pytest.raises(RequestError, match=f"^{field}: {message}") as raised:
        LEVELS.resolve(asked)
    assert raised.value.field == field
