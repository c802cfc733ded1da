"""Runs every prefill lane once before the first request, so that no request pays for compiling.

Kernels are compiled for the forms of their arguments (a count that 16 divides, or not), and some
libraries compile or tune on first use; all of them keep the result on disk for the next start.
"""

from __future__ import annotations

import logging
import time

import numpy as np
from tqdm import tqdm

from drift_scheduler.lane import LaneProvider, Phase
from sglang.srt.model_executor.host_batch import HostBatch, SampleRow
from sglang.srt.model_executor.model_runner import Runner
from sglang.srt.sampling_params import SamplingParams

logger = logging.getLogger(__name__)

LIMIT_S = 900.0  # a cold FlashInfer takes minutes
PROMPT_TOKENS = (17, 64)
ROW = 1
# One row that takes the likeliest token and one that draws: both ways of sampling are compiled.
WISHES = (SamplingParams(temperature=0), SamplingParams(temperature=1, top_k=20, top_p=0.9))


def warm_up(runner: Runner, lanes: LaneProvider, *, num_slots: int, context_length: int) -> None:
    """Uses slots and rows as if they were free, so it must come before the first request."""
    started_s = time.perf_counter()
    sizes = [count for count in PROMPT_TOKENS if count < min(num_slots, context_length)]
    prefill = [lanes.lane(Phase.PREFILL, lanes.table[i]) for i in range(len(lanes.table))]
    with tqdm(total=len(prefill) * len(sizes), desc="Warming up prefill kernels") as bar:
        for lane in prefill:
            for count in sizes:
                for wish in WISHES:
                    run = runner.start(_prompt(count, wish, context_length))
                    lane.launch(run.slice_work(lane, 0, runner.num_layers)).wait(LIMIT_S)
                bar.update()
    logger.info("Warmed up prefill kernels in %.1f s", time.perf_counter() - started_s)


def _prompt(count: int, wish: SamplingParams, context_length: int) -> HostBatch:
    """One request of `count` tokens on slots 1..count."""
    tokens = np.arange(count, dtype=np.int64)
    one = np.ones(1, dtype=np.int64)
    return HostBatch(
        decode_reqs=0,
        input_ids=np.zeros(count, dtype=np.int64),
        positions=tokens,
        token_slots=tokens + 1,
        rows=one * ROW,
        seq_lens=one * count,
        new_lens=one * count,
        table_index=tokens + ROW * context_length,
        table_slots=tokens + 1,
        samples=(SampleRow(wish, seed=0, position=count),),
        sample_tokens=one * (count - 1),
        sample_rows=one * ROW,
    )
