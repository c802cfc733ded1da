"""LaunchTimes: how long simulated launches take on the device, and the host."""

from __future__ import annotations

import random
from dataclasses import dataclass

from drift_scheduler.lane import Lane
from drift_scheduler.policies.latency_model import LatencyModel
from drift_scheduler.shapes import DecodeShape, PrefillShape

# Of the scatter of launches that share the device: an H100's decode steps alone scattered by
# 0.004, fused ones and those beside a prefill by 0.03 (from the 5th to the 95th percentile, of
# 60,000 launches).
ALONE = 0.15


@dataclass(frozen=True, slots=True)
class Noise:
    """A launch that shares the device with the other phase takes its expected time times
    exp(N(0, sigma)), one that has it alone exp(N(0, ALONE * sigma)); sigma 0 changes nothing."""

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
        shared = None if lane.partition.exclusive else beside
        forecast = self._model.decode(shape, lane.partition, shared)
        return self._noisy(forecast.expected_s, alone=shared is None)

    def fused_s(self, shape: DecodeShape, prefill: PrefillShape) -> float:
        return self._noisy(self._model.fused(shape, prefill).expected_s, alone=False)

    def layers_s(
        self, shape: PrefillShape, layers: int, lane: Lane, beside: DecodeShape | None
    ) -> float:
        shared = None if lane.partition.exclusive else beside
        forecast = self._model.prefill(shape, lane.partition, shared)
        expected_s = forecast.expected_s * layers / self.num_layers
        return self._noisy(expected_s, alone=shared is None)

    def _noisy(self, seconds: float, *, alone: bool) -> float:
        sigma = ALONE * self._sigma if alone else self._sigma
        return seconds * self._random.lognormvariate(0.0, sigma) if sigma else seconds
