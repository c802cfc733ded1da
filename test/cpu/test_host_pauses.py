from __future__ import annotations

import itertools
import os
from contextlib import closing

import pytest

from benchmark.host_pauses import PAUSE_S, SLEEP_S, HostWatch, Pauses, sleep_and_look, stolen_s


class FakeTime:
    """sleep() takes as long as asked, and so much longer."""

    def __init__(self, late_s):
        self.now_s = 100.0
        self._late_s = iter(late_s)

    def clock(self):
        return self.now_s

    def sleep(self, seconds):
        self.now_s += seconds + next(self._late_s)


def looks(late_s):
    late_s = list(late_s)
    time = FakeTime(late_s)
    asked = itertools.chain([False] * len(late_s), [True])
    return sleep_and_look(lambda: next(asked), time.clock, time.sleep)


def test_only_long_pauses_count():
    late_s = [0.0, 0.9 * PAUSE_S, 1.1 * PAUSE_S, 0.0, 0.02]
    assert looks(late_s).late_s == pytest.approx([1.1 * PAUSE_S, 0.02])


def test_as_json():
    assert Pauses().to_json() == {
        "over_5_ms": 0,
        "longest_ms": 0.0,
        "total_ms": 0.0,
        "stolen_ms": None,
    }
    assert Pauses([0.006, 0.02], stolen_s=0.5).to_json() == {
        "over_5_ms": 2,
        "longest_ms": 20.0,
        "total_ms": pytest.approx(26.0),
        "stolen_ms": 500.0,
    }


def test_stolen_time_is_the_kernels_count(tmp_path):
    (tmp_path / "stat").write_text(
        "cpu  441 0 610 60893 138 0 13 152 0 0\ncpu0 1 2 3 4 5 6 7 8 9 0\n"
    )
    assert stolen_s(tmp_path / "stat") == 152 / os.sysconf("SC_CLK_TCK")


def test_a_kernel_that_does_not_count_stolen_time(tmp_path):
    assert stolen_s(tmp_path / "stat") is None
    (tmp_path / "stat").write_text("cpu 1 2 3 4\n")
    assert stolen_s(tmp_path / "stat") is None


def test_time_between_two_sleeps_counts_too():
    """Who holds the processor may come between a sleep and the next one."""
    time = FakeTime([0.0] * 3)
    turn = itertools.count()

    def asked():
        number = next(turn)
        if number == 1:
            time.now_s += 0.05
        return number == 3

    assert sleep_and_look(asked, time.clock, time.sleep).late_s == pytest.approx([0.05])
    assert SLEEP_S < PAUSE_S


def test_the_process_answers_until_it_is_closed():
    with closing(HostWatch()) as host:
        first = host.take()
        assert isinstance(first, Pauses)
        assert all(late_s > PAUSE_S for late_s in first.late_s)
        second = host.take()
        assert isinstance(second, Pauses)
        assert (second.stolen_s is None) == (stolen_s() is None)
    assert host.take() is None
    host.close()
