"""Runs every kind of launch before the first request, so that none pays for compiling or loading.

Kernels are compiled for the forms of their arguments (a count that 16 divides, or not), and some
libraries compile or tune on first use; all of them keep the result on disk for the next start.

The driver loads a kernel when it is first launched, and the host waits for all lanes meanwhile.
cuBLAS has dozens of them and chooses by the number of rows; so products of many sizes run once.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator

import torch
from tqdm import tqdm

from drift_scheduler.lane import Lane, LaneProvider, Phase
from sglang.srt.layers.sampler import SamplingBatch, sample
from sglang.srt.model_config import ModelConfig
from sglang.srt.model_executor.host_batch import HostBatch
from sglang.srt.model_executor.made_up_batches import (
    ALL_WISHES,
    CUTTING,
    GREEDY,
    SORTING,
    batch_of,
    with_all_wishes,
)
from sglang.srt.model_executor.model_runner import Runner
from sglang.srt.models.base import CausalLM, HiddenState
from sglang.srt.sampling_params import SamplingParams

logger = logging.getLogger(__name__)

LIMIT_S = 900.0  # a cold FlashInfer takes minutes
PROMPT_TOKENS = (17, 64)
# cuBLAS takes some of its kernels for a handful of sizes only, multiples of 8 or one less. Of up to
# 128 kernels a product on an H100, for sizes up to 4,096, these meet all; multiples of 8 alone
# leave out up to 11, and all sizes up to 2,048 with every eighth above 2.
ALL_ROWS_UP_TO = 64
PRODUCT_ROWS = 8
# Kernels that sort are made for powers of two; more rows are drawn in parts.
TOP_KS = tuple(1 << bits for bits in range(1, 12))
SAMPLED_ROWS = (1, 2, 4, 8, 16, 32)


def warm_up(
    runner: Runner, lanes: LaneProvider, *, num_slots: int, context_length: int, vocab_size: int
) -> None:
    """Uses slots and rows as if they were free, so it must come before the first request."""
    started_s = time.perf_counter()
    sizes = [count for count in PROMPT_TOKENS if count < min(num_slots, context_length)]
    # Prefill on its lanes; on decode's, a prompt in a step of the whole device.
    launches: list[tuple[Lane, int]] = [
        (lanes.lane(Phase.PREFILL, lanes.table[i]), 0) for i in range(len(lanes.table))
    ]
    launches.append((lanes.lane(Phase.DECODE, lanes.table.whole), 1))
    logger.info("Warming up prefill kernels; what is compiled is kept on disk for the next start")
    with tqdm(total=len(launches) * len(sizes) + 1, desc="Warming up prefill kernels") as bar:
        for lane, decode_reqs in launches:
            for count in sizes:
                bar.set_postfix_str(f"{lane.phase.value} lane, {lane.sms} SMs, {count} tokens")
                for wish in (GREEDY, CUTTING):  # both ways of sampling are compiled
                    _run(runner, lane, batch_of((count,), decode_reqs, wish, context_length))
                bar.update()
        # Kernels that only some requests need are loaded once for all lanes.
        for count in sizes[-1:]:
            plain = batch_of((count,), 0, GREEDY, context_length)
            _run(runner, launches[0][0], with_all_wishes(plain, vocab_size))
            runner.forget(ALL_WISHES)
        bar.update()
    logger.info("Warmed up prefill kernels in %.1f s", time.perf_counter() - started_s)


def load_products(model: CausalLM, lane: Lane, *, max_tokens: int, max_reqs: int) -> None:
    """Every product of a batch of up to max_tokens, and the logits of up to max_reqs, as torch
    computes them: other kernels are loaded when they are tuned. For all lanes: they share them.

    The largest come first, and the memory of its result serves the others.
    """
    started_s = time.perf_counter()

    linears = model.layer_linears().all

    def multiply() -> None:
        for linear in linears:
            x = linear.weight.new_zeros((max_tokens, linear.weight.shape[1]))
            for rows in _sizes(max_tokens):
                linear(x[:rows])
        ids = torch.zeros(max_reqs, dtype=torch.int64, device=linears[0].weight.device)
        hidden, _ = model.embed(ids)
        for rows in _sizes(max_reqs):
            model.logits(HiddenState(hidden[:rows], None), None)

    lane.launch(multiply).wait(LIMIT_S)
    logger.info("Loaded matrix products in %.1f s", time.perf_counter() - started_s)


def load_sampling(config: ModelConfig, lane: Lane, device: torch.device, *, max_reqs: int) -> None:
    """Draws from few and many rows, among few and all tokens: torch has other kernels for each.

    For all lanes: they share them.
    """
    wishes = [SamplingParams(temperature=1, top_k=k) for k in TOP_KS if k < config.vocab_size]

    def draw() -> None:
        for rows in (count for count in SAMPLED_ROWS if count <= max_reqs):
            logits = torch.zeros((rows, config.vocab_size), dtype=config.dtype, device=device)
            positions = torch.zeros(rows, dtype=torch.int64, device=device)
            for wish in (*wishes, SORTING):
                batch = SamplingBatch.from_params(
                    [wish] * rows, [0] * rows, config.vocab_size, device
                )
                sample(logits, positions, batch)

    lane.launch(draw).wait(LIMIT_S)


def _sizes(most: int) -> Iterator[int]:
    """Falling, from most on."""
    full = range(PRODUCT_ROWS, most + 1, PRODUCT_ROWS)
    small = range(1, min(most, ALL_ROWS_UP_TO))
    yield from sorted({most, *full, *(rows - 1 for rows in full), *small}, reverse=True)


def _run(runner: Runner, lane: Lane, batch: HostBatch) -> None:
    run = runner.start(batch)
    lane.launch(run.slice_work(lane, 0, runner.num_layers)).wait(LIMIT_S)
