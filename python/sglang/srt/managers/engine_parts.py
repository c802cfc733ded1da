"""EngineParts: a serving engine and its gang, built from flags; whoever drives them adds the rest.

The scheduler process drives them for a server, the offline benchmark in its own process.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from drift_scheduler.gang import Gang
from drift_scheduler.timeline import LaneRun, Timeline
from sglang.srt.constrained.factory import make_grammars, require_installed
from sglang.srt.managers.admission import EngineLimits
from sglang.srt.managers.jobs import DecodeBatch, Fill, PrefillBatch
from sglang.srt.managers.outbox import Outbox
from sglang.srt.managers.serving_engine import ServingEngine
from sglang.srt.mem_cache.radix_cache import RadixCache
from sglang.srt.mem_cache.sequence_cache import SequenceCache
from sglang.srt.mem_cache.slot_allocator import SlotAllocator
from sglang.srt.mem_cache.slot_table import RowPool
from sglang.srt.model_executor.bring_up import Executor, bring_up
from sglang.srt.requests import Request
from sglang.srt.server_args import ServerArgs


@dataclass(frozen=True, slots=True)
class EngineParts:
    """Who turns the gang also flushes the outbox, and closes executor.lanes at the end."""

    executor: Executor
    cache: SequenceCache
    outbox: Outbox
    engine: ServingEngine
    timeline: Timeline
    gang: Gang[PrefillBatch, DecodeBatch]


def build_engine(
    server_args: ServerArgs,
    *,
    on_prefill: Callable[[Sequence[Fill]], None] = lambda fills: None,
    on_decode: Callable[[Sequence[Request]], None] = lambda members: None,
    on_finish: Callable[[Request], None] = lambda request: None,
) -> EngineParts:
    """Loads the model and builds all behind it. For the callbacks see ServingEngine.

    Raises ConfigError naming the flag.
    """
    require_installed(server_args.grammar_backend)  # not known only after minutes of loading
    executor = bring_up(server_args)
    config = executor.config
    page_size = server_args.page_size
    allocator = SlotAllocator(executor.num_slots, page_size)
    radix = RadixCache(page_size, allocator.free, enabled=not server_args.disable_radix_cache)
    cache = SequenceCache(radix, allocator)
    outbox = Outbox(server_args.stream_interval)
    engine = ServingEngine(
        executor.runner,
        cache,
        RowPool(executor.num_rows),
        EngineLimits(
            context_length=config.context_length,
            prefill_tokens=executor.prefill_tokens,
            chunked=server_args.chunked_prefill_size != -1,
            prefill_max_requests=server_args.prefill_max_requests,
            max_queued=server_args.max_queued_requests,
            conservativeness=server_args.schedule_conservativeness,
            schedule_policy=server_args.schedule_policy,
        ),
        eos_token_ids=config.eos_token_ids,
        outbox=outbox,
        random_seed=_random_seed(server_args),
        grammars=make_grammars(server_args, config.vocab_size, config.eos_token_ids),
        on_prefill=on_prefill,
        on_decode=on_decode,
        on_finish=on_finish,
    )
    timeline = Timeline(sm_clock=executor.clock_reader)
    gang = Gang(
        engine,
        executor.lanes,
        executor.dispatcher,
        timeline,
        time.monotonic,
        observe=executor.latencies.observe if executor.latencies else _unobserved,
    )
    return EngineParts(executor, cache, outbox, engine, timeline, gang)


def _unobserved(run: LaneRun) -> None:
    """Without a latency model nobody learns from runs."""


def _random_seed(server_args: ServerArgs) -> int:
    given = server_args.random_seed
    return int.from_bytes(os.urandom(8)) if given is None else given
