from __future__ import annotations

import gc

from drift_scheduler.lane_virtual import VirtualClock
from sglang.srt.managers.cycle_collector import IDLE_S, LONGEST_S, CycleCollector, undisturbed


class Bench:
    def __init__(self) -> None:
        self.clock = VirtualClock()
        self.at_s: list[float] = []
        self.collector = CycleCollector(
            collect=lambda: self.at_s.append(self.clock.now_s), clock=self.clock
        )

    def idle(self, until_s: float) -> None:
        while self.clock.now_s < until_s:
            self.collector.idle()
            self.clock.advance_to(self.clock.now_s + 0.25)

    def busy(self, until_s: float) -> None:
        while self.clock.now_s < until_s:
            self.collector.busy()
            self.clock.advance_to(self.clock.now_s + 0.25)


def test_a_server_that_has_done_nothing_has_nothing_to_collect():
    bench = Bench()
    bench.idle(2 * LONGEST_S)
    assert bench.at_s == []


def test_once_after_each_time_of_work_when_it_is_quiet():
    bench = Bench()
    bench.busy(10.0)
    bench.idle(30.0)
    bench.busy(40.0)
    bench.idle(60.0)
    assert bench.at_s == [10.0 + IDLE_S, 40.0 + IDLE_S]


def test_a_short_pause_between_requests_is_left_alone():
    bench = Bench()
    for start_s in range(0, 100, 2):
        bench.busy(start_s + 1.25)
        bench.idle(start_s + 2.0)
    assert bench.at_s == []


def test_under_load_without_a_pause_it_is_done_at_last():
    bench = Bench()
    bench.busy(2.5 * LONGEST_S)
    assert bench.at_s == [LONGEST_S, 2 * LONGEST_S]


def test_undisturbed_and_as_it_was_behind():
    was = gc.isenabled(), gc.get_freeze_count()
    with undisturbed():
        assert not gc.isenabled()
        assert gc.get_freeze_count() > was[1]
    assert (gc.isenabled(), gc.get_freeze_count()) == was
