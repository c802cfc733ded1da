"""What one decode step costs the engine thread, the device left out.

    python -m benchmark.host_cost --requests 128 --steps 500 --out FILE

Drives the scheduler's own gang, serving engine and outbox with a runner that computes nothing.
Appends one JSON line a case: microseconds of a step, in all and by part.

    extend  a KV slot more for every request
    begin   who takes part, and the integers of the launch; without `extend`
    finish  tokens to their requests, stop checks, news to the outbox
    gang    polling, planning, launching and the timeline: the rest of the turn
    flush   the news as one message
    send    the message packed and handed to the socket
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zmq

from benchmark.command_line import command_line
from benchmark.serve_trace import append
from drift_scheduler.gang import Gang
from drift_scheduler.lane import Lane, Work
from drift_scheduler.lane_virtual import TimedWork, VirtualClock, VirtualLanes
from drift_scheduler.partition import PartitionTable
from drift_scheduler.policies.take_turns import TakeTurns
from drift_scheduler.timeline import Timeline
from sglang.srt.benchmarks.environment import describe
from sglang.srt.ipc import Receiver, Sender, ipc_directory
from sglang.srt.logprobs import NO_SCORES, BatchScores
from sglang.srt.managers.admission import EngineLimits
from sglang.srt.managers.cycle_collector import undisturbed
from sglang.srt.managers.jobs import DecodeBatch, PrefillBatch
from sglang.srt.managers.outbox import Outbox
from sglang.srt.managers.serving_engine import ServingEngine
from sglang.srt.mem_cache.radix_cache import RadixCache
from sglang.srt.mem_cache.sequence_cache import SequenceCache
from sglang.srt.mem_cache.slot_allocator import SlotAllocator
from sglang.srt.mem_cache.slot_table import RowPool
from sglang.srt.messages import GenerateRequest, ToDetokenizer, token_ids
from sglang.srt.model_executor.host_batch import HostBatch, SampleWish
from sglang.srt.sampling_params import SamplingParams

WARM_UP_STEPS = 50
START_LIMIT_TURNS = 10_000
EOS = 2
TOKEN = 1234
PARTS = ("extend", "begin", "finish", "gang", "flush", "send")


@dataclass(frozen=True, slots=True)
class Case:
    requests: int
    prompt_tokens: int
    page_size: int
    steps: int

    @property
    def output_tokens(self) -> int:
        """Nobody finishes while we measure."""
        return self.steps + WARM_UP_STEPS + 100


class NullRunner:
    """A Runner whose work is done at once; every token is the same."""

    num_layers = 32

    def start(self, batch: HostBatch) -> NullRun:
        return NullRun(len(batch.samples))

    def forget(self, wish: SampleWish) -> None:
        """Nothing is kept."""


class NullRun:
    indivisible = False

    def __init__(self, samples: int) -> None:
        self._samples = samples

    def slice_work(self, lane: Lane, first: int, last: int) -> Work:
        return TimedWork(0.0)

    def tokens(self) -> list[int]:
        return [TOKEN] * self._samples

    def scores(self) -> BatchScores:
        return NO_SCORES


class Stopwatch:
    """Adds up the time that calls of watched methods take, by name."""

    def __init__(self) -> None:
        self.spent_ns: dict[str, int] = {}

    def watch(self, owner: object, method: str) -> None:
        """From now on calls of owner.method count."""
        inner: Callable[..., Any] = getattr(owner, method)

        def timed(*args: Any) -> Any:
            start_ns = time.perf_counter_ns()
            try:
                return inner(*args)
            finally:
                self.spent_ns[method] += time.perf_counter_ns() - start_ns

        self.spent_ns[method] = 0
        setattr(owner, method, timed)

    def take(self) -> dict[str, int]:
        """Nanoseconds since the last `take`."""
        taken = self.spent_ns.copy()
        self.spent_ns = dict.fromkeys(taken, 0)
        return taken


class Bench:
    """The engine thread's parts, with every request of the case in decode."""

    def __init__(self, case: Case, sender: Sender) -> None:
        context_length = case.prompt_tokens + case.output_tokens
        pages = case.requests * -(-context_length // case.page_size) + 1
        allocator = SlotAllocator(pages * case.page_size, case.page_size)
        cache = SequenceCache(RadixCache(case.page_size, allocator.free), allocator)
        limits = EngineLimits(context_length, prefill_tokens=8192, chunked=True)
        table = PartitionTable(132)
        clock = VirtualClock()
        self._outbox = Outbox()
        self._sender = sender
        self._engine = ServingEngine(
            NullRunner(),
            cache,
            RowPool(case.requests + 1),
            limits,
            eos_token_ids=frozenset({EOS}),
            outbox=self._outbox,
            random_seed=0,
        )
        lanes = VirtualLanes(table, clock)
        self._gang: Gang[PrefillBatch, DecodeBatch] = Gang(
            self._engine, lanes, TakeTurns(table), Timeline(), clock
        )
        self._watch = Stopwatch()
        for owner, method in [
            (cache, "extend_each"),
            (self._engine, "begin_decode"),
            (self._engine, "finish_decode"),
            (self._gang, "turn"),
            (self._outbox, "flush"),
            (self._sender, "send"),
        ]:
            self._watch.watch(owner, method)
        self._start(case)

    def _start(self, case: Case) -> None:
        tokens = np.random.default_rng(0).integers(3, 1000, (case.requests, case.prompt_tokens))
        for i, prompt in enumerate(tokens.tolist()):
            sampling = SamplingParams(max_new_tokens=case.output_tokens)
            self._engine.add(
                GenerateRequest(
                    rid=f"{i:032x}", input_ids=token_ids(prompt), sampling=sampling, arrival_s=0.0
                )
            )
        for _ in range(START_LIMIT_TURNS):
            self.step()
            if self._engine.running == case.requests:
                return
        raise RuntimeError(f"{self._engine.running} of {case.requests} requests decode")

    def step(self) -> dict[str, float]:
        """One turn of the scheduler's loop; microseconds by part."""
        self._watch.take()
        self._gang.turn()
        batch = self._outbox.flush()
        if batch is not None:
            self._sender.send(batch)
        us = {name: spent_ns / 1000 for name, spent_ns in self._watch.take().items()}
        return {
            "extend": us["extend_each"],
            "begin": us["begin_decode"] - us["extend_each"],
            "finish": us["finish_decode"],
            "gang": us["turn"] - us["begin_decode"] - us["finish_decode"],
            "flush": us["flush"],
            "send": us["send"],
        }


def measure(case: Case) -> dict[str, Any]:
    """Percentiles of `case.steps` steps, in all and by part, in microseconds."""
    with ipc_directory() as ipc, zmq.Context() as context:
        receiver: Receiver[Any] = Receiver(context, ipc.detokenizer, ToDetokenizer)
        sender = Sender(context, ipc.detokenizer)
        bench = Bench(case, sender)
        steps = []
        try:
            with undisturbed():  # as a server is
                for index in range(WARM_UP_STEPS + case.steps):
                    step = bench.step()
                    receiver.drain()
                    if index >= WARM_UP_STEPS:
                        steps.append([step[part] for part in PARTS])
        finally:
            sender.close()
            receiver.close()
    by_part = np.asarray(steps)
    return {
        "total": _percentiles(by_part.sum(axis=1)),
        **{part: _percentiles(by_part[:, i]) for i, part in enumerate(PARTS)},
    }


def _percentiles(us: Any) -> dict[str, float]:
    p50, p99 = np.percentile(us, [50, 99]).round(1).tolist()
    return {"p50_us": p50, "p99_us": p99}


def summary(row: Mapping[str, Any]) -> str:
    """The row in two lines for people."""
    total = row["us"]["total"]
    parts = ", ".join(f"{part} {row['us'][part]['p50_us']:.0f}" for part in PARTS)
    return (
        f"{row['requests']} requests, pages of {row['page_size']}: p50 {total['p50_us']:.0f} us, "
        f"p99 {total['p99_us']:.0f} us a step\n  p50 by part: {parts}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = command_line("host_cost", __doc__)
    parser.add_argument("--requests", type=int, nargs="+", default=[128])
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--page-size", type=int, nargs="+", default=[1])
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--out", type=Path, required=True, help="JSON lines file to append to")
    given = parser.parse_args(argv)
    for requests in given.requests:
        for page_size in given.page_size:
            case = Case(requests, given.prompt_tokens, page_size, given.steps)
            row = {
                "benchmark": "host_cost",
                "requests": case.requests,
                "prompt_tokens": case.prompt_tokens,
                "page_size": case.page_size,
                "steps": case.steps,
                "us": measure(case),
                "environment": describe(),
            }
            append(row, given.out)
            print(summary(row), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
