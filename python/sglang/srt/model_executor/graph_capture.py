"""What a GPU server captures at start: decode steps on all lanes, short prefills on whole ones."""

from __future__ import annotations

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
    sizes = [size for size in TOKEN_SIZES if size <= min(max_tokens, config.context_length)]
    whole = table.whole.index
    prefills = {}
    for phase in (Phase.PREFILL, Phase.DECODE) if fuses else (Phase.PREFILL,):
        decode_reqs = max_reqs if phase is Phase.DECODE else 0
        graphs = _prefill_graphs(
            runner, pool, attention, (phase, whole), sizes, max_decode_reqs=decode_reqs
        )
        if graphs is not None:
            prefills[phase, whole] = graphs
    with tqdm(total=len(prefills) * len(sizes), desc="Capturing prefill graphs") as bar:
        for (phase, _), graphs in prefills.items():
            graphs.capture(lanes.lane(phase, table.whole), bar.update)
    runner.use_prefill_graphs(prefills)


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
