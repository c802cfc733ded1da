"""Runs every kind of launch before the first request, so that none pays for compiling or memory.

Kernels are compiled for the forms of their arguments (a count that 16 divides, or not), and some
libraries compile or tune on first use; all of them keep the result on disk for the next start.

Memory comes from the driver in blocks that each stream keeps for its next batches; so does pinned
host memory, in blocks of every power of two. To ask for one while lanes are at work makes the host
wait until they are done: decode steps included, which come late then. So the largest batches run
once on every lane, and then parts of them, before there is anything to wait for.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from tqdm import tqdm

from drift_scheduler.lane import Lane, LaneProvider, Phase
from sglang.srt.mem_cache.slot_table import PADDING_ROW
from sglang.srt.model_executor.host_batch import HostBatch, SampleWish
from sglang.srt.model_executor.model_runner import Runner
from sglang.srt.sampling_params import SamplingParams

logger = logging.getLogger(__name__)

LIMIT_S = 900.0  # a cold FlashInfer takes minutes
# Left to libraries that take memory of their own, and to batches of other shapes.
ROOM_BYTES = 2 << 30
# Of the largest batches. A smaller one splits the blocks of a larger one, and not always so that
# all of its own fit.
SHARES = tuple(eighths / 8 for eighths in range(8, 0, -1))
# What a stream keeps for tensors of at most SMALL_BYTES, which the allocator puts into blocks of
# their own. How many it needs hangs on which of them live side by side, not on a batch's size.
SMALL_BYTES = 1 << 20
SMALL_TENSORS = 16
# Pinned blocks of one size that batches in flight may hold, and the size of the largest: what the
# longest prompts enter in the slot table.
PINNED_BLOCKS = 8
MAX_PINNED_BYTES = 4 << 20
PROMPT_TOKENS = (17, 64)
FIRST_ROW = 1
GREEDY = SamplingParams(temperature=0)
CUTTING = SamplingParams(temperature=1, top_k=20, top_p=0.9)
SORTING = SamplingParams(temperature=1, top_p=0.9)  # all logits, which takes the most memory


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
                for wish in (GREEDY, CUTTING):  # both ways of sampling are compiled
                    run = runner.start(batch_of((count,), decode_reqs, wish, context_length))
                    lane.launch(run.slice_work(lane, 0, runner.num_layers)).wait(LIMIT_S)
                bar.update()
    logger.info("Warmed up prefill kernels in %.1f s", time.perf_counter() - started_s)


def take_memory(
    runner: Runner,
    lanes: LaneProvider,
    free_bytes: Callable[[], int],
    *,
    max_tokens: int,
    max_reqs: int,
    max_step_tokens: int,
    num_slots: int,
    context_length: int,
) -> None:
    """Runs the largest batches on idle lanes, and SHARES of them, as long as there is room; slots
    and rows as warm_up.

    max_tokens, max_reqs: of a batch that prefills, and that decodes. max_step_tokens: of prompts
    that ride in a decode step; 0 if none do.
    """
    started_s = time.perf_counter()

    def prompts(tokens: float, at_least: int = 1) -> list[int]:
        count = min(math.ceil(tokens), num_slots - 1)
        longest = min(context_length - 1, max(1, count // at_least))
        return _prompts(count, longest, max_reqs)

    def launches() -> Iterator[tuple[Lane, HostBatch]]:
        for share in SHARES:
            reqs = math.ceil(share * max_reqs)
            # Long prompts fill the slot table, many of them the logits.
            long = batch_of(prompts(share * max_tokens), 0, GREEDY, context_length)
            many = batch_of(prompts(share * max_tokens, reqs), 0, SORTING, context_length)
            decode = batch_of((), reqs, SORTING, context_length)
            if max_step_tokens:
                riding = prompts(share * max_step_tokens)
                fused = batch_of(riding, reqs, SORTING, context_length)
                yield lanes.lane(Phase.DECODE, lanes.table.whole), fused
            for phase, batch in (
                (Phase.PREFILL, long),
                (Phase.PREFILL, many),
                (Phase.DECODE, decode),
            ):
                for index in range(len(lanes.table)):
                    yield lanes.lane(phase, lanes.table[index]), batch

    for lane, batch in launches():
        if free_bytes() < ROOM_BYTES:
            logger.warning(
                "Less than %.1f GB of memory is left before the %s lane of %s has run: launches "
                "may stall when it first does. A lower --mem-fraction-static leaves more",
                ROOM_BYTES / 1e9,
                lane.phase.value,
                lane.partition,
            )
            break
        _run_ends(runner, lane, batch)
    logger.info(
        "Ran the largest batches in %.1f s; %.1f GB of memory is left",
        time.perf_counter() - started_s,
        free_bytes() / 1e9,
    )


def take_small_memory(lanes: LaneProvider, device: torch.device) -> None:
    """Blocks for SMALL_TENSORS on every lane's stream, for which torch keeps them."""

    def hold() -> None:
        sizes = [SMALL_BYTES] * SMALL_TENSORS
        held = [torch.empty(size, dtype=torch.uint8, device=device) for size in sizes]
        del held

    for phase in Phase:
        for index in range(len(lanes.table)):
            lanes.lane(phase, lanes.table[index]).launch(hold).wait(LIMIT_S)


def take_pinned_memory() -> None:
    """Blocks of every size that uploads and results take; torch keeps them when they are freed."""
    sizes = (1 << bits for bits in range(MAX_PINNED_BYTES.bit_length()))
    held = [
        torch.empty(size, dtype=torch.uint8, pin_memory=True)
        for size in sizes
        for _ in range(PINNED_BLOCKS)
    ]
    del held


def _run_ends(runner: Runner, lane: Lane, batch: HostBatch) -> None:
    """The first layer and the last, sampling included: those between take no more memory. A
    decode step is never sliced."""
    run = runner.start(batch)
    layers = runner.num_layers
    whole = lane.phase is Phase.DECODE or run.indivisible or layers == 1
    for first, last in [(0, layers)] if whole else [(0, 1), (layers - 1, layers)]:
        lane.launch(run.slice_work(lane, first, last)).wait(LIMIT_S)


def _prompts(tokens: int, longest: int, max_prompts: int) -> list[int]:
    """Lengths of as few prompts as have so many tokens."""
    lengths = [longest] * (tokens // longest)
    if rest := tokens % longest:
        lengths.append(rest)
    return lengths[:max_prompts]


def batch_of(
    prompts: Sequence[int], decode_reqs: int, sampling: SamplingParams, context_length: int
) -> HostBatch:
    """Prompts of so many tokens on slots 1, 2, ..., behind decodes of one token in scratch."""
    count = sum(prompts)
    scratch = np.zeros(decode_reqs, dtype=np.int64)
    tokens = np.concatenate([scratch, *map(np.arange, prompts)])
    slots = np.concatenate([scratch, np.arange(1, count + 1)])
    lengths = np.concatenate([scratch + 1, np.asarray(prompts, dtype=np.int64)])
    rows = np.concatenate([scratch + PADDING_ROW, FIRST_ROW + np.arange(len(prompts))])
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
