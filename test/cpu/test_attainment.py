"""Attainment: a request's verdict is that of its gaps all kept, and every count has its time."""

from __future__ import annotations

import math
import timeit
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from drift_scheduler.attainment import WINDOW_S, Attainment, Pace
from drift_scheduler.slo import Slo

# Quarters add up without rounding, so that a gap taken from two times is the gap that was meant.
GAPS_S = st.lists(st.integers(0, 40).map(lambda quarters: quarters / 4), max_size=450)


def paced(
    gaps_s: Sequence[float], tbt_s: float = math.inf, *, arrival_s: float = 0.0, ttft_s: float = 1.0
) -> Pace:
    """A request whose tokens came at these gaps, the first one ttft_s after its arrival."""
    pace = Pace(arrival_s, tbt_s)
    now_s = arrival_s + ttft_s
    pace.token(now_s)
    for gap_s in gaps_s:
        now_s += gap_s
        pace.token(now_s)
    return pace


@given(gaps_s=GAPS_S, tbt_s=st.integers(1, 80).map(lambda eighths: eighths / 8))
@example(gaps_s=[0.25] * 99 + [5.0], tbt_s=0.25)
@example(gaps_s=[0.25] * 100 + [5.0], tbt_s=0.25)
@example(gaps_s=[5.0] * 3 + [0.25] * 297, tbt_s=0.25)
@example(gaps_s=[0.25] * 150 + [5.0] * 2, tbt_s=2.5)
def test_verdict_is_that_of_the_percentile(gaps_s: list[float], tbt_s: float) -> None:
    kept = not gaps_s or float(np.percentile(gaps_s, 99)) <= tbt_s
    assert paced(gaps_s, tbt_s).kept_tbt == kept


@given(gaps_s=GAPS_S.filter(len))
def test_the_percentile_itself_is_kept_and_less_is_not(gaps_s: list[float]) -> None:
    limit_s = float(np.percentile(gaps_s, 99))
    assert paced(gaps_s, limit_s).kept_tbt
    assert not paced(gaps_s, limit_s * (1 - 1e-9)).kept_tbt or limit_s == 0


def test_one_long_gap_in_a_short_answer_breaks_it() -> None:
    assert not paced([0.01] * 49 + [1.0], 0.1).kept_tbt
    assert paced([0.01] * 999 + [1.0], 0.1).kept_tbt


def test_a_token_is_cheap() -> None:
    """Of 256 running requests each gets one a step, on the thread that launches the next step."""
    pace = Pace(0.0, 0.05)
    best_s = min(timeit.repeat(lambda: pace.token(1.0), number=2000, repeat=20)) / 2000
    assert best_s < 1e-6  # 0.1 us on a machine with nothing else to do


@pytest.mark.parametrize(
    ("slo", "uncached", "met"),
    [
        (Slo(), 10, True),
        (Slo(ttft_s=1.0), 10, True),
        (Slo(ttft_s=0.99), 10, False),
        (Slo(ttft_s=0.5, ttft_per_token_s=0.1), 10, True),
        (Slo(ttft_s=0.5, ttft_per_token_s=0.1), 9, False),
    ],
)
def test_first_token(slo: Slo, uncached: int, met: bool) -> None:
    attainment = Attainment(0.0)
    attainment.finish(paced([0.25], slo.tbt_s), slo, uncached, "default")
    counts = attainment.snapshot(2.0)
    assert (counts["finished"], counts["met_ttft"], counts["met"]) == (1, met, met)


def test_met_is_both() -> None:
    attainment = Attainment(0.0)
    slo = Slo(ttft_s=1.0, tbt_s=0.5)
    for gap_s, ttft_s in ((0.25, 0.5), (0.75, 0.5), (0.25, 1.5), (0.75, 1.5)):
        attainment.finish(paced([gap_s] * 2, slo.tbt_s, ttft_s=ttft_s), slo, 1, "default")
    counts = attainment.snapshot(10.0)
    assert [counts[key] for key in ("finished", "met_ttft", "met_tbt", "met")] == [4, 2, 2, 1]
    assert (counts["attainment"], counts["goodput_rps"]) == (0.25, 0.1)


