"""Guard: how much slower than predicted work runs at worst, learnt from what was seen.

Drift's contention guard keeps, for each cell of a grid of shapes and partitions, the largest
slowdown of decode beside prefill. This one keeps it for prefill too, and for work that runs alone
or fused, where it covers what the prediction is off by.

Sizes fall into buckets of powers of two. A cell holds the mean of recent ratios of what was seen
to the solo prediction, and all cells of one kind of work and partition share a margin on it:

expected    solo * the cell's mean
worst       solo * the cell's mean * the margin

A run that takes longer than the worst case raises the margin by RISE, every other one lowers it a
little. The two balance where OVERRUNS of all runs overrun, whatever their times are distributed
like and however that changes: adaptive conformal inference (Gibbs and Candes, NeurIPS 2021), here
in proportions. A single accident, a page fault or another process, moves the margin by RISE and no
more; to the mean a ratio beyond ABSURD times the worst case counts only if the next one of its cell
is as bad.

A cell that was not seen answers as the nearest one of its partition does, by the distance of the
buckets; failing that as the nearest one of any partition; failing that with a default. It begins
with that answer when it is first seen, as if it had been seen STAND_IN times.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from drift_scheduler.clock import slowdown
from drift_scheduler.estimator import Estimator
from drift_scheduler.profile import GuardCell, Kind, Sample, Split
from drift_scheduler.shapes import DecodeShape, PrefillShape

OVERRUNS = 0.004
RISE = 0.04
_FALL = 1 - RISE * OVERRUNS / (1 - OVERRUNS)
ABSURD = 1.5
# An older ratio's weight in `expected`, once there are enough.
RECALL = 1 / 32
STAND_IN = 2
# A sample of which only the median of several runs is known: single ones are slower.
OVER_A_MEDIAN = 1.05
# Of a profile's samples, by the first margin.
COVERED = 0.75

DEFAULT_BESIDE = 1.15
DEFAULT_MARGIN_BESIDE = 1.13
DEFAULT_MARGIN_ALONE = 1.05

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


class Margin:
    """By what factor a run may exceed what is expected of it."""

    __slots__ = ("factor",)

    def __init__(self, factor: float) -> None:
        self.factor = max(1.0, factor)

    def observe(self, ratio: float) -> None:
        """A run took `ratio` times as long as expected."""
        self.factor = max(1.0, self.factor * (1 + RISE if ratio > self.factor else _FALL))


class Cell:
    """What one bucket of shapes was seen to take, as factors on the solo prediction.

    clock_mhz: of the SMs meanwhile, if known; see clock.py.
    """

    __slots__ = ("_absurd", "clock_mhz", "expected", "margin", "observations")

    def __init__(
        self,
        expected: float,
        margin: Margin,
        observations: int = 0,
        clock_mhz: float | None = None,
    ) -> None:
        self.expected = expected
        self.margin = margin
        self.observations = observations
        self.clock_mhz = clock_mhz
        self._absurd: float | None = None  # the last ratio, if it was

    @property
    def worst(self) -> float:
        return self.expected * self.margin.factor

    def observe(self, ratio: float, clock_mhz: float | None) -> bool:
        """Whether the ratio exceeds the worst case, of which it is part from now on."""
        expected = self.expected * slowdown(self.clock_mhz, clock_mhz)
        worst = expected * self.margin.factor
        self.margin.observe(ratio / expected)
        if ratio > ABSURD * worst:
            before, self._absurd = self._absurd, ratio
            if before is not None:
                self._absurd = None
                self._refine(min(before, ratio), clock_mhz)
        else:
            self._absurd = None
            self._refine(ratio, clock_mhz)
        return ratio > worst

    def _refine(self, ratio: float, clock_mhz: float | None) -> None:
        weight = max(RECALL, 1 / (self.observations + 1))
        self.observations += 1
        self.expected += weight * (ratio - self.expected)
        if clock_mhz is not None:
            known = clock_mhz if self.clock_mhz is None else self.clock_mhz
            self.clock_mhz = known + weight * (clock_mhz - known)


class _Group:
    """The cells of one family and partition. margin: of all of them; None while there is none."""

    def __init__(self, split: Split) -> None:
        self.split = split
        self.cells: dict[_Buckets, Cell] = {}
        self.margin: Margin | None = None


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
            group.margin = group.margin or Margin(1.0)
            group.margin.factor = max(group.margin.factor, row.worst / row.expected)
            group.cells[_buckets_of(row)] = Cell(
                row.expected, group.margin, row.observations, row.clock_mhz
            )

    @classmethod
    def of_samples(cls, estimator: Estimator, samples: Iterable[Sample]) -> Guard:
        """A guard that has seen a profile's samples, alone and beside the other phase.

        A margin begins where it covers the slowest run of most of its samples, but not of the few
        that an accident befell.
        """
        guard = cls()
        over: dict[tuple[_Family, Split], list[float]] = {}
        seen: dict[tuple[_Family, Split, _Buckets], list[Sample]] = {}
        for sample in samples:
            family = _family(sample.kind, sample.decode, sample.prefill)
            key = (family, sample.partition, _buckets(sample.decode, sample.prefill))
            seen.setdefault(key, []).append(sample)
        for (family, split, buckets), found in seen.items():
            ratios = [sample.seconds / estimator.solo_s(sample) for sample in found]
            expected = sum(ratios) / len(ratios)
            over.setdefault((family, split), []).extend(
                ratio / expected * (s.slowest_s / s.seconds if s.slowest_s else OVER_A_MEDIAN)
                for ratio, s in zip(ratios, found, strict=True)
            )
            clocks = [sample.clock_mhz for sample in found if sample.clock_mhz is not None]
            clock_mhz = sum(clocks) / len(clocks) if clocks else None
            group = guard._group(family, split)
            group.margin = group.margin or Margin(1.0)
            group.cells[buckets] = Cell(expected, group.margin, len(found), clock_mhz)
        for (family, split), factors in over.items():
            margin = guard._group(family, split).margin
            assert margin is not None
            margin.factor = max(1.0, sorted(factors)[int(COVERED * len(factors))])
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
        family = _family(kind, decode, prefill)
        group = self._group(family, partition)
        buckets = _buckets(decode, prefill)
        if buckets not in group.cells:
            self._forget_answers(group, kind)
            group.margin = group.margin or Margin(cell.margin.factor)
            cell = Cell(cell.expected, group.margin, STAND_IN, cell.clock_mhz)
            group.cells[buckets] = cell
        self.overruns += cell.observe(ratio, clock_mhz)

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
                DEFAULT_BESIDE if beside else 1.0,
                Margin(DEFAULT_MARGIN_BESIDE if beside else DEFAULT_MARGIN_ALONE),
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
        distance = abs(t - tokens) + abs(c - cached)
        if distance > least:
            continue
        distance += abs(r - requests) + abs(x - context)
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
        clock_mhz=cell.clock_mhz,
    )
