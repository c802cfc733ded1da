"""Memory that serving will need is taken from the driver before the first request.

It comes in blocks that each stream keeps for its next batches; so does pinned host memory, in
blocks of every power of two. To ask for one while lanes are at work makes the host wait until they
are done: decode steps included, which come late then. So the largest batches run once on every
lane, and then parts of them, before there is anything to wait for.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator

import torch

from drift_scheduler.lane import Lane, LaneProvider, Phase
from sglang.srt.model_executor.host_batch import HostBatch
from sglang.srt.model_executor.made_up_batches import GREEDY, SORTING, batch_of
from sglang.srt.model_executor.model_runner import Runner

logger = logging.getLogger(__name__)

LIMIT_S = 900.0  # what has not run yet may have to be compiled
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
    """Runs the largest batches on idle lanes, and SHARES of them, as long as there is room.
    Slots and rows are used as if they were free.

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
                "Less than %.1f GB of memory is left before the %s lane of %s has run %d tokens: "
                "launches may stall when it first does. A lower --mem-fraction-static leaves more",
                ROOM_BYTES / 1e9,
                lane.phase.value,
                lane.partition,
                len(batch.token_slots),
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
