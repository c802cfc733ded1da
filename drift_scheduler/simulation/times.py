"""LaunchTimes: how long simulated launches take on the device, and the host."""

from __future__ import annotations

import random
from dataclasses import dataclass

from drift_scheduler.lane import Lane
from drift_scheduler.policies.latency_model import LatencyModel
from drift_scheduler.shapes import DecodeShape, PrefillShape

# Of the scatter of other launches: an H100's decode steps alone scattered by 0.004, and by 0.02 to
# 0.04 those beside a prefill, fused ones and prefill slices, these alone too.
STEP_ALONE = 0.15


@dataclass(frozen=True, slots=True)
class Noise:
    """A launch takes its expected time times exp(N(0, sigma)), a decode step that has the device
    alone exp(N(0, STEP_ALONE * sigma)); sigma 0 changes nothing."""

    sigma: float
    seed: int


class LaunchTimes:
    """Expected times of a latency model for what is launched, given what runs beside it then.

    head_s: of a prefill batch's time, what comes behind its last layer: the tokens are chosen.

    A launch that is already under way is not slowed when something starts beside it later, nor
    sped up when that ends.
    """

    def __init__(
        self,
        model: LatencyModel,
        num_layers: int,
        noise: Noise | None = None,
        *,
        head_s: float = 0.0,
    ) -> None:
        self.num_layers = num_layers
        self._head_s = head_s
        self._model = model
        self._sigma = noise.sigma if noise else 0.0
        self._random = random.Random(noise.seed if noise else 0)

    def step_s(self, shape: DecodeShape, lane: Lane, beside: PrefillShape | None) -> float:
        shared = None if lane.partition.exclusive else beside
        forecast = self._model.decode(shape, lane.partition, shared)
        return self._noisy(forecast.expected_s, STEP_ALONE if shared is None else 1.0)

    def fused_s(self, shape: DecodeShape, prefill: PrefillShape) -> float:
        return self._noisy(self._model.fused(shape, prefill).expected_s)

    def layers_s(
        self, shape: PrefillShape, first: int, last: int, lane: Lane, beside: DecodeShape | None
    ) -> float:
        """Of layers first..last-1."""
        shared = None if lane.partition.exclusive else beside
        all_s = self._model.prefill(shape, lane.partition, shared).expected_s
        head_s = min(self._head_s, all_s / 2)
        expected_s = (all_s - head_s) * (last - first) / self.num_layers
        if last == self.num_layers:
            expected_s += head_s
        return self._noisy(expected_s)

    def _noisy(self, seconds: float, share: float = 1.0) -> float:
        sigma = share * self._sigma
        return seconds * self._random.lognormvariate(0.0, sigma) if sigma else seconds
