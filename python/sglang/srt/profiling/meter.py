"""EngineMeter: times batches on the engine's lanes, launched as the serving loop launches them.

Decode steps and short prefills on the whole device replay their graphs; on a split a prefill goes
in slices of a few layers, the gaps between them included.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch

from drift_scheduler.lane import LaneProvider, Phase
from drift_scheduler.partition import Partition
from drift_scheduler.policies.slices import MAX_SLICE_LAYERS
from drift_scheduler.profile_grid import Limits
from drift_scheduler.profile_pace import WARM_UP
from drift_scheduler.profiler import DecodeBatch, Measured, PrefillBatch, Repetitions
from sglang.srt.benchmarks.completion import rest
from sglang.srt.benchmarks.one_batch.batches import Placement
from sglang.srt.benchmarks.one_batch.cases import DecodeCase, PrefillCase
from sglang.srt.benchmarks.one_batch.measure import Bench, Distribution
from sglang.srt.benchmarks.one_batch.measure import Repetitions as BenchRepetitions
from sglang.srt.model_executor.host_batch import HostBatch
from sglang.srt.model_executor.model_runner import ModelRunner, Runner
from sglang.srt.profiling.nvml import NvmlClock

# For the clock: several readings in all but the shortest measurements.
CLOCK_INTERVAL_S = 0.02


class EngineMeter:
    """Has runner and lanes for itself; wait: returns when work may have finished."""

    def __init__(
        self,
        runner: Runner,
        lanes: LaneProvider,
        placement: Placement,
        wait: Callable[[], None],
        clock: NvmlClock | None = None,
    ) -> None:
        self._runner = runner
        self._lanes = lanes
        self._placement = placement
        self._wait = wait
        self._clock = clock

    def decode(self, partition: Partition, batch: DecodeBatch, times: int) -> Measured:
        started_s = time.monotonic()
        lane = self._lanes.lane(Phase.DECODE, partition)
        host = self._placement.decode(_decode_case(batch))
        taken = self._bench(decode_steps=max(times, 2)).decode(lane, host)
        return _measured(taken.step, self._mhz(started_s))

    def prefill(self, partition: Partition, batch: PrefillBatch, times: int) -> Measured:
        started_s = time.monotonic()
        lane = self._lanes.lane(Phase.PREFILL, partition)
        host = self._placement.prefill(_prefill_case(batch))
        taken = self._bench(prefill_runs=times).prefill(lane, host, self._slice_layers(partition))
        return _measured(taken.run, self._mhz(started_s), self._runner.num_layers)

    def fused(self, decode: DecodeBatch, prefill: PrefillBatch, times: int) -> Measured:
        started_s = time.monotonic()
        lane = self._lanes.lane(Phase.DECODE, self._lanes.table.whole)
        host = riding(
            self._placement.decode(_decode_case(decode)),
            self._placement.prefill(_prefill_case(prefill)),
        )
        steps = self._bench().steps(lane, [host] * (WARM_UP + times))
        taken = Distribution.of([step.span.duration_s for step in steps[WARM_UP:]])
        return _measured(taken, self._mhz(started_s))

    def side_by_side(
        self,
        partition: Partition,
        decode: DecodeBatch,
        prefill: PrefillBatch,
        repetitions: Repetitions,
    ) -> tuple[Measured, Measured]:
        started_s = time.monotonic()
        bench = self._bench(repetitions.decode_steps, repetitions.prefill_runs)
        step, run = bench.side_by_side(
            self._lanes.lane(Phase.DECODE, partition),
            self._placement.decode(_decode_case(decode)),
            self._lanes.lane(Phase.PREFILL, partition),
            self._placement.prefill(_prefill_case(prefill)),
            self._slice_layers(partition),
        )
        mhz = self._mhz(started_s)
        return (
            _measured(step.step, mhz),
            _measured(run.run, mhz, self._runner.num_layers),
        )

    def _bench(self, decode_steps: int = 2, prefill_runs: int = 1) -> Bench:
        repetitions = BenchRepetitions(decode_steps, prefill_runs, WARM_UP)
        return Bench(self._runner, repetitions, self._wait)

    def _slice_layers(self, partition: Partition) -> int:
        layers = self._runner.num_layers
        return layers if partition.exclusive else min(MAX_SLICE_LAYERS, layers)

    def _mhz(self, since_s: float) -> float | None:
        return self._clock.mean_mhz(since_s) if self._clock else None


def engine_meter(
    runner: ModelRunner,
    lanes: LaneProvider,
    limits: Limits,
    *,
    clock: NvmlClock | None = None,
    seed: int = 0,
) -> EngineMeter:
    """Of an engine that serves nothing yet: slots, rows and pool are used as if they were free."""
    pool = runner.kv_pool
    if runner.device.type == "cuda":
        # Zeros draw less power than numbers do, and a GPU at its power limit slows down. A CPU
        # has no such limit, and its pool takes no memory until it is written.
        for layer in range(runner.num_layers):
            for part in pool.layer(layer):
                part.normal_()
        torch.cuda.synchronize(runner.device)
    placement = Placement(
        runner.slot_table,
        num_slots=limits.pool_tokens + limits.page_size,
        page_size=limits.page_size,
        decode_rows=limits.requests - limits.prompts,
        vocab_size=runner.model.config.vocab_size,
        seed=seed,
    )
    return EngineMeter(runner, lanes, placement, lambda: rest(lanes), clock)


def riding(step: HostBatch, prompts: HostBatch) -> HostBatch:
    """The decode step with the prompts' tokens behind its own."""

    def joined(name: str) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
        return np.concatenate([getattr(step, name), getattr(prompts, name)])

    return HostBatch(
        decode_reqs=step.decode_reqs,
        input_ids=prompts.input_ids,
        positions=joined("positions"),
        token_slots=joined("token_slots"),
        rows=joined("rows"),
        seq_lens=joined("seq_lens"),
        new_lens=joined("new_lens"),
        table_index=joined("table_index"),
        table_slots=joined("table_slots"),
        samples=step.samples + prompts.samples,
        sample_tokens=np.concatenate(
            [step.sample_tokens, prompts.sample_tokens + len(step.token_slots)]
        ),
        sample_rows=joined("sample_rows"),
    )


def _measured(taken: Distribution, clock_mhz: float | None, layers: int = 0) -> Measured:
    return Measured(taken.median / 1e3, clock_mhz, layers, taken.largest / 1e3)


def _decode_case(batch: DecodeBatch) -> DecodeCase:
    return DecodeCase(batch.requests, batch.context_each)


def _prefill_case(batch: PrefillBatch) -> PrefillCase:
    return PrefillCase(batch.new, batch.cached, batch.prompts)
