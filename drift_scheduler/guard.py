"""Guard: how much slower than predicted work runs at worst, learnt from what was seen.

Drift's contention guard keeps, for each cell of a grid of shapes and partitions, the largest
slowdown of decode beside prefill. This one keeps it for prefill too, and for work that runs alone
or fused, where it covers what the prediction is off by.

Sizes fall into buckets of powers of two. A cell holds two factors on the solo prediction:

worst       A larger ratio raises it at once; it falls by a factor of FALL at an observation, and
            never below the largest of the last WINDOW to 2 * WINDOW observations. So, whatever
            the noise is like, the next one exceeds it with a chance of less than 1 / WINDOW
            while nothing changes. Time plays no part: what is not seen is not forgotten. In its
            first window a cell also stays some spreads above the mean.
expected    A mean of recent ratios.

A ratio of more than ABSURD times a cell's worst is taken for an accident (a page fault, another
process), and only believed when the next observation of the cell is as bad; then the smaller of
the two counts.

A cell that was not seen answers as the nearest one of its partition does, by the distance of the
buckets; failing that as the nearest one of any partition; failing that with a default. It begins
with that answer when it is first seen, and falls from there.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from drift_scheduler.clock import slowdown
from drift_scheduler.estimator import Estimator
from drift_scheduler.profile import GuardCell, Kind, Sample, Split
from drift_scheduler.shapes import DecodeShape, PrefillShape

WINDOW = 256
FALL = 0.999
ABSURD = 1.5
# Below 1 only as far as a prediction may be too long for a shape.
LEAST_WORST = 0.98
# An older ratio's weight in `expected`, once there are enough.
RECALL = 1 / 64
# Mean absolute deviations above the mean: of a normal distribution, one in 1,400 is beyond.
YOUNG_SPREADS = 4.0
ENOUGH_FOR_A_SPREAD = 8
# A profile's sample is the median of several runs: single ones are slower.
OVER_A_MEDIAN = 1.05

DEFAULT_WORST_BESIDE = 1.30
DEFAULT_EXPECTED_BESIDE = 1.15
DEFAULT_WORST_ALONE = 1.05
DEFAULT_EXPECTED_ALONE = 1.0

# Plain tuples, for they are made and hashed in every forecast. Buckets: tokens, cached tokens of a
# prompt, requests, context; -1 where there is no such phase.
_Buckets = tuple[int, int, int, int]
# Kind, whether beside the other phase.
_Family = tuple[Kind, bool]
# What a Split is equal to.
_Shares = tuple[int, int, bool]
# Whether something ran beside follows from the buckets.
_Question = tuple[Kind, _Shares, _Buckets]
_NOBODY = -1


class Cell:
    """What one bucket of shapes was seen to take, as factors on the solo prediction.

    worst_mhz, expected_mhz: the clock of the SMs when each was seen, if known; see clock.py.
    """

    __slots__ = (
        "_absurd",
        "_last_max",
        "_now_max",
        "_now_seen",
        "_spread",
        "expected",
        "expected_mhz",
        "observations",
        "worst",
        "worst_mhz",
    )

    def __init__(
        self,
        worst: float,
        expected: float,
        observations: int = 0,
        clock_mhz: float | None = None,
    ) -> None:
        self.worst = worst
        self.worst_mhz = clock_mhz
        self.expected = expected
        self.expected_mhz = clock_mhz
        self.observations = observations
        self._absurd: float | None = None  # the last ratio, if it was
        # Largest ratio of the window so far and of the one before, with their clocks.
        self._now_max: tuple[float, float | None] = (LEAST_WORST, clock_mhz)
        self._last_max: tuple[float, float | None] | None = None
        self._now_seen = 0
        self._spread = 0.0

    def observe(self, ratio: float, clock_mhz: float | None) -> None:
        if ratio > ABSURD * self.worst:
            before, self._absurd = self._absurd, ratio
            if before is None:
                return
            ratio = min(before, ratio)
        self._absurd = None
        self._refine_expected(ratio, clock_mhz)
        self._refine_worst(ratio, clock_mhz)

    def _refine_expected(self, ratio: float, clock_mhz: float | None) -> None:
        weight = max(RECALL, 1 / (self.observations + 1))
        self.observations += 1
        self.expected += weight * (ratio - self.expected)
        self._spread += weight * (abs(ratio - self.expected) - self._spread)
        if clock_mhz is not None:
            known = clock_mhz if self.expected_mhz is None else self.expected_mhz
            self.expected_mhz = known + weight * (clock_mhz - known)

    def _refine_worst(self, ratio: float, clock_mhz: float | None) -> None:
        if self.worst_mhz is None:
            self.worst_mhz = clock_mhz
        if ratio >= self._now_max[0]:
            self._now_max = (ratio, clock_mhz)
        candidates = [(self.worst * FALL, self.worst_mhz), self._now_max]
        if self._last_max is not None:
            candidates.append(self._last_max)
        elif self._now_seen >= ENOUGH_FOR_A_SPREAD:
            # A maximum of few says little.
            candidates.append((self.expected + YOUNG_SPREADS * self._spread, self.expected_mhz))
        self.worst, self.worst_mhz = max(candidates, key=_ratio)
        self._now_seen += 1
        if self._now_seen == WINDOW:
            self._last_max, self._now_max = self._now_max, (LEAST_WORST, clock_mhz)
            self._now_seen = 0


def _ratio(seen: tuple[float, float | None]) -> float:
    return seen[0]


class _Group:
    """The cells of one family and partition."""

    def __init__(self, split: Split) -> None:
        self.split = split
        self.cells: dict[_Buckets, Cell] = {}


class Guard:
    """Cells for all kinds of work and partitions. One thread uses it."""

    def __init__(self, cells: Iterable[GuardCell] = ()) -> None:
        self._families: dict[_Family, dict[_Shares, _Group]] = {}
        # Of what was asked for since a cell was last added, so that one look-up is enough.
        self._answers: dict[_Question, Cell] = {}
        self.observations = 0
        self.overruns = 0
        """Observations that took longer than the worst case at the time."""
        for row in cells:
            group = self._group(_family_of(row), row.partition)
            group.cells[_buckets_of(row)] = Cell(
                row.worst, row.expected, row.observations, row.clock_mhz
            )

    @classmethod
    def of_samples(cls, estimator: Estimator, samples: Iterable[Sample]) -> Guard:
        """A guard that has seen a profile's samples, alone and beside the other phase."""
        guard = cls()
        seen: dict[tuple[_Family, Split, _Buckets], list[tuple[float, float | None]]] = {}
        for sample in samples:
            ratio = sample.seconds / estimator.solo_s(sample)
            family = _family(sample.kind, sample.decode, sample.prefill)
            key = (family, sample.partition, _buckets(sample.decode, sample.prefill))
            seen.setdefault(key, []).append((ratio, sample.clock_mhz))
        for (family, split, buckets), found in seen.items():
            worst, clock_mhz = max(found, key=_ratio)
            expected = sum(ratio for ratio, _ in found) / len(found)
            worst = max(worst * OVER_A_MEDIAN, LEAST_WORST)
            cell = Cell(worst, expected, len(found), clock_mhz)
            guard._group(family, split).cells[buckets] = cell
        return guard

    def cell(
        self,
        kind: Kind,
        partition: _Shares,
        decode: DecodeShape | None,
        prefill: PrefillShape | None,
    ) -> Cell:
        """What is known of such work. To be read, not to be kept: a later one may differ.

        partition: a Split or its equal. With both shapes, other than for a fused step, the other
        phase runs beside it.
        """
        buckets = _buckets(decode, prefill)
        question = (kind, partition, buckets)
        answer = self._answers.get(question)
        if answer is None:
            group = self._group(_family(kind, decode, prefill), partition)
            answer = group.cells.get(buckets)
            if answer is None:
                answer = self._stand_in(_family(kind, decode, prefill), group, buckets)
            self._answers[question] = answer
        return answer

    def observe(
        self,
        kind: Kind,
        partition: _Shares,
        decode: DecodeShape | None,
        prefill: PrefillShape | None,
        ratio: float,
        clock_mhz: float | None = None,
    ) -> None:
        """Work took `ratio` times its solo prediction, with the SMs at clock_mhz, if known."""
        if not (math.isfinite(ratio) and ratio > 0):
            raise ValueError(f"ratio={ratio} must be positive and finite")
        cell = self.cell(kind, partition, decode, prefill)
        self.observations += 1
        self.overruns += ratio > cell.worst * slowdown(cell.worst_mhz, clock_mhz)
        family = _family(kind, decode, prefill)
        group = self._group(family, partition)
        buckets = _buckets(decode, prefill)
        if buckets not in group.cells:
            self._forget_answers(group, kind)
            cell = group.cells[buckets] = Cell(cell.worst, cell.expected, 0, cell.worst_mhz)
        cell.observe(ratio, clock_mhz)

    def rows(self) -> list[GuardCell]:
        """For a profile."""
        return [
            _row(family, group.split, buckets, cell)
            for family, groups in self._families.items()
            for group in groups.values()
            for buckets, cell in group.cells.items()
        ]

    def _group(self, family: _Family, partition: _Shares) -> _Group:
        groups = self._families.setdefault(family, {})
        group = groups.get(partition)
        if group is None:
            group = groups[partition] = _Group(Split(*partition))
        return group

    def _forget_answers(self, group: _Group, kind: Kind) -> None:
        """A cell is added to the group: it may be nearer than what stood in so far."""
        if not group.cells:
            self._answers.clear()
            return
        concerned = [q for q in self._answers if q[0] is kind and q[1] == group.split]
        for question in concerned:
            del self._answers[question]

    def _stand_in(self, family: _Family, group: _Group, buckets: _Buckets) -> Cell:
        cell = _nearest(group.cells, buckets)
        if cell is None:
            others = (other for other in self._families[family].values() if other.cells)
            other = min(others, key=lambda other: _apart(other.split, group.split), default=None)
            cell = _nearest(other.cells, buckets) if other else None
        if cell is None:
            beside = family[1]
            cell = Cell(
                DEFAULT_WORST_BESIDE if beside else DEFAULT_WORST_ALONE,
                DEFAULT_EXPECTED_BESIDE if beside else DEFAULT_EXPECTED_ALONE,
            )
        return cell


