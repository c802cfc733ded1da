"""LaunchTimes: how long simulated launches take on the device, and the host."""

from __future__ import annotations

import random
from dataclasses import dataclass

from drift_scheduler.lane import Lane
from drift_scheduler.policies.latency_model import LatencyModel
from drift_scheduler.shapes import DecodeShape, PrefillShape


@dataclass(frozen=True, slots=True)
class Noise:
    """Each launch takes its expected time times exp(N(0, sigma)); sigma 0 leaves it as it is."""

    sigma: float
    seed: int


class LaunchTimes:
    """Expected times of a latency model for what is launched, given what runs beside it then.

    A launch that is already under way is not slowed when something starts beside it later, nor
    sped up when that ends.
    """

    def __init__(self, model: LatencyModel, num_layers: int, noise: Noise | None = None) -> None:
        self.num_layers = num_layers
        self._model = model
        self._sigma = noise.sigma if noise else 0.0
        self._random = random.Random(noise.seed if noise else 0)

    def step_s(self, shape: DecodeShape, lane: Lane, beside: PrefillShape | None) -> float:
        split = not lane.partition.exclusive
        forecast = self._model.decode(shape, lane.partition, beside if split else None)
        return self._noisy(forecast.expected_s)

    def fused_s(self, shape: DecodeShape, prefill: PrefillShape) -> float:
        return self._noisy(self._model.fused(shape, prefill).expected_s)

    def layers_s(
        self, shape: PrefillShape, layers: int, lane: Lane, beside: DecodeShape | None
    ) -> float:
        split = not lane.partition.exclusive
        forecast = self._model.prefill(shape, lane.partition, beside if split else None)
        return self._noisy(forecast.expected_s * layers / self.num_layers)

    def _noisy(self, seconds: float) -> float:
        if self._sigma == 0.0:
            return seconds
        return seconds * self._random.lognormvariate(0.0, self._sigma)
