"""Replica: one simulated GPU; the gang that a server runs, between two events of its clock."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import NamedTuple

from drift_scheduler.dispatcher import Dispatcher
from drift_scheduler.gang import Gang
from drift_scheduler.host_delay import HostDelay
from drift_scheduler.lane import Span
from drift_scheduler.lane_virtual import VirtualClock, VirtualLanes
from drift_scheduler.partition import PartitionTable
from drift_scheduler.simulation.engine import EngineLimits, Listener, SimEngine
from drift_scheduler.simulation.jobs import SimPrefill, SimStep
from drift_scheduler.simulation.kv_pool import KvPool
from drift_scheduler.simulation.request import SimRequest
from drift_scheduler.simulation.times import LaunchTimes
from drift_scheduler.timeline import LaneRun, Timeline

# Runs of a phase kept to tell how long the phases overlap, more decode steps than fit beside one
# slice; a server keeps more, to be looked at.
TIMELINE_RUNS = 128


def _nothing(run: LaneRun) -> None:
    return None


class Driver(NamedTuple):
    """Who drives a replica. observe: sees every run as it is settled, to learn from it.
    host_delay: learns what the host adds; of the replica alone if left out."""

    dispatcher: Dispatcher
    observe: Callable[[LaneRun], None] = _nothing
    host_delay: HostDelay | None = None


class Replica:
    """cached, evicted: called with each prefix block that comes or goes. host_pauses: see
    ClusterSpec."""

    def __init__(
        self,
        driver: Driver,
        table: PartitionTable,
        limits: EngineLimits,
        times: LaunchTimes,
        listener: Listener,
        *,
        cached: Callable[[int], None],
        evicted: Callable[[int], None],
        host_pauses: Sequence[Span] = (),
    ) -> None:
        self._clock = VirtualClock()
        self._lanes = VirtualLanes(table, self._clock)
        self.timeline = Timeline(TIMELINE_RUNS)
        self.pool = KvPool(limits.kv_tokens, cached, evicted, limits.block_tokens)
        self.engine = SimEngine(limits, times, self.pool, self._clock, listener)
        self._gang: Gang[SimPrefill, SimStep] = Gang(
            self.engine,
            self._lanes,
            driver.dispatcher,
            self.timeline,
            self._clock,
            driver.observe,
            driver.host_delay,
        )
        self._host_pauses = host_pauses
        self._pauses_begin_s = [pause.start_s for pause in host_pauses]
        self.next_s = math.inf
        """When it is to be woken; infinity if nothing will happen of itself."""

    @property
    def now_s(self) -> float:
        return self._clock.now_s

    def add(self, request: SimRequest, now_s: float) -> None:
        """A request comes; the host takes note when its launches are done."""
        self._advance_to(now_s)
        self.engine.add(request)
        self._turn()

    def wake(self, now_s: float) -> None:
        """Does what can be done at this time."""
        self._advance_to(now_s)
        self._turn()

    def _advance_to(self, now_s: float) -> None:
        now_s = max(now_s, self._clock.now_s)
        begun = bisect_right(self._pauses_begin_s, now_s)
        if begun:
            now_s = max(now_s, self._host_pauses[begun - 1].end_s)
        self._clock.advance_to(now_s)

    def _turn(self) -> None:
        gang = self._gang
        progressed = True
        while progressed:
            progressed = gang.turn()
            # What ends meanwhile is only noticed afterwards.
            self._advance_to(self._clock.now_s + self.engine.take_host_s())
            self.engine.send()
        completion_s = self._lanes.next_completion_s()
        self.next_s = math.inf if completion_s is None else completion_s
        again_s = gang.look_again_s
        if again_s is not None and self._clock.now_s < again_s < self.next_s:
            self.next_s = again_s
