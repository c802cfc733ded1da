"""What a GPU server captures at start: decode steps, short prefills, fused steps."""

from __future__ import annotations

import logging
import time

import torch
from tqdm import tqdm

from drift_scheduler.lane import LaneProvider, Phase
from sglang.srt.layers.attention.flashinfer_backend import FlashInferAttention
from sglang.srt.layers.attention.triton_backend import TritonAttention
from sglang.srt.mem_cache.kv_pool import DeviceKVPool
from sglang.srt.model_executor.decode_graphs import DecodeGraphs, default_sizes
from sglang.srt.model_executor.model_runner import LaneKey, ModelRunner
from sglang.srt.model_executor.prefill_graphs import (
    MAX_PREFILL_REQS,
    TOKEN_SIZES,
    PrefillBounds,
    PrefillGraphs,
)

logger = logging.getLogger(__name__)


def capture_graphs(
    runner: ModelRunner,
    lanes: LaneProvider,
    pool: DeviceKVPool,
    *,
    max_reqs: int,
    max_tokens: int,
    fuses: bool,
) -> None:
    """Captures on idle lanes and hands the graphs to the runner.

    max_reqs: of a decode step. max_tokens: of a batch that prefills. fuses: whether prompts may
    ride in decode steps. Prefill is captured where its attention can be, see
    FlashInferAttention.reserve.
    """
    config = runner.model.config
    table = lanes.table
    attention = TritonAttention(pool, config, num_sms=table.total_sms)
    attention.reserve(max_reqs, config.context_length)
    torch.cuda.synchronize(pool.keys.device)  # its counters are zero before any lane sees them
    _capture_decode(runner, lanes, pool, attention, max_reqs)
    _capture_prefill(runner, lanes, pool, attention, max_reqs, max_tokens, fuses)


def _capture_prefill(
    runner: ModelRunner,
    lanes: LaneProvider,
    pool: DeviceKVPool,
    decode_attention: TritonAttention,
    max_reqs: int,
    max_tokens: int,
    fuses: bool,
) -> None:
    """On every prefill lane or, where attention cannot be captured, on none; and fused steps."""
    table, context_length = lanes.table, runner.model.config.context_length
    sizes = [size for size in TOKEN_SIZES if size <= min(max_tokens, context_length)]
    wanted = [(Phase.PREFILL, index, 0) for index in range(len(table))]
    if fuses:
        wanted.append((Phase.DECODE, table.whole.index, max_reqs))
    found: dict[LaneKey, PrefillGraphs] = {}
    for phase, index, decode_reqs in wanted:
        graphs = _prefill_graphs(
            runner, pool, decode_attention, (phase, index), sizes, max_decode_reqs=decode_reqs
        )
        if graphs is None:
            return
        found[phase, index] = graphs
    device = pool.keys.device
    started_s = time.perf_counter()
    free_before, total = torch.cuda.mem_get_info(device)
    # Work of one phase runs in order whatever its lane, so its graphs may share their memory.
    memory = {phase: torch.cuda.graph_pool_handle() for phase in Phase}
    with tqdm(total=len(found) * len(sizes), desc="Capturing prefill graphs") as bar:
        for (phase, index), graphs in found.items():
            graphs.capture(lanes.lane(phase, table[index]), memory[phase], bar.update)
    runner.use_prefill_graphs(found)
    taken = free_before - torch.cuda.mem_get_info(device)[0]
    logger.info(
        "Captured %d graphs of up to %d prompt tokens on %d lanes in %.1f s, %.2f GB, %.1f %% of "
        "the device's memory",
        len(found) * len(sizes),
        sizes[-1],
        len(found),
        time.perf_counter() - started_s,
        taken / 1e9,
        100 * taken / total,
    )


def _capture_decode(
    runner: ModelRunner,
    lanes: LaneProvider,
    pool: DeviceKVPool,
    attention: TritonAttention,
    max_reqs: int,
) -> None:
    sizes = default_sizes(max_reqs)
    decode_lanes = [lanes.lane(Phase.DECODE, lanes.table[i]) for i in range(len(lanes.table))]
    matmuls = {
        lane.partition.index: runner.kernels[Phase.DECODE, lane.partition.index].matmul
        for lane in decode_lanes
    }
    graphs = DecodeGraphs(
        runner.model, pool, attention, matmuls, runner.slot_table, runner.relay, sizes
    )
    with tqdm(total=len(sizes) * len(decode_lanes), desc="Capturing decode graphs") as bar:
        graphs.capture(decode_lanes, bar.update)
    runner.use_graphs(graphs)


def _prefill_graphs(
    runner: ModelRunner,
    pool: DeviceKVPool,
    decode_attention: TritonAttention,
    key: LaneKey,
    sizes: list[int],
    *,
    max_decode_reqs: int,
) -> PrefillGraphs | None:
    """None if there is nothing to capture or the lane's attention cannot be captured.

    Fused steps and decode steps run in turn, so they share decode's scratch.
    """
    kernels = runner.kernels[key]
    if not sizes or not isinstance(kernels.attention, FlashInferAttention):
        return None
    attention = kernels.attention.sibling()
    if not attention.reserve(
        sizes[-1],
        MAX_PREFILL_REQS,
        decode=(max_decode_reqs, decode_attention.scratch) if max_decode_reqs else None,
        slot_table=runner.slot_table,
    ):
        return None
    return PrefillGraphs(
        runner.model,
        pool,
        attention,
        kernels.matmul,
        runner.slot_table,
        sizes,
        PrefillBounds(sizes[-1], MAX_PREFILL_REQS, max_decode_reqs),
    )
