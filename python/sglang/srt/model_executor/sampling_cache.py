"""What a batch's wishes for its tokens come down to on the device."""

from __future__ import annotations

from collections.abc import Callable

import torch

from sglang.srt.layers.logprobs import SampleScores
from sglang.srt.layers.sampler import SamplingBatch
from sglang.srt.model_executor.host_batch import SampleWish


class SamplingCache:
    """What the last decode batch's wishes came down to; used only by decode work, which is in
    order. The same requests have the same wishes, so most steps find it as they need it."""

    def __init__(
        self, make: Callable[[tuple[SampleWish, ...]], SamplingBatch], device: torch.device
    ) -> None:
        self._make = make
        self._device = device
        self._samples: tuple[SampleWish, ...] = ()
        self._takes_likeliest = True
        self._batch: SamplingBatch | None = None
        self._scores: SampleScores | None = None

    def takes_likeliest(self, samples: tuple[SampleWish, ...]) -> bool:
        self._look_at(samples)
        return self._takes_likeliest

    def get(self, samples: tuple[SampleWish, ...]) -> SamplingBatch:
        self._look_at(samples)
        if self._batch is None:
            self._batch = self._make(samples)
        return self._batch

    def scores(self, samples: tuple[SampleWish, ...]) -> SampleScores | None:
        self._look_at(samples)
        return self._scores

    def _look_at(self, samples: tuple[SampleWish, ...]) -> None:
        if samples != self._samples:
            self._samples = samples
            self._takes_likeliest = all(wish.takes_likeliest for wish in samples)
            self._batch = None
            self._scores = sample_scores(samples, self._device)


def sample_scores(samples: tuple[SampleWish, ...], device: torch.device) -> SampleScores | None:
    """Which of a batch's samples are to tell their log-probabilities; None if none."""
    if all(wish.logprobs is None for wish in samples):
        return None
    return SampleScores.of(
        [wish.logprobs for wish in samples],
        [1.0 if wish.sampling.greedy else wish.sampling.temperature for wish in samples],
        device,
    )
