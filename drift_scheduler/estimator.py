"""Estimator: how long each phase takes alone, fitted from a profile's samples.

The form is Drift's (equations 1 and 2), with n new and r cached tokens of each prompt:

    prefill   a*sum(n^2) + b*sum(n*r) + c*sum(n) + d     for each number of prefill SMs
    decode    a*context + b*requests + c                 for each number of decode SMs
    fused     the terms of both                          on the whole device

fitted per regime. Where the published predictor has three regimes of sum(n), each with its own c
and d, every two neighbouring sizes that were measured bound a regime here, and the pieces meet:

    prefill   a*sum(n^2) + h(n)*sum(r) + f(sum(n))
    decode    g(context) + f(requests)
    fused     a*sum(n^2) + h(n)*sum(r) + g(context) + f(requests + sum(n))

f, g and h are piecewise linear and never fall. That gives a short batch, which costs what its
weights do, its plateau, and a matrix product the slope of its kernel. h is what attending to one
cached token costs n new ones: reading its key where they are few, b*n where arithmetic binds. n is
the mean of a batch's prompts, and sum(r) the mean r, weighted by n, for each of them. No
coefficient is negative.

What is minimised is the relative error: the sum of (predicted / measured - 1)^2, plus a little for
each bend of a line, so that few samples give straight lines and many give knees. How much a bend
costs, and whether f counts in whole tiles of a matrix product and h in whole tiles of attention,
is decided by how well samples that were left out are predicted.

Sizes that are padded before they run (to those of CUDA graphs) are padded before they are looked
up.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from drift_scheduler.curves import (
    ATTENTION_TILES,
    DECODE_TILES,
    PREFILL_TILES,
    Curves,
    Point,
    fit_by_sms,
    refit_fused,
)
from drift_scheduler.profile import Kind, Sample, Split
from drift_scheduler.shapes import NOTHING_RUNNING, DecodeShape, PrefillShape

# Of a fit's sizes, how many are remembered.
KEPT_SIZES = 1024
_NO_PROMPTS = PrefillShape(0, 0, 0, requests=0)


class EstimatorError(ValueError):
    """The samples do not suffice."""


class Estimator:
    """Solo latencies in seconds. Make one with `fit`.

    At an SM count that was not measured, the two neighbours' predictions are mixed linearly in
    1/SMs. Work bound by arithmetic goes with 1/SMs, and work bound by bandwidth that has saturated
    does not change: of both, and of their sum, that is exact, and where one turns into the other
    it errs on the long side. Below the smallest measured count everything is scaled by 1/SMs,
    above the largest nothing gets faster.

    Predictions are plain float arithmetic: half a microsecond, twice that between SM counts; as
    much again where a size is new.
    """

    def __init__(
        self,
        decode: Mapping[int, Curves],
        prefill: Mapping[int, Curves],
        fused: Curves,
        decode_sizes: Sequence[int],
        prefill_sizes: Sequence[int],
        total_sms: int,
    ) -> None:
        self._decode = _BySms(decode, tuple(decode_sizes))
        self._prefill = _BySms(prefill, tuple(prefill_sizes))
        self._fused = _Fit(fused, tuple(prefill_sizes))
        self.total_sms = total_sms

    @classmethod
    def fit(
        cls,
        samples: Iterable[Sample],
        total_sms: int,
        *,
        decode_sizes: Sequence[int] = (),
        prefill_sizes: Sequence[int] = (),
    ) -> Estimator:
        """From samples taken alone; those beside the other phase are left to the guard.

        decode_sizes, prefill_sizes: see PaddedSizes. Without fused samples a fused step is taken to
        cost what a prefill of all its tokens does, and decode's g(context).

        Raises EstimatorError if a phase has no sample.
        """
        alone = [sample for sample in samples if not sample.beside]
        decode: dict[int, list[Point]] = {}
        prefill: dict[int, list[Point]] = {}
        fused: list[Point] = []
        for sample in alone:
            split = sample.partition
            running = sample.decode or NOTHING_RUNNING
            prompts = sample.prefill or _NO_PROMPTS
            size = running.requests + prompts.tokens
            if sample.kind is Kind.DECODE:
                size = _padded(decode_sizes, size)
            else:
                size = _padded(prefill_sizes, size)
            point = Point(size, running.context, prompts, sample.seconds)
            if sample.kind is Kind.DECODE:
                decode.setdefault(split.decode_sms, []).append(point)
            elif sample.kind is Kind.PREFILL:
                prefill.setdefault(split.prefill_sms, []).append(point)
            else:
                fused.append(point)
        for kind, found in (("decode", decode), ("prefill", prefill)):
            if not found:
                raise EstimatorError(
                    f"no {kind} sample taken alone among {len(alone)} such samples"
                )
        decode_fit = fit_by_sms(decode, DECODE_TILES, (1,))
        prefill_fit = fit_by_sms(prefill, PREFILL_TILES, ATTENTION_TILES)
        fused_fit = _nearest(prefill_fit, total_sms).with_context(_nearest(decode_fit, total_sms))
        if fused:
            fused_fit = refit_fused(fused, fused_fit)
        return cls(decode_fit, prefill_fit, fused_fit, decode_sizes, prefill_sizes, total_sms)

    def decode_s(self, shape: DecodeShape, sms: int) -> float:
        """One decode step on so many SMs."""
        return self._decode[sms].seconds(shape.requests, shape.context, _NO_PROMPTS)

    def prefill_s(self, shape: PrefillShape, sms: int) -> float:
        """All layers of a prefill batch on so many SMs."""
        return self._prefill[sms].seconds(shape.tokens, 0, shape)

    def fused_s(self, decode: DecodeShape, prefill: PrefillShape) -> float:
        """A decode step in which prompt tokens ride, on the whole device."""
        return self._fused.seconds(decode.requests + prefill.tokens, decode.context, prefill)

    def solo_s(self, sample: Sample) -> float:
        """What the work of a sample would take alone."""
        if sample.kind is Kind.DECODE:
            assert sample.decode is not None
            return self.decode_s(sample.decode, sample.partition.decode_sms)
        assert sample.prefill is not None
        if sample.kind is Kind.PREFILL:
            return self.prefill_s(sample.prefill, sample.partition.prefill_sms)
        assert sample.decode is not None
        return self.fused_s(sample.decode, sample.prefill)

    def errors(self, samples: Iterable[Sample]) -> ErrorTable:
        """Relative errors on samples taken alone, best on others than it was fitted on."""
        found: dict[tuple[Kind, Split], list[float]] = {}
        for sample in samples:
            if not sample.beside:
                error = abs(self.solo_s(sample) / sample.seconds - 1)
                found.setdefault((sample.kind, sample.partition), []).append(error)
        return ErrorTable(
            tuple(
                ErrorRow(kind, split, len(errors), sum(errors) / len(errors), max(errors))
                for (kind, split), errors in sorted(
                    found.items(), key=lambda item: (item[0][0].value, item[0][1])
                )
            )
        )


@dataclass(frozen=True, slots=True)
class ErrorRow:
    """Relative errors, 0.01 for 1 %."""

    kind: Kind
    partition: Split
    count: int
    mean: float
    worst: float


@dataclass(frozen=True, slots=True)
class ErrorTable:
    rows: tuple[ErrorRow, ...]

    def mean(self, kind: Kind) -> float:
        """Over all samples of a kind. ZeroDivisionError if there was none."""
        rows = [row for row in self.rows if row.kind is kind]
        return sum(row.mean * row.count for row in rows) / sum(row.count for row in rows)

    def worst(self, kind: Kind) -> float:
        return max((row.worst for row in self.rows if row.kind is kind), default=0.0)

    def __str__(self) -> str:
        lines = [f"{'kind':8} {'partition':10} {'samples':>7} {'mean':>7} {'worst':>7}"]
        lines += [
            f"{row.kind.value:8} {row.partition!s:10} {row.count:7} "
            f"{row.mean:7.1%} {row.worst:7.1%}"
            for row in self.rows
        ]
        return "\n".join(lines)


class _Fit:
    """A fit, of sizes that are padded before they run.

    What a size costs is kept, for sizes recur; a fit never changes.
    """

    def __init__(self, curves: Curves, sizes: Sequence[int]) -> None:
        self._curves = curves

        @lru_cache(maxsize=KEPT_SIZES)
        def of_size(size: int) -> float:
            return curves.seconds(_padded(sizes, size), 0, _NO_PROMPTS)

        self._of_size = of_size

    def seconds(self, size: int, context: int, prompts: PrefillShape) -> float:
        seconds = self._of_size(size)
        if context:
            seconds += self._curves.of_context(context)
        if prompts.tokens:
            seconds += self._curves.attention(prompts)
        return seconds


class _Mixture(NamedTuple):
    """So much of one fit and so much of another."""

    fewer: _Fit
    share: float
    more: _Fit
    rest: float

    def seconds(self, size: int, context: int, prompts: PrefillShape) -> float:
        seconds = self.share * self.fewer.seconds(size, context, prompts)
        if self.rest:
            seconds += self.rest * self.more.seconds(size, context, prompts)
        return seconds


class _BySms(dict[int, _Fit | _Mixture]):
    """Fits by SM count, and mixtures of two for the counts between, made when first asked for."""

    def __init__(self, fits: Mapping[int, Curves], sizes: Sequence[int]) -> None:
        self._fits = {sms: _Fit(fits[sms], sizes) for sms in sorted(fits)}
        self._counts = tuple(self._fits)
        super().__init__(self._fits)

    def __missing__(self, sms: int) -> _Mixture:
        self[sms] = mixture = self._mixture(sms)
        return mixture

    def _mixture(self, sms: int) -> _Mixture:
        if sms < 1:
            raise ValueError(f"sms={sms} must be at least 1")
        above = bisect_left(self._counts, sms)
        if above == 0:
            fit = self._fits[self._counts[0]]
            return _Mixture(fit, self._counts[0] / sms, fit, 0.0)
        if above == len(self._counts):
            fit = self._fits[self._counts[-1]]
            return _Mixture(fit, 1.0, fit, 0.0)
        fewer, more = self._counts[above - 1], self._counts[above]
        share = (1 / sms - 1 / more) / (1 / fewer - 1 / more)
        return _Mixture(self._fits[fewer], share, self._fits[more], 1 - share)


def _padded(sizes: Sequence[int], size: int) -> int:
    place = bisect_left(sizes, size)
    return sizes[place] if place < len(sizes) else size


def _nearest(fits: Mapping[int, Curves], sms: int) -> Curves:
    return fits[min(fits, key=lambda count: abs(count - sms))]
