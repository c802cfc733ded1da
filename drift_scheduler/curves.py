"""Curves: latencies at one number of SMs and how they are fitted; estimator.py has the form."""

from __future__ import annotations

import itertools
import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from drift_scheduler.nnls import Array, nnls
from drift_scheduler.shapes import PrefillShape

# With fewer samples than this at an SM count, another count's fit is scaled to them.
_ENOUGH_SAMPLES = 4
_FOLDS = 6
# What a bend costs, against a squared relative error: a straight line from few or noisy samples,
# or one that follows every knee.
_STIFFNESS = (3e-4, 3e-3, 3e-2)
# The same of h; the last leaves it straight.
_ATTENTION_STIFFNESS = (3e-4, 3e-3, 3e-2, 1e3)
# A causal prompt attends to half of its own square: how firmly a is held near half of h's last
# slope. Prompts run alone do not tell a from f, for their squares follow from their sizes.
_CAUSAL = 1e-2
# Errors that differ by no more, relatively, are the same.
_ALIKE = 1e-6
# How firmly fused steps are held to what decode and prefill cost.
_KNOWN = 1e-2
# What any work takes at least, of the shortest sample.
_LEAST = 0.01
# Distinct contexts from which g gets a knee.
_CONTEXTS_FOR_A_KNEE = 8


class Point(NamedTuple):
    """A sample as the fit sees it. size: requests and new tokens, padded."""

    size: int
    context: int
    prompts: PrefillShape
    seconds: float


