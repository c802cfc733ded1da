"""ProductBench: how fast, and how right, a choice is on a lane."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch

from drift_scheduler.lane import Lane
from sglang.srt.layers.activation import silu_and_mul
from sglang.srt.layers.matmul.choice import TORCH, Backend, Choice, deep_gemm_piece, product_of
from sglang.srt.layers.matmul.table import Shape
from sglang.srt.layers.matmul.timing import LIMIT_S, median_s

# More than twice what an H100's last-level cache holds.
_COLD_BYTES = 128 << 20
_GRAPH_FLOPS = 2e11  # of one lane's graph: about a millisecond
_GRAPH_BYTES = 1e9
_MAX_CALLS = 32


class Case(NamedTuple):
    """A product of m tokens. fused: of a gate and an up projection, with their activation, which an
    unfused choice computes in two steps."""

    shape: Shape
    m: int
    fused: bool = False

    def __str__(self) -> str:
        return f"{self.m} x {self.shape.k} x {self.shape.n}{' with silu' if self.fused else ''}"


class ProductBench(Protocol):
    """Measures one candidate. Raises whatever its compiler or its launch raises.

    in_one: the choice is a kernel that computes all of a fused case."""

    def seconds(
        self, lane: Lane, case: Case, choice: Choice, *, in_one: bool, replays: int
    ) -> float: ...

    def error(self, lane: Lane, case: Case, choice: Choice, *, in_one: bool) -> float:
        """Norm of the difference from torch's result over the norm of that; NaN never compares."""
        ...


class CudaProductBench:
    """On random operands: zeros draw less power, and a GPU at its power limit slows down."""

    def __init__(
        self, shapes: Sequence[Shape], max_m: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        weights = max(_COLD_BYTES // dtype.itemsize, max(shape.n * shape.k for shape in shapes))
        tokens = max_m * max(shape.k for shape in shapes)
        generator = torch.Generator(device).manual_seed(0)
        self._weights = torch.empty(weights, dtype=dtype, device=device)
        self._weights.normal_(std=1 / 64, generator=generator)
        self._tokens = torch.empty(tokens, dtype=dtype, device=device)
        self._tokens.normal_(generator=generator)
        torch.cuda.synchronize(device)

    def seconds(
        self, lane: Lane, case: Case, choice: Choice, *, in_one: bool, replays: int
    ) -> float:
        """See ProductBench; over enough calls that none finds its weight in the cache."""
        run = self._run(lane, case, choice, in_one)

        def first() -> None:
            run(0)

        lane.launch(first).wait(LIMIT_S)
        size = case.shape.n * case.shape.k
        work = max(2 * case.m * size / _GRAPH_FLOPS, 2 * size / _GRAPH_BYTES)
        count = min(_MAX_CALLS, max(2, math.ceil(1 / work)))
        calls: list[Callable[[], object]] = [
            lambda index=index: run(index)  # type: ignore[misc]
            for index in range(count)
        ]
        return median_s(lane, calls, replays)

    def error(self, lane: Lane, case: Case, choice: Choice, *, in_one: bool) -> float:
        """See ProductBench."""
        found: list[float] = []

        def work() -> None:
            expected = self._run(lane, case, TORCH, in_one=False)(0)
            # Memory of the last result would hide what is not written.
            torch.empty_like(expected).fill_(math.nan)
            result = self._run(lane, case, choice, in_one)(0)
            norm = torch.linalg.vector_norm
            difference = norm(result - expected, dtype=torch.float32)
            found.append(float(difference / norm(expected, dtype=torch.float32)))

        lane.launch(work).wait(LIMIT_S)
        return found[0]

    def _run(
        self, lane: Lane, case: Case, choice: Choice, in_one: bool
    ) -> Callable[[int], torch.Tensor]:
        """Computes the case with one of the weights."""
        (n, k), m, fused = case
        x = self._tokens[: m * k].view(m, k)
        count = self._weights.numel() // (n * k)
        weights = self._weights[: count * n * k].view(count, n, k)
        product = product_of(choice, lane.sms, fused=in_one)
        piece = m
        if choice.backend is Backend.DEEP_GEMM:
            piece = deep_gemm_piece(m) or m

        def run(index: int) -> torch.Tensor:
            weight = weights[index % count]
            out = x.new_empty((m, n // 2 if in_one else n))
            for start in range(0, m, piece):
                product(x[start : start + piece], weight, out[start : start + piece])
            return silu_and_mul(out) if fused and not in_one else out

        return run
