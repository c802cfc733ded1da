"""Latencies: what a dispatcher asks, answered from an estimator and a guard.

A forecast is the solo prediction times the guard's factor for such work, times what the clock has
fallen by since that factor was seen. It costs two to three microseconds.
"""

from __future__ import annotations

from drift_scheduler.clock import ClockRatio, slowdown
from drift_scheduler.dispatcher import Forecast
from drift_scheduler.estimator import Estimator
from drift_scheduler.guard import Cell, Guard
from drift_scheduler.lane import Phase
from drift_scheduler.partition import Partition
from drift_scheduler.profile import Kind, PaddedSizes, Profile
from drift_scheduler.shapes import DecodeShape, PrefillShape
from drift_scheduler.timeline import LaneRun


class Latencies:
    """num_layers: of the model, to tell what part of a prefill a slice was.

    The clock is fed by its owner, with times of the same clock as the runs' spans; a forecast uses
    what it showed when the last run was observed.
    """

    def __init__(
        self,
        estimator: Estimator,
        guard: Guard,
        num_layers: int,
        clock: ClockRatio | None = None,
    ) -> None:
        if num_layers < 1:
            raise ValueError(f"num_layers={num_layers} must be at least 1")
        self.estimator = estimator
        self.guard = guard
        self._num_layers = num_layers
        self._clock = clock
        self._clock_mhz: float | None = None
        self._whole = (estimator.total_sms, estimator.total_sms, True)

    @classmethod
    def of(
        cls,
        profile: Profile,
        num_layers: int,
        *,
        sizes: PaddedSizes | None = None,
        clock: ClockRatio | None = None,
    ) -> Latencies:
        """sizes: of the engine that is to be forecast; None takes those of the one measured.

        Raises EstimatorError if the profile says nothing of a phase.
        """
        sizes = profile.sizes if sizes is None else sizes
        estimator = Estimator.fit(
            profile.samples,
            profile.key.sms,
            decode_sizes=sizes.decode,
            prefill_sizes=sizes.prefill,
        )
        # The cells of a guard that has served know the profile's samples too.
        guard = (
            Guard(profile.cells) if profile.cells else Guard.of_samples(estimator, profile.samples)
        )
        return cls(estimator, guard, num_layers, clock)

    def decode(
        self, shape: DecodeShape, partition: Partition, beside: PrefillShape | None
    ) -> Forecast:
        """One decode step, with such a prefill batch beside it, if any."""
        if beside is not None and not beside.tokens:
            beside = None
        cell = self.guard.cell(Kind.DECODE, _shares(partition), shape, beside)
        return self._forecast(self.estimator.decode_s(shape, partition.decode_sms), cell)

    def prefill(
        self, shape: PrefillShape, partition: Partition, beside: DecodeShape | None
    ) -> Forecast:
        """All layers of a prefill batch, with such decode steps beside them, if any."""
        if beside is not None and not beside.requests:
            beside = None
        cell = self.guard.cell(Kind.PREFILL, _shares(partition), beside, shape)
        return self._forecast(self.estimator.prefill_s(shape, partition.prefill_sms), cell)

    def fused(self, decode: DecodeShape, prefill: PrefillShape) -> Forecast:
        """A decode step in which prompt tokens ride, on the whole device."""
        cell = self.guard.cell(Kind.FUSED, self._whole, decode, prefill)
        return self._forecast(self.estimator.fused_s(decode, prefill), cell)

    def observe(self, run: LaneRun) -> None:
        """Refines the guard. A run that says nothing of such work is left out: one of no requests,
        or whose time or shapes are not known."""
        took_s = run.span.duration_s
        if not took_s > 0:
            return
        if self._clock is not None:
            self._clock_mhz = self._clock.at(run.span.end_s)
        decode, prefill = run.decode, run.prefill
        if decode is not None and not decode.requests:
            decode = None
        if prefill is not None and not prefill.tokens:
            prefill = None
        partition = run.partition
        shares = _shares(partition)
        if run.phase is Phase.PREFILL:
            if prefill is None or not run.layers:
                return
            kind = Kind.PREFILL
            solo_s = self.estimator.prefill_s(prefill, partition.prefill_sms)
            solo_s *= run.layers / self._num_layers
        elif run.fused_tokens:
            if prefill is None:
                return
            kind, shares = Kind.FUSED, self._whole
            decode = decode or DecodeShape(0, 0)
            solo_s = self.estimator.fused_s(decode, prefill)
        else:
            if decode is None:
                return
            kind = Kind.DECODE
            solo_s = self.estimator.decode_s(decode, partition.decode_sms)
        if solo_s > 0:
            self.guard.observe(kind, shares, decode, prefill, took_s / solo_s, self._clock_mhz)

    def _forecast(self, solo_s: float, cell: Cell) -> Forecast:
        now_mhz = self._clock_mhz
        expected_s = solo_s * cell.expected
        if now_mhz is not None:
            expected_s *= slowdown(cell.clock_mhz, now_mhz)
        return Forecast(expected_s, expected_s * cell.margin.factor)


def _shares(partition: Partition) -> tuple[int, int, bool]:
    """Equal to Split.of, and made in a third of the time."""
    return partition.prefill_sms, partition.decode_sms, partition.exclusive