@dataclass(frozen=True, slots=True)
class Tiles:
    """Sizes in whole tiles: the next of `small`, and beyond them the next multiple."""

    small: tuple[int, ...]
    multiple: int

    def whole(self, size: int) -> int:
        if self.small and size <= self.small[-1]:
            return self.small[bisect_left(self.small, size)]
        return -(-size // self.multiple) * self.multiple


_EXACT = Tiles((), 1)
# The rows that kernels of matrix products take at once: fewer where there are few.
_ROWS = Tiles((16, 32, 64, 128), 128)
DECODE_TILES = (_EXACT, _ROWS)
PREFILL_TILES = (_EXACT, Tiles((), 64), _ROWS)
ATTENTION_TILES = (1, 64, 128)


class _Setting(NamedTuple):
    """What the samples themselves choose: see _setting."""

    tiles: Tiles
    attention_tile: int
    stiffness: float
    attention_stiffness: float


@dataclass(frozen=True, slots=True)
class Line:
    """Piecewise linear: values at the knots, flat before the first, slopes behind each."""

    knots: tuple[float, ...]
    values: tuple[float, ...]
    slopes: tuple[float, ...]

    def __call__(self, x: float) -> float:
        piece = bisect_right(self.knots, x) - 1
        if piece < 0:
            return self.values[0]
        return self.values[piece] + self.slopes[piece] * (x - self.knots[piece])

    def raised(self, constant: float, slope: float = 0.0) -> Line:
        """This line plus another."""
        return Line(
            self.knots,
            tuple(v + constant + slope * x for x, v in zip(self.knots, self.values, strict=True)),
            tuple(own + slope for own in self.slopes),
        )

    def scaled(self, factor: float) -> Line:
        return Line(
            self.knots,
            tuple(value * factor for value in self.values),
            tuple(slope * factor for slope in self.slopes),
        )


@dataclass(frozen=True, slots=True)
class Curves:
    """The fit at one SM count."""

    tiles: Tiles
    attention_tile: int
    of_size: Line
    of_context: Line
    of_new: Line
    per_square: float

    def seconds(self, size: int, context: int, prompts: PrefillShape) -> float:
        seconds = self.of_size(self.tiles.whole(size))
        if context:
            seconds += self.of_context(context)
        if prompts.tokens:
            seconds += self.attention(prompts)
        return seconds

    def attention(self, prompts: PrefillShape) -> float:
        seconds = self.per_square * prompts.squares
        if prompts.cross:
            new, reused = _behind_cached(prompts, self.attention_tile)
            seconds += self.of_new(new) * reused
        return seconds

    def scaled(self, factor: float) -> Curves:
        return replace(
            self,
            of_size=self.of_size.scaled(factor),
            of_context=self.of_context.scaled(factor),
            of_new=self.of_new.scaled(factor),
            per_square=self.per_square * factor,
        )

    def with_context(self, other: Curves) -> Curves:
        """This fit with the other one's g(context)."""
        return replace(self, of_context=other.of_context)


def _behind_cached(prompts: PrefillShape, tile: int) -> tuple[int, float]:
    """(n in whole tiles, sum(r)), with n the mean of the prompts and sum(r) as far as the sums of
    a batch tell."""
    if not prompts.cross:
        return 0, 0.0
    reused = prompts.cross / prompts.tokens * prompts.requests
    return -(-prompts.tokens // (prompts.requests * tile)) * tile, reused


def fit_by_sms(
    points: Mapping[int, Sequence[Point]],
    tiles: Sequence[Tiles],
    attention_tiles: Sequence[int],
) -> dict[int, Curves]:
    """A fit for every SM count. The setting is chosen for all of them together, for tiles
    belong to the kernels; one count alone has too few samples to tell."""
    ample = {sms: rows for sms, rows in points.items() if len(rows) >= _ENOUGH_SAMPLES}
    if not ample:
        richest = max(points, key=lambda sms: len(points[sms]))
        ample = {richest: points[richest]}
    setting = _setting(ample.values(), tiles, attention_tiles)
    fits = {sms: _fit(rows, setting) for sms, rows in ample.items()}
    for sms, rows in points.items():
        if sms not in fits:
            model = fits[min(ample, key=lambda count: abs(math.log(count / sms)))]
            off = [math.log(point.seconds / model.seconds(*point[:3])) for point in rows]
            fits[sms] = model.scaled(math.exp(sum(off) / len(off)))
    return fits


def refit_fused(fused: Sequence[Point], known: Curves) -> Curves:
    """A fit of fused steps, which run the kernels of prefill and decode: f, g and the attention of
    prompts each by a factor near 1, and a constant and a cost of each row beside them. Few samples
    suffice, and sizes between them keep their steps."""
    seconds = np.array([point.seconds for point in fused])
    columns = [
        (
            known.of_size(known.tiles.whole(point.size)),
            known.of_context(point.context),
            known.attention(point.prompts),
            1.0,
            float(point.size),
        )
        for point in fused
    ]
    rows = np.array(columns) / seconds[:, None]
    held = math.sqrt(_KNOWN) * np.diag(rows.max(axis=0))
    near = np.array([1.0, 1.0, 1.0, 0.0, 0.0])
    by_size, by_context, by_attention, constant, per_row = (
        float(value)
        for value in nnls(
            np.vstack([rows, held]), np.concatenate([np.ones(len(fused)), held @ near])
        )
    )
    return replace(
        known,
        of_size=known.of_size.scaled(by_size).raised(constant, per_row),
        of_context=known.of_context.scaled(by_context),
        of_new=known.of_new.scaled(by_attention),
        per_square=known.per_square * by_attention,
    )


def _setting(
    groups: Collection[Sequence[Point]], tiles: Sequence[Tiles], attention_tiles: Sequence[int]
) -> _Setting:
    """The tiles, then how stiff lines are, with the least error on points left out; the plainest
    where there are too few."""
    testable = [points for points in groups if len(points) >= 2 * _FOLDS]
    if not testable:
        return _Setting(_EXACT, 1, max(_STIFFNESS), max(_ATTENTION_STIFFNESS))

    def error(setting: _Setting) -> float:
        return _left_out_error(testable, setting)

    middle = sorted(_STIFFNESS)[len(_STIFFNESS) // 2]
    pairs = itertools.product(tiles, attention_tiles)
    # A line that may bend hides which tiles it is counted in.
    straight = max(_ATTENTION_STIFFNESS)
    best = _first_of_the_best(
        [_Setting(rows, tile, middle, straight) for rows, tile in pairs], error
    )
    best = _first_of_the_best([best._replace(stiffness=s) for s in _STIFFNESS], error)
    if len(attention_tiles) == 1:
        return best
    return _first_of_the_best(
        [best._replace(attention_stiffness=s) for s in _ATTENTION_STIFFNESS], error
    )


def _first_of_the_best(
    settings: Sequence[_Setting], error: Callable[[_Setting], float]
) -> _Setting:
    """Where samples do not tell two settings apart, how a processor rounds must not decide."""
    errors = [error(setting) for setting in settings]
    alike = min(errors) * (1 + _ALIKE)
    return next(s for s, found in zip(settings, errors, strict=True) if found <= alike)


def _left_out_error(groups: Iterable[Sequence[Point]], setting: _Setting) -> float:
    """Mean relative error on points that were left out of the fit, in turn."""
    errors = []
    for points in groups:
        ordered = sorted(points, key=lambda point: (point.size, point.seconds))
        for fold in range(_FOLDS):
            kept = [point for place, point in enumerate(ordered) if place % _FOLDS != fold]
            fit = _fit(kept, setting)
            errors += [
                abs(fit.seconds(*point[:3]) / point.seconds - 1) for point in ordered[fold::_FOLDS]
            ]
    return sum(errors) / len(errors)


def _fit(points: Sequence[Point], setting: _Setting) -> Curves:
    tiles, tile, stiffness, attention_stiffness = setting
    seconds = np.array([point.seconds for point in points])
    sizes = np.array([tiles.whole(point.size) for point in points], dtype=float)
    contexts = np.array([point.context for point in points], dtype=float)
    squares = np.array([point.prompts.squares for point in points], dtype=float)
    cached = np.array([_behind_cached(point.prompts, tile) for point in points], dtype=float)
    new, reused = cached[:, 0], cached[:, 1]
    behind = reused > 0
    size_knots = np.unique(sizes)
    context_knots = _context_knots(contexts)
    # Fewer tokens than were measured cost what the line goes down to at a single tile.
    new_knots = np.unique([float(tile), *new[behind]])
    size_columns = _pieces(size_knots, sizes)
    context_columns = _pieces(context_knots, contexts)[:, 1:]
    new_columns = _pieces(new_knots, new) * reused[:, None]
    columns = np.hstack([size_columns, context_columns, new_columns, squares[:, None]])
    rows = columns / seconds[:, None]
    width = rows.shape[1]
    at_context = size_columns.shape[1]
    at_new = at_context + context_columns.shape[1]
    per_token = np.divide(seconds, reused, out=np.ones_like(seconds), where=behind)
    extra = [
        *_bends(size_knots, sizes, seconds, 1, width, stiffness),
        *_bends(context_knots, contexts, seconds, at_context, width, stiffness),
        *_bends(new_knots, new[behind], per_token[behind], at_new + 1, width, attention_stiffness),
    ]
    causal = np.zeros(width)
    causal[-2:] = np.array([-1.0, 2.0]) * rows[:, -1].max()
    extra.append(causal * math.sqrt(_CAUSAL))
    # Something is left for a batch of next to nothing: no forecast is 0.
    least_s = _LEAST * float(seconds.min())
    target = np.concatenate([1 - least_s / seconds, np.zeros(len(extra))])
    found = nnls(np.vstack([rows, *extra]), target)
    return Curves(
        tiles,
        tile,
        of_size=_line(size_knots, found[:at_context]).raised(least_s),
        of_context=_line(context_knots, np.concatenate([[0.0], found[at_context:at_new]])),
        of_new=_line(new_knots, found[at_new:-1]),
        per_square=float(found[-1]),
    )


def _context_knots(contexts: Array) -> Array:
    """Where g may bend: 0, which costs nothing, and a median where there are contexts enough."""
    distinct = np.unique(contexts[contexts > 0])
    if not len(distinct):
        return np.array([0.0, 1.0])
    if len(distinct) < _CONTEXTS_FOR_A_KNEE:
        return np.array([0.0, distinct[-1]])
    return np.array([0.0, float(np.median(distinct)), distinct[-1]])


def _pieces(knots: Array, x: Array) -> Array:
    """Columns whose non-negative sums are the lines that never fall: 1, then for each two
    neighbouring knots how far x has come between them; the last goes on beyond.

    With one knot the only column is proportional beyond it: the longest that a single
    measurement can mean.
    """
    if len(knots) == 1:
        only: Array = np.maximum(x, knots[0]) / max(knots[0], 1.0)
        return only[:, None]
    columns = [np.ones_like(x)]
    last = len(knots) - 2
    for piece in range(last + 1):
        length = knots[piece + 1] - knots[piece]
        gone = np.maximum(x - knots[piece], 0.0)
        columns.append(gone if piece == last else np.minimum(gone, length))
    return np.stack(columns, axis=1)


def _line(knots: Array, coefficients: Array) -> Line:
    """From the coefficients of _pieces."""
    if len(knots) == 1:
        value = float(coefficients[0])
        return Line((float(knots[0]),), (value,), (value / max(float(knots[0]), 1.0),))
    slopes = [float(slope) for slope in coefficients[1:]]
    values = [float(coefficients[0])]
    for slope, length in zip(slopes, np.diff(knots), strict=True):
        values.append(values[-1] + slope * float(length))
    return Line(tuple(map(float, knots)), tuple(values), (*slopes, slopes[-1]))


def _bends(
    knots: Array, x: Array, seconds: Array, first: int, width: int, stiffness: float
) -> list[Array]:
    """A row for each inner knot: its bend over the shorter of the two pieces, against the time
    there. first: the column of the first piece's slope, of `width` in all."""
    rows = []
    for knot in range(1, len(knots) - 1):
        before, after = np.diff(knots[knot - 1 : knot + 2])
        there = float(seconds[np.argmin(np.abs(x - knots[knot]))])
        weight = math.sqrt(stiffness) * min(before, after) / there
        row = np.zeros(width)
        row[first + knot - 1], row[first + knot] = -weight, weight
        rows.append(row)
    return rows
