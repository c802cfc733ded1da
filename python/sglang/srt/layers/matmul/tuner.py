"""Tuner: finds the fastest kernel of each matrix product on a lane."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Iterator, Sequence

from drift_scheduler.lane import Lane
from sglang.srt.layers.matmul.choice import TORCH, Backend, Choice, deep_gemm_takes
from sglang.srt.layers.matmul.product_bench import Case, ProductBench
from sglang.srt.layers.matmul.table import LaneTable, Shape
from sglang.srt.layers.matmul.tiles import tiles_for

logger = logging.getLogger(__name__)

# What another kernel must win by: torch needs no compiler, and a measurement wavers.
MIN_GAIN = 0.03
# What one kernel for product and activation may lose by: alone on the device it saves time only,
# beside another lane also the memory traffic of a result twice as wide, which is not measured here.
FUSED_MAY_LOSE = 0.03
MAX_ERROR = 1e-2
QUICK_REPLAYS = 1
FINAL_REPLAYS = 5
FINALISTS = 3
# Larger results are those of a vocabulary, of which no step computes so many rows.
_MAX_RESULT = 1 << 28
# TMA wants rows at multiples of 16 bytes.
_ALIGNED_ELEMENTS = 8


class Tuner:
    """Chooses among the allowed backends by what `bench` measures."""

    def __init__(self, bench: ProductBench, allowed: Collection[Backend]) -> None:
        self._bench = bench
        self._allowed = frozenset(allowed)

    def tune(
        self,
        lane: Lane,
        shapes: Sequence[Shape],
        gate_ups: Collection[Shape],
        tokens: Sequence[int],
        on_progress: Callable[[str], None] = lambda case: None,
    ) -> LaneTable:
        """gate_ups: those of the shapes whose halves an activation joins. on_progress: called
        before every case with what it is."""
        products: dict[Shape, dict[int, Choice]] = {}
        fused: dict[Shape, dict[int, Choice | None]] = {}
        for case in cases(shapes, (), tokens):
            on_progress(str(case))
            candidates = [(choice, False) for choice in self._candidates(case, lane.sms)]
            choice, _ = self._fastest(lane, case, candidates, (TORCH, False), MIN_GAIN)
            products.setdefault(case.shape, {})[case.m] = choice
        for case in cases((), gate_ups, tokens):
            on_progress(str(case))
            unfused = (products[case.shape][case.m], False)
            candidates = [(choice, True) for choice in self._tiles(case, lane.sms)]
            choice, in_one = self._fastest(lane, case, candidates, unfused, -FUSED_MAY_LOSE)
            fused.setdefault(case.shape, {})[case.m] = choice if in_one else None
        return LaneTable(products, fused)

    def _candidates(self, case: Case, num_sms: int) -> Iterator[Choice]:
        if Backend.DEEP_GEMM in self._allowed and deep_gemm_takes(case.m):
            yield Choice(Backend.DEEP_GEMM)
        yield from self._tiles(case, num_sms)

    def _tiles(self, case: Case, num_sms: int) -> Iterator[Choice]:
        n, k = case.shape
        aligned = n // (2 if case.fused else 1) % _ALIGNED_ELEMENTS == k % _ALIGNED_ELEMENTS == 0
        if Backend.TRITON in self._allowed and aligned:
            for tile in tiles_for(case.m, n, k, num_sms, fused=case.fused):
                yield Choice(Backend.TRITON, tile)

    def _fastest(
        self,
        lane: Lane,
        case: Case,
        candidates: Sequence[tuple[Choice, bool]],
        incumbent: tuple[Choice, bool],
        min_gain: float,
    ) -> tuple[Choice, bool]:
        """(choice, whether it is one kernel for a fused case). The incumbent stays unless another
        is right and faster by min_gain."""
        if not candidates:
            return incumbent
        quick = {
            candidate: self._seconds(lane, case, candidate, QUICK_REPLAYS)
            for candidate in candidates
        }
        ranked = sorted(quick, key=lambda candidate: quick[candidate])
        finalists = [c for c in ranked[:FINALISTS] if math.isfinite(quick[c])]
        limit_s = (1 - min_gain) * self._seconds(lane, case, incumbent, FINAL_REPLAYS)
        final = {c: self._seconds(lane, case, c, FINAL_REPLAYS) for c in finalists}
        for candidate in sorted(final, key=lambda candidate: final[candidate]):
            if final[candidate] > limit_s:
                break
            if self._is_right(lane, case, candidate):
                return candidate
        return incumbent

    def _seconds(
        self, lane: Lane, case: Case, candidate: tuple[Choice, bool], replays: int
    ) -> float:
        """Infinite for one that fails, unless it is torch."""
        choice, in_one = candidate
        try:
            return self._bench.seconds(lane, case, choice, in_one=in_one, replays=replays)
        # A compiler's or a driver's, of any type: one kernel fewer to choose from.
        except Exception as error:
            if choice.backend is Backend.TORCH:
                raise
            logger.warning("%s drops out for %s on %d SMs: %s", choice, case, lane.sms, error)
            return math.inf

    def _is_right(self, lane: Lane, case: Case, candidate: tuple[Choice, bool]) -> bool:
        choice, in_one = candidate
        error = self._bench.error(lane, case, choice, in_one=in_one)
        if error < MAX_ERROR:
            return True
        logger.warning(
            "%s drops out for %s on %d SMs: relative error %.2g", choice, case, lane.sms, error
        )
        return False


def cases(
    shapes: Sequence[Shape], gate_ups: Collection[Shape], tokens: Sequence[int]
) -> Iterator[Case]:
    """What is measured on a lane, products before fused ones."""
    for shape in shapes:
        yield from (Case(shape, m) for m in tokens if _is_sensible(shape, m, tokens))
    for shape in gate_ups:
        yield from (Case(shape, m, fused=True) for m in tokens if _is_sensible(shape, m, tokens))


def _is_sensible(shape: Shape, m: int, tokens: Sequence[int]) -> bool:
    return m == tokens[0] or m * shape.n <= _MAX_RESULT
