"""Runs every kind of launch once before the first request, so that no request pays for compiling.

Kernels are compiled for the forms of their arguments (a count that 16 divides, or not), and some
libraries compile or tune on first use; all of them keep the result on disk for the next start.
"""

from __future__ import annotations

import logging
import time

import numpy as np
from tqdm import tqdm

from drift_scheduler.lane import Lane, LaneProvider, Phase
from sglang.srt.mem_cache.slot_table import PADDING_ROW
from sglang.srt.model_executor.host_batch import HostBatch, SampleWish
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
    # Prefill on its lanes; on decode's, a prompt in a step of the whole device.
    launches: list[tuple[Lane, int]] = [
        (lanes.lane(Phase.PREFILL, lanes.table[i]), 0) for i in range(len(lanes.table))
    ]
    launches.append((lanes.lane(Phase.DECODE, lanes.table.whole), 1))
    logger.info("Warming up prefill kernels; what is compiled is kept on disk for the next start")
    with tqdm(total=len(launches) * len(sizes), desc="Warming up prefill kernels") as bar:
        for lane, decode_reqs in launches:
            for count in sizes:
                bar.set_postfix_str(f"{lane.phase.value} lane, {lane.sms} SMs, {count} tokens")
                for wish in WISHES:
                    run = runner.start(_batch(count, decode_reqs, wish, context_length))
                    lane.launch(run.slice_work(lane, 0, runner.num_layers)).wait(LIMIT_S)
                bar.update()
    logger.info("Warmed up prefill kernels in %.1f s", time.perf_counter() - started_s)


def _batch(
    count: int, decode_reqs: int, sampling: SamplingParams, context_length: int
) -> HostBatch:
    """A prompt of `count` tokens on slots 1..count, behind decodes of one token in scratch."""
    scratch = np.zeros(decode_reqs, dtype=np.int64)
    tokens = np.concatenate([scratch, np.arange(count)])
    slots = np.concatenate([scratch, np.arange(1, count + 1)])
    lengths = np.concatenate([scratch + 1, [count]])
    rows = np.concatenate([scratch + PADDING_ROW, [ROW]])
    return HostBatch(
        decode_reqs=decode_reqs,
        input_ids=np.zeros(count, dtype=np.int64),
        positions=tokens,
        token_slots=slots,
        rows=rows,
        seq_lens=lengths,
        new_lens=lengths,
        table_index=np.repeat(rows, lengths) * context_length + tokens,
        table_slots=slots,
        samples=(SampleWish(sampling, seed=0),) * len(rows),
        sample_tokens=np.cumsum(lengths) - 1,
        sample_rows=rows,
    )