def test_what_cannot_be_late_is_met() -> None:
    attainment = Attainment(0.0)
    strict = Slo(ttft_s=1e-9, tbt_s=1e-9)
    attainment.finish(Pace(5.0, strict.tbt_s), strict, 1, "no-token")
    attainment.finish(paced([], 1e-9, ttft_s=0.0), strict, 1, "one-token")
    assert attainment.snapshot(6.0)["met"] == 2


def test_classes_are_counted_apart_and_together() -> None:
    attainment = Attainment(0.0)
    slo = Slo(ttft_s=0.5)
    attainment.finish(paced([]), Slo(), 1, "default")
    attainment.finish(paced([]), slo, 1, "chat")
    attainment.shed("chat")
    counts = attainment.snapshot(10.0)
    chat = counts["classes"]["chat"]
    assert (chat["finished"], chat["met"], chat["shed"], chat["attainment"]) == (1, 0, 1, 0.0)
    assert (counts["finished"], counts["met"], counts["shed"]) == (2, 1, 1)
    assert sorted(counts["classes"]) == ["chat", "default"]


def test_without_a_class_nothing_is_counted() -> None:
    attainment = Attainment(0.0)
    attainment.finish(paced([]), Slo(), 1, "")
    attainment.shed("")
    counts = attainment.snapshot(10.0)
    assert (counts["finished"], counts["shed"], counts["classes"]) == (0, 0, {})
    assert counts["attainment"] is None


def test_any_slo_tells_whether_someone_asked() -> None:
    attainment = Attainment(0.0)
    attainment.finish(paced([]), Slo(), 1, "default")
    assert not attainment.any_slo
    attainment.finish(paced([], 9.0), Slo(tbt_s=9.0), 1, "default")
    assert attainment.any_slo


def test_window_forgets() -> None:
    attainment = Attainment(100.0)

    def window(now_s: float) -> tuple[int, int, float]:
        counts = attainment.snapshot(now_s)["window"]
        return counts["finished"], counts["met"], counts["goodput_rps"]

    slo = Slo(ttft_s=0.5)
    for arrival_s in (100.0, 100.5, 130.0):
        attainment.finish(paced([], arrival_s=arrival_s, ttft_s=0.25), slo, 1, "default")
        attainment.finish(paced([], arrival_s=arrival_s, ttft_s=0.75), slo, 1, "default")
    assert window(101.0) == (6, 3, 3 / 1.0)
    assert window(110.0) == (6, 3, 3 / 10)
    # The window has 60 buckets; the one that runs is not full yet.
    assert window(100.0 + WINDOW_S - 0.5) == (6, 3, 3 / (WINDOW_S - 0.5))
    assert window(100.0 + WINDOW_S + 0.5) == (3, 1, 1 / (WINDOW_S - 0.5))
    assert window(100.0 + 10 * WINDOW_S) == (0, 0, 0.0)
    assert attainment.snapshot(200.0)["finished"] == 6


@given(
    ends_s=st.lists(st.integers(0, 800).map(lambda quarters: quarters / 4), max_size=80),
    late_s=st.integers(0, 400).map(lambda quarters: quarters / 4),
)
def test_window_is_that_of_all_ends_kept(ends_s: list[float], late_s: float) -> None:
    attainment = Attainment(0.0)
    for end_s in sorted(ends_s):
        attainment.finish(paced([], arrival_s=end_s, ttft_s=0.0), Slo(), 1, "default")
    now_s = max(ends_s, default=0.0) + late_s
    first = int(now_s) - WINDOW_S + 1
    assert attainment.snapshot(now_s)["window"]["finished"] == sum(e >= first for e in ends_s)


def test_an_end_that_has_left_the_window_is_counted_in_the_totals_only() -> None:
    attainment = Attainment(0.0)
    attainment.finish(paced([], arrival_s=70.0, ttft_s=0.0), Slo(), 1, "default")
    attainment.finish(paced([], arrival_s=10.0, ttft_s=0.0), Slo(), 1, "default")
    counts = attainment.snapshot(71.0)
    assert (counts["finished"], counts["window"]["finished"]) == (2, 1)
