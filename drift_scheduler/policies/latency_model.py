"""LatencyModel: what a policy asks about times. Latencies is the one that is fitted."""

from __future__ import annotations

from typing import Protocol

from drift_scheduler.dispatcher import Forecast
from drift_scheduler.partition import Partition
from drift_scheduler.shapes import DecodeShape, PrefillShape


class LatencyModel(Protocol):
    def decode(
        self, shape: DecodeShape, partition: Partition, beside: PrefillShape | None
    ) -> Forecast:
        """A decode step on the partition's decode SMs."""
        ...

    def prefill(
        self, shape: PrefillShape, partition: Partition, beside: DecodeShape | None
    ) -> Forecast:
        """All layers of a batch on the partition's prefill SMs."""
        ...

    def fused(self, decode: DecodeShape, prefill: PrefillShape) -> Forecast:
        """A decode step in which prompt tokens ride, on the whole device."""
        ...


class WithoutGuard:
    """Forecasts without the contention guard: the worst case is the expected one."""

    def __init__(self, model: LatencyModel) -> None:
        self._model = model

    def decode(
        self, shape: DecodeShape, partition: Partition, beside: PrefillShape | None
    ) -> Forecast:
        return _unguarded(self._model.decode(shape, partition, beside))

    def prefill(
        self, shape: PrefillShape, partition: Partition, beside: DecodeShape | None
    ) -> Forecast:
        return _unguarded(self._model.prefill(shape, partition, beside))

    def fused(self, decode: DecodeShape, prefill: PrefillShape) -> Forecast:
        return _unguarded(self._model.fused(decode, prefill))


def _unguarded(forecast: Forecast) -> Forecast:
    return Forecast(forecast.expected_s, forecast.expected_s)