def _family(kind: Kind, decode: DecodeShape | None, prefill: PrefillShape | None) -> _Family:
    return kind, decode is not None and prefill is not None and kind is not Kind.FUSED


def _buckets(decode: DecodeShape | None, prefill: PrefillShape | None) -> _Buckets:
    if prefill is None:
        tokens = cached = _NOBODY
    else:
        tokens = prefill.tokens.bit_length()
        cached = (prefill.cross // (prefill.tokens or 1)).bit_length()
    if decode is None:
        return tokens, cached, _NOBODY, _NOBODY
    return tokens, cached, decode.requests.bit_length(), decode.context.bit_length()


def _nearest(cells: dict[_Buckets, Cell], buckets: _Buckets) -> Cell | None:
    """Of equally near ones the slower."""
    tokens, cached, requests, context = buckets
    nearest, least = None, math.inf
    # A plain loop: it may run often while a server meets its first shapes.
    for (t, c, r, x), cell in cells.items():
        distance = abs(t - tokens) + abs(c - cached) + abs(r - requests) + abs(x - context)
        nearer = distance < least
        if nearer or (distance == least and nearest is not None and cell.worst > nearest.worst):
            nearest, least = cell, distance
    return nearest


def _apart(a: Split, b: Split) -> float:
    return abs(math.log(a.prefill_sms / b.prefill_sms)) + abs(math.log(a.decode_sms / b.decode_sms))


def _family_of(row: GuardCell) -> _Family:
    beside = row.tokens is not None and row.requests is not None and row.kind is not Kind.FUSED
    return row.kind, beside


def _buckets_of(row: GuardCell) -> _Buckets:
    tokens, cached, requests, context = (
        _NOBODY if bucket is None else bucket
        for bucket in (row.tokens, row.cached, row.requests, row.context)
    )
    return tokens, cached, requests, context


def _row(family: _Family, split: Split, buckets: _Buckets, cell: Cell) -> GuardCell:
    tokens, cached, requests, context = (
        None if bucket == _NOBODY else bucket for bucket in buckets
    )
    return GuardCell(
        kind=family[0],
        partition=split,
        tokens=tokens,
        cached=cached,
        requests=requests,
        context=context,
        worst=cell.worst,
        expected=cell.expected,
        observations=cell.observations,
        clock_mhz=cell.worst_mhz,
    )
