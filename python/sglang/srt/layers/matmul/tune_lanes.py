"""tune_lanes: a Matmul for every lane, tuned at the first start and read from disk after it."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from drift_scheduler.lane import Lane, LaneProvider, Phase
from sglang.srt.cache_folder import default_folder
from sglang.srt.layers.linear import Linear
from sglang.srt.layers.matmul.base import ScratchMatmul, TorchMatmul
from sglang.srt.layers.matmul.cache import TableCache, versions
from sglang.srt.layers.matmul.choice import Backend, supports
from sglang.srt.layers.matmul.lane_matmul import LaneMatmul
from sglang.srt.layers.matmul.product_bench import CudaProductBench, ProductBench
from sglang.srt.layers.matmul.table import LaneTable, Shape, measured_tokens
from sglang.srt.layers.matmul.timing import LIMIT_S
from sglang.srt.layers.matmul.tuner import Tuner, cases

logger = logging.getLogger(__name__)

LaneKey = tuple[Phase, int]


def tune_lanes(
    lanes: LaneProvider,
    linears: Sequence[Linear],
    *,
    gate_ups: Sequence[Linear] = (),
    max_prefill_tokens: int,
    max_decode_reqs: int,
    dtype: torch.dtype,
    device: torch.device,
    allowed: Collection[Backend],
    cache_folder: Path | None = None,
) -> dict[LaneKey, ScratchMatmul]:
    """The Matmul of every lane, by phase and partition index; ready: nothing compiles later.

    gate_ups: those of `linears` whose halves an activation joins. Tables of an earlier start are
    taken from the cache folder (default_folder() if None), the others are measured and kept there.
    Lanes are launched on, and must be idle.
    """
    keys = [(phase, index) for phase in Phase for index in range(len(lanes.table))]
    usable = {backend for backend in allowed if supports(backend, dtype, device)}
    if not usable - {Backend.TORCH} or not linears:
        torch_matmul = TorchMatmul()
        return dict.fromkeys(keys, torch_matmul)
    shapes = _shapes(linears)
    fused = _shapes(gate_ups)
    by_sms = _lanes_by_sms(lanes)
    limits = {Phase.PREFILL: max_prefill_tokens, Phase.DECODE: max_decode_reqs}
    tokens = {
        sms: sorted({m for lane in group for m in measured_tokens(lane.phase, limits[lane.phase])})
        for sms, group in by_sms.items()
    }
    cache = TableCache(
        cache_folder or default_folder(),
        {
            "gpu": torch.cuda.get_device_name(device),
            "versions": versions(),
            "dtype": str(dtype),
            "shapes": [list(shape) for shape in shapes],
            "gate_ups": [list(shape) for shape in fused],
            "allowed": sorted(usable),
        },
    )
    lane_of = {sms: group[0] for sms, group in by_sms.items()}

    def make_bench() -> ProductBench:
        return CudaProductBench(shapes, max(map(max, tokens.values())), dtype, device)

    tables = tables_of(lane_of, shapes, fused, tokens, cache, make_bench, usable)
    torch.cuda.empty_cache()
    matmuls = {sms: LaneMatmul(sms, tables[sms], dtype) for sms in by_sms}
    weights = {Shape(*linear.weight.shape): linear for linear in linears}
    for sms, lane in lane_of.items():
        _compile(lane, matmuls[sms], tables[sms], weights)
    return {key: matmuls[lanes.lane(key[0], lanes.table[key[1]]).sms] for key in keys}


def tables_of(
    lane_of: Mapping[int, Lane],
    shapes: Sequence[Shape],
    gate_ups: Sequence[Shape],
    tokens: Mapping[int, Sequence[int]],
    cache: TableCache,
    make_bench: Callable[[], ProductBench],
    allowed: Collection[Backend],
) -> dict[int, LaneTable]:
    """A table for each SM count of lane_of and tokens: from the cache, or measured and kept there
    as soon as a lane is done. make_bench: called if there is anything to measure."""
    kept = cache.load()
    missing = [sms for sms in lane_of if not _covers(kept.get(sms), shapes, gate_ups, tokens[sms])]
    if missing:
        started_s = time.perf_counter()
        tuner = Tuner(make_bench(), allowed)
        total = sum(len(list(cases(shapes, gate_ups, tokens[sms]))) for sms in missing)
        with tqdm(total=total, desc="Tuning matmuls") as bar:
            for sms in missing:

                def show(case: str, sms: int = sms) -> None:
                    bar.set_postfix_str(f"{sms} SMs: {case}")
                    bar.update()

                kept[sms] = tuner.tune(lane_of[sms], shapes, gate_ups, tokens[sms], show)
                cache.store(kept)
        logger.info(
            "Tuned the matmuls of lanes of %s SMs in %.1f s; kept in %s",
            ", ".join(map(str, sorted(missing))),
            time.perf_counter() - started_s,
            cache.path,
        )
    return kept


def _compile(
    lane: Lane, matmul: LaneMatmul, table: LaneTable, weights: Mapping[Shape, Linear]
) -> None:
    """Runs every choice once: what a table from disk names may not be loaded yet."""

    def run(shape: Shape, m: int, fused: bool) -> None:
        linear = weights[shape]
        x = linear.weight.new_zeros((m, shape.k))
        _ = matmul.gate_up_silu(x, linear) if fused else matmul(x, linear)

    seen = set()
    for fused, ladders in ((False, table.products), (True, table.fused)):
        for shape, ladder in ladders.items():
            for m, choice in ladder.items():
                if choice is None or choice.backend is Backend.TORCH:
                    continue
                # One compilation of a tile serves all shapes; DeepGEMM's serves its own.
                once = (choice, fused) if choice.tile else (choice, shape, m)
                if once not in seen:
                    seen.add(once)
                    lane.launch(functools.partial(run, shape, m, fused)).wait(LIMIT_S)


def _shapes(linears: Sequence[Linear]) -> list[Shape]:
    return list(dict.fromkeys(Shape(*linear.weight.shape) for linear in linears))


def _lanes_by_sms(lanes: LaneProvider) -> dict[int, list[Lane]]:
    by_sms: dict[int, list[Lane]] = {}
    for index in range(len(lanes.table)):
        for phase in Phase:
            lane = lanes.lane(phase, lanes.table[index])
            by_sms.setdefault(lane.sms, []).append(lane)
    return by_sms


def _covers(
    table: LaneTable | None,
    shapes: Sequence[Shape],
    gate_ups: Sequence[Shape],
    tokens: Sequence[int],
) -> bool:
    """Whether the table has an entry for everything that would be measured."""
    if table is None:
        return False
    return all(
        case.m in (table.fused if case.fused else table.products).get(case.shape, {})
        for case in cases(shapes, gate_ups, tokens)
    )
