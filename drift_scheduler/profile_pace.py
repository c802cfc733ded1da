"""How often each point of a profile is repeated, so that all of them fit in the time there is.

A few points are timed first, and what the others will take is guessed from them. Where time is
short repetitions go first, then the costliest points; and since a guess is a guess, the pace is
looked at again before every point.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

from drift_scheduler.profiler import DecodeBatch, Meter, Point, PrefillBatch, Repetitions

# From the pace we want down to the least that still says something.
PACES = (
    Repetitions(12, 3, settle_s=0.1),
    Repetitions(12, 2, settle_s=0.1),
    Repetitions(6, 1),
    Repetitions(3, 1),
)
PROBE = PACES[-1]
WARM_UP = 1
# Host work of a point beside its runs: placing the batch, launching, reading times.
OVERHEAD_S = 0.02
# Of a phase beside the other one, as a guess.
SLOWDOWN = 1.4
# No phase of a partition is left without a line to fit, however short the time.
KEPT_ALONE = 2
# What one probe may take, of the time there is; at least so long.
PROBE_SHARE = 0.03
PROBE_S = 1.0
# So many cached tokens are guessed, until they are timed, to double what a prompt's token takes.
DOUBLING_CACHED = 1024

B = TypeVar("B", DecodeBatch, PrefillBatch)


@dataclass(frozen=True, slots=True)
class Costs:
    """A rough guess at seconds: straight lines through a few probed points of the whole device.

    Prefill is taken to slow in proportion to the SMs it lacks; decode, which is bound by memory,
    with their root.
    """

    total_sms: int
    step_s: float
    step_request_s: float
    step_context_s: float
    prefill_s: float
    prefill_token_s: float
    prefill_pair_s: float

    @classmethod
    def probe(cls, meter: Meter, points: Sequence[Point], budget_s: float) -> Costs:
        """Times a few of the points that are of one phase alone on the whole device, small ones
        first, and larger ones only where one cannot take more than a little of budget_s. What was
        not timed is guessed to be dear."""
        whole = next(point.partition for point in points if point.partition.exclusive)
        mine = [point for point in points if point.partition == whole]
        decodes = [point.decode for point in mine if point.decode and not point.prefill]
        prefills = [point.prefill for point in mine if point.prefill and not point.decode]

        def step_s(batch: DecodeBatch) -> float:
            return meter.decode(whole, batch, PROBE.decode_steps).seconds

        def run_s(batch: PrefillBatch) -> float:
            return meter.prefill(whole, batch, PROBE.prefill_runs).seconds

        limit_s = max(PROBE_S, PROBE_SHARE * budget_s)
        steps_s = limit_s / (WARM_UP + PROBE.decode_steps)
        runs_s = limit_s / (WARM_UP + PROBE.prefill_runs)

        decodes.sort(key=lambda batch: (batch.shape.context, batch.requests))
        first = _Timed(decodes[0], _settled(step_s, decodes[0]))
        wider = sorted(
            (b for b in decodes if b.context_each <= first.batch.context_each),
            key=lambda batch: batch.requests,
        )
        widest = _climb(first, wider, lambda b: b.requests, step_s, steps_s)
        request_s = _slope(
            widest.seconds - first.seconds, widest.batch.requests - first.batch.requests
        )
        if widest is first:
            request_s = first.seconds / first.batch.requests
        heaviest = _climb(first, decodes, lambda b: b.shape.context, step_s, steps_s)
        rest_s = heaviest.seconds - first.seconds - request_s * heaviest.batch.requests
        context_s = _slope(rest_s, heaviest.batch.shape.context)
        if heaviest is first:
            context_s = first.seconds / first.batch.shape.context

        fresh = sorted((b for b in prefills if not b.cached), key=lambda b: b.shape.tokens)
        short = _Timed(fresh[0], _settled(run_s, fresh[0]))
        long = _climb(short, fresh, lambda b: b.shape.tokens, run_s, runs_s)
        tokens = short.batch.shape.tokens
        token_s = _slope(long.seconds - short.seconds, long.batch.shape.tokens - tokens)
        if long is short:
            token_s = short.seconds / tokens
        floor_s = max(0.0, short.seconds - token_s * tokens)
        pair_s = token_s / DOUBLING_CACHED
        behind = [
            b
            for b in prefills
            if floor_s + token_s * b.shape.tokens + pair_s * b.shape.cross <= runs_s
        ]
        farthest = max(behind, key=lambda b: b.shape.cross, default=short.batch)
        if farthest.shape.cross:
            far_s = run_s(farthest) - floor_s - token_s * farthest.shape.tokens
            pair_s = _slope(far_s, farthest.shape.cross)
        return cls(
            total_sms=whole.prefill_sms,
            step_s=first.seconds,
            step_request_s=request_s,
            step_context_s=context_s,
            prefill_s=floor_s,
            prefill_token_s=token_s,
            prefill_pair_s=pair_s,
        )

    def of(self, point: Point, repetitions: Repetitions) -> float:
        """Seconds that measuring the point will take."""
        decode_s, prefill_s = self._step_s(point), self._run_s(point)
        steps = WARM_UP + repetitions.decode_steps
        runs = WARM_UP + repetitions.prefill_runs
        if point.prefill and not point.side_by_side:
            again = repetitions.settled_runs(decode_s + prefill_s if point.fused else prefill_s)
            runs += WARM_UP + again if again else 0
        if point.fused:
            return OVERHEAD_S + runs * (decode_s + prefill_s)
        if point.side_by_side:
            # Both go on until both are measured; half a run more until both are under way.
            runs_s = max(steps * decode_s, (runs + 0.5) * prefill_s)
            return OVERHEAD_S + SLOWDOWN * runs_s
        return OVERHEAD_S + steps * decode_s + runs * prefill_s

    def _step_s(self, point: Point) -> float:
        batch = point.decode
        if batch is None:
            return 0.0
        shape = batch.shape
        whole_s = (
            self.step_s + self.step_request_s * shape.requests + self.step_context_s * shape.context
        )
        return whole_s * math.sqrt(self.total_sms / point.partition.decode_sms)

    def _run_s(self, point: Point) -> float:
        batch = point.prefill
        if batch is None:
            return 0.0
        shape = batch.shape
        whole_s = (
            self.prefill_s + self.prefill_token_s * shape.tokens + self.prefill_pair_s * shape.cross
        )
        return whole_s * self.total_sms / point.partition.prefill_sms


@dataclass(frozen=True, slots=True)
class Schedule:
    """Points in order, the pace to begin with, what that will take, and what there was no time
    for."""

    points: tuple[Point, ...]
    pace: int
    expected_s: float
    dropped: tuple[Point, ...] = ()

    @property
    def repetitions(self) -> Repetitions:
        return PACES[self.pace]

    def told(self) -> list[str]:
        """In words: what will be done, and what was given up for time. No line is a surprise
        afterwards."""
        lines = [f"{len(self.points)} points, {self.repetitions} each: {self.expected_s:.0f} s"]
        if self.pace:
            lines.append(f"Fewer repetitions than the {PACES[0]} wanted: time is short")
        if self.dropped:
            costliest = "; ".join(map(str, self.dropped[:3]))
            lines.append(
                f"No time for {len(self.dropped)} points, the costliest ones, among them: "
                f"{costliest}"
            )
        return lines


def schedule(points: Sequence[Point], costs: Costs, budget_s: float) -> Schedule:
    """The best pace at which all points fit in budget_s; at the slightest one the costliest
    points go until the rest fits, but for a few of each phase and partition."""
    for pace, repetitions in enumerate(PACES):
        expected_s = sum(costs.of(point, repetitions) for point in points)
        if expected_s <= budget_s:
            return Schedule(tuple(points), pace, expected_s)
    least = PACES[-1]
    left = Counter(_group(point) for point in points)
    dropped: list[Point] = []
    for point in sorted(points, key=lambda point: costs.of(point, least), reverse=True):
        if expected_s <= budget_s:
            break
        group = _group(point)
        if not _is_joint(point) and left[group] <= KEPT_ALONE:
            continue
        left[group] -= 1
        expected_s -= costs.of(point, least)
        dropped.append(point)
    gone = set(dropped)
    kept = tuple(point for point in points if point not in gone)
    return Schedule(kept, len(PACES) - 1, expected_s, tuple(dropped))


class Pacer:
    """Gives every point of a schedule, in order, its repetitions; never more than it began with.

    clock: seconds. What is left is guessed anew from how the guess did so far.
    """

    def __init__(
        self, schedule: Schedule, costs: Costs, budget_s: float, clock: Callable[[], float]
    ) -> None:
        self._costs = costs
        self._clock = clock
        self._pace = schedule.pace
        self._slightest = schedule.pace
        self._end_s = clock() + budget_s
        self._started_s = clock()
        self._guessed_s = 0.0
        # By pace: what the points from the n-th on take, as guessed.
        self._left_s = [
            list(
                itertools.accumulate(
                    (costs.of(point, repetitions) for point in reversed(schedule.points)),
                )
            )
            for repetitions in PACES
        ]

    def __call__(self, point: Point) -> Repetitions:
        now_s = self._clock()
        ratio = (now_s - self._started_s) / self._guessed_s if self._guessed_s else 1.0
        room_s = self._end_s - now_s
        pace = self._pace
        while pace < len(PACES) - 1 and self._left_s[pace][-1] * ratio > room_s:
            pace += 1
        for left_s in self._left_s:
            left_s.pop()
        self._slightest = max(self._slightest, pace)
        self._guessed_s += self._costs.of(point, PACES[pace])
        return PACES[pace]

    @property
    def slightest(self) -> Repetitions:
        """The fewest repetitions that a point got."""
        return PACES[self._slightest]


class _Timed(NamedTuple, Generic[B]):
    batch: B
    seconds: float


def _settled(seconds: Callable[[B], float], batch: B) -> float:
    """The first time that a phase runs at all, libraries get ready and memory is touched, which
    takes far longer than the work."""
    return min(seconds(batch), seconds(batch))


def _climb(
    first: _Timed[B],
    batches: Sequence[B],
    size: Callable[[B], int],
    seconds: Callable[[B], float],
    limit_s: float,
) -> _Timed[B]:
    """The largest batch that could be timed. Batches rise by size; the time of the next one is
    bounded by that of the last, in proportion."""
    last = first
    while True:
        room = limit_s / last.seconds * size(last.batch)
        higher = [b for b in batches if size(last.batch) < size(b) <= room]
        if not higher:
            return last
        last = _Timed(higher[-1], seconds(higher[-1]))


def _slope(rise: float, run: float) -> float:
    return max(0.0, rise) / run if run > 0 else 0.0


def _is_joint(point: Point) -> bool:
    return point.fused or point.side_by_side


def _group(point: Point) -> tuple[int, bool, bool]:
    return point.partition.index, point.decode is not None, point.prefill is not None
