"""Cluster: many replicas in one process, event by event; a replica costs only while it works."""

from __future__ import annotations

import functools
import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from drift_scheduler.lane import Phase, Span
from drift_scheduler.partition import PartitionTable
from drift_scheduler.policies.latency_model import LatencyModel
from drift_scheduler.simulation.engine import EngineLimits
from drift_scheduler.simulation.replica import Driver, Replica
from drift_scheduler.simulation.request import SimRequest
from drift_scheduler.simulation.results import Ledger, Summary, Work
from drift_scheduler.simulation.routing import Router
from drift_scheduler.simulation.times import LaunchTimes, Noise
from drift_scheduler.simulation.trace import TraceRequest
from drift_scheduler.slo import Slo

# Nobody has finished for so long, though nobody comes any more: nobody will.
STALL_S = 3600.0


class SimulationStuckError(RuntimeError):
    """Requests wait and nothing will run: a fault of the policy or of the simulation."""


@dataclass(frozen=True, slots=True)
class ClusterSpec:
    """What is simulated. model: of the times that launches take. route_slack_tokens: see Router.

    noise_sigma: see Noise; each replica draws its own, from the seed. head_s: see LaunchTimes.
    host_pauses: when no host does anything, though its device does; one behind the other.
    """

    replicas: int
    table: PartitionTable
    model: LatencyModel
    num_layers: int
    limits: EngineLimits
    route_slack_tokens: int = 16384
    noise_sigma: float = 0.0
    head_s: float = 0.0
    seed: int = 0
    host_pauses: tuple[Span, ...] = ()


class Cluster:
    """One run of one trace. make_driver: called for each replica."""

    def __init__(self, spec: ClusterSpec, make_driver: Callable[[], Driver]) -> None:
        self.ledger = Ledger()
        self._router = Router(spec.replicas, spec.route_slack_tokens)
        self.replicas = [
            Replica(
                make_driver(),
                spec.table,
                spec.limits,
                LaunchTimes(
                    spec.model,
                    spec.num_layers,
                    # A seed of each replica's own, other ones for another seed.
                    Noise(spec.noise_sigma, spec.seed * spec.replicas + index),
                    head_s=spec.head_s,
                ),
                self.ledger,
                cached=functools.partial(self._router.cached, index),
                evicted=functools.partial(self._router.evicted, index),
                host_pauses=spec.host_pauses,
            )
            for index in range(spec.replicas)
        ]
        # (when, which); an entry whose time is not the replica's next_s any more is void.
        self._events: list[tuple[float, int]] = []

    def run(self, requests: Sequence[TraceRequest], slo: Slo, until_s: float = math.inf) -> Summary:
        """Until every request has ended, or until_s, when nobody waits for answers any more.

        until_s: not before the last arrival. Raises SimulationStuckError if requests will never
        end.
        """
        digits = len(str(len(requests)))
        for number, request in enumerate(sorted(requests, key=lambda r: r.arrival_s)):
            now_s = request.arrival_s
            self._run_until(now_s)
            index = self._router.choose(request.blocks)
            self.replicas[index].add(SimRequest(f"{number:0{digits}}", request, slo), now_s)
            self._note(index)
        last_arrival_s = max((request.arrival_s for request in requests), default=0.0)
        assert until_s >= last_arrival_s, f"until {until_s} s, arrivals until {last_arrival_s} s"
        while self.ledger.ended < len(requests):
            if self._events and self._events[0][0] > until_s:
                return self.ledger.summary(len(self.replicas), self._work(), len(requests), until_s)
            still_s = max(self.ledger.last_end_s, last_arrival_s)
            if not self._events or self._events[0][0] > still_s + STALL_S:
                raise SimulationStuckError(
                    f"{len(requests) - self.ledger.ended} of {len(requests)} requests will never "
                    f"end: nothing has happened since {still_s:.3f} s"
                )
            self._step()
        return self.ledger.summary(
            len(self.replicas), self._work(), len(requests), self.ledger.last_end_s
        )

    def _run_until(self, time_s: float) -> None:
        while self._events and self._events[0][0] <= time_s:
            self._step()

    def _step(self) -> None:
        when_s, index = heapq.heappop(self._events)
        replica = self.replicas[index]
        if when_s == replica.next_s:
            replica.wake(when_s)
            self._note(index)

    def _note(self, index: int) -> None:
        replica = self.replicas[index]
        engine = replica.engine
        self._router.load(index, engine.tokens_to_fill, engine.unfinished)
        if replica.next_s < math.inf:
            heapq.heappush(self._events, (replica.next_s, index))

    def _work(self) -> Work:
        timelines = [replica.timeline for replica in self.replicas]
        engines = [replica.engine for replica in self.replicas]
        return Work(
            prefill_s=sum(timeline.busy_s(Phase.PREFILL) for timeline in timelines),
            decode_s=sum(timeline.busy_s(Phase.DECODE) for timeline in timelines),
            both_s=sum(timeline.both_busy_s for timeline in timelines),
            fused_s=sum(timeline.fused_busy_s for timeline in timelines),
            preemptions=sum(engine.preemptions for engine in engines),
            retractions=sum(engine.retractions for engine in engines),
        )
