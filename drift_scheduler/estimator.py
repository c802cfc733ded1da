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

    Predictions are plain float arithmetic: about a microsecond, two between SM counts.
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
        self._decode = _BySms(decode)
        self._prefill = _BySms(prefill)
        self._fused = fused
        self._decode_sizes = tuple(decode_sizes)
        self._prefill_sizes = tuple(prefill_sizes)
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
        size = _padded(self._decode_sizes, shape.requests)
        return self._decode.seconds(sms, size, shape.context, _NO_PROMPTS)

    def prefill_s(self, shape: PrefillShape, sms: int) -> float:
        """All layers of a prefill batch on so many SMs."""
        size = _padded(self._prefill_sizes, shape.tokens)
        return self._prefill.seconds(sms, size, 0, shape)

    def fused_s(self, decode: DecodeShape, prefill: PrefillShape) -> float:
        """A decode step in which prompt tokens ride, on the whole device."""
        size = _padded(self._prefill_sizes, decode.requests + prefill.tokens)
        return self._fused.seconds(size, decode.context, prefill)

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


class _BySms:
    """Fits by SM count, and mixtures of two for the counts between."""

    def __init__(self, fits: Mapping[int, Curves]) -> None:
        self._fits = dict(sorted(fits.items()))
        self._counts = tuple(self._fits)
        self._mixed: dict[int, tuple[Curves, float, Curves, float]] = {}

    def seconds(self, sms: int, size: int, context: int, prompts: PrefillShape) -> float:
        fit = self._fits.get(sms)
        if fit is not None:
            return fit.seconds(size, context, prompts)
        mixed = self._mixed.get(sms)
        if mixed is None:
            mixed = self._mixed[sms] = self._mixture(sms)
        fewer, share, more, rest = mixed
        seconds = share * fewer.seconds(size, context, prompts)
        if rest:
            seconds += rest * more.seconds(size, context, prompts)
        return seconds

    def _mixture(self, sms: int) -> tuple[Curves, float, Curves, float]:
        if sms < 1:
            raise ValueError(f"sms={sms} must be at least 1")
        above = bisect_left(self._counts, sms)
        if above == 0:
            fit = self._fits[self._counts[0]]
            return fit, self._counts[0] / sms, fit, 0.0
        if above == len(self._counts):
            fit = self._fits[self._counts[-1]]
            return fit, 1.0, fit, 0.0
        fewer, more = self._counts[above - 1], self._counts[above]
        share = (1 / sms - 1 / more) / (1 / fewer - 1 / more)
        return self._fits[fewer], share, self._fits[more], 1 - share


def _padded(sizes: Sequence[int], size: int) -> int:
    place = bisect_left(sizes, size)
    return sizes[place] if place < len(sizes) else size


def _nearest(fits: Mapping[int, Curves], sms: int) -> Curves:
    return fits[min(fits, key=lambda count: abs(count - sms))]
