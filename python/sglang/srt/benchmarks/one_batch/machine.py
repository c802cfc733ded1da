"""What a lane can do at best: the rate of a large copy and of a large matrix product."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

import torch

from drift_scheduler.lane import Lane, Work
from sglang.srt.benchmarks.one_batch.floors import Rates, rates

LIMIT_S = 120.0


@dataclass(frozen=True, slots=True)
class ProbeSizes:
    """copy_bytes: of each of `copy_buffers` sources and targets, which are taken in turn so that
    none is found in the last-level cache. matrix_side: of square matrices."""

    copy_bytes: int
    copy_buffers: int
    matrix_side: int
    repetitions: int


GPU_SIZES = ProbeSizes(copy_bytes=512 << 20, copy_buffers=2, matrix_side=8192, repetitions=20)
CPU_SIZES = ProbeSizes(copy_bytes=64 << 20, copy_buffers=2, matrix_side=1024, repetitions=5)


class MachineProbe:
    """Holds the buffers, so that every lane is measured with the same ones."""

    def __init__(self, device: torch.device, dtype: torch.dtype, sizes: ProbeSizes) -> None:
        self._sizes = sizes
        self._on_gpu = device.type == "cuda"
        shape = (sizes.copy_buffers, sizes.copy_bytes // dtype.itemsize)
        self._sources = torch.zeros(shape, dtype=dtype, device=device)
        self._targets = torch.zeros(shape, dtype=dtype, device=device)
        side = sizes.matrix_side
        # Random numbers: zeros draw less power, and a GPU at its power limit slows down.
        self._factors = [torch.randn(side, side, device=device).to(dtype) for _ in range(2)]
        self._product = torch.empty(side, side, dtype=dtype, device=device)
        if self._on_gpu:
            torch.cuda.synchronize(device)

    def measure(self, lane: Lane) -> Rates:
        """Medians on the lane's own SMs or cores, which nothing else may use meanwhile."""
        sizes = self._sizes
        copy_s = _median_s(lane, [self._copy(i) for i in range(sizes.repetitions)])
        matrix_s = _median_s(lane, [self._multiply] * sizes.repetitions)
        return rates(
            2 * sizes.copy_bytes / copy_s,
            2 * sizes.matrix_side**3 / matrix_s,
            whole_gpu=self._on_gpu and lane.partition.exclusive,
        )

    def _copy(self, repetition: int) -> Work:
        index = repetition % self._sizes.copy_buffers

        def work() -> None:
            # A kernel, where a plain copy might be left to a copy engine outside the lane's SMs.
            torch.neg(self._sources[index], out=self._targets[index])

        return work

    def _multiply(self) -> None:
        torch.mm(*self._factors, out=self._product)


def _median_s(lane: Lane, works: list[Work]) -> float:
    """The first of the works, once more, warms up."""
    tickets = [lane.launch(work) for work in [works[0], *works]]
    for ticket in tickets:
        ticket.wait(LIMIT_S)
    return statistics.median(ticket.span().duration_s for ticket in tickets[1:])
