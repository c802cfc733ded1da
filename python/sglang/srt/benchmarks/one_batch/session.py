"""One run of bench_one_batch, top to bottom: bring up, probe the machine, measure, report."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from tqdm import tqdm

from drift_scheduler.lane import Phase
from drift_scheduler.partition import Partition
from sglang.srt.benchmarks.completion import rest
from sglang.srt.benchmarks.environment import describe, recorded_flags
from sglang.srt.benchmarks.one_batch.batches import Placement
from sglang.srt.benchmarks.one_batch.cases import (
    Case,
    DecodeCase,
    GenerationCase,
    PrefillCase,
    pool_tokens,
)
from sglang.srt.benchmarks.one_batch.floors import Rates
from sglang.srt.benchmarks.one_batch.machine import (
    CPU_SIZES,
    GPU_SIZES,
    MachineProbe,
    ProbeSizes,
)
from sglang.srt.benchmarks.one_batch.measure import Bench, Repetitions
from sglang.srt.benchmarks.one_batch.options import OneBatchOptions, Split
from sglang.srt.benchmarks.one_batch.report import (
    Row,
    decode_row,
    generation_row,
    limits_line,
    machine_lines,
    open_results,
    prefill_row,
    slicing,
    table,
)
from sglang.srt.errors import ConfigError
from sglang.srt.model_executor.bring_up import Executor, bring_up
from sglang.srt.profiling.nvml import GpuWatch, watch_device
from sglang.srt.server_args import resolve_device

# Several readings in all but the shortest cases.
WATCH_INTERVAL_S = 0.05
LaneRates = dict[tuple[Phase, Partition], Rates]


def run(options: OneBatchOptions, probe_sizes: ProbeSizes | None = None) -> list[Row]:
    """Measures, appends a line a case to the result file, prints the table; returns the lines.

    Raises ConfigError naming the flag, before the first measurement.
    """
    _check_splits(options)
    with contextlib.ExitStack() as stack:
        executor = _bring_up(options)
        stack.callback(executor.close)
        _check_contexts(options, executor)
        partitions = [executor.lanes.table.whole, *executor.lanes.table.splits]
        executor.kv_pool.keys.normal_()
        executor.kv_pool.values.normal_()
        rates = _probe(executor, partitions, probe_sizes)
        print(machine_lines(rates, "SMs" if executor.device.type == "cuda" else "cores"))
        watch = watch_device(executor.device, interval_s=WATCH_INTERVAL_S)
        if watch is not None:
            stack.enter_context(watch)
        session = _Session(options, executor, rates, watch)
        origin = _origin(options)
        rows = []
        with (
            open_results(options.result_file) as append,
            tqdm(
                total=session.count(partitions), unit="case", disable=not options.show_progress
            ) as bar,
        ):
            for row in session.rows(partitions, bar.update):
                rows.append(row | origin)
                append(rows[-1])
    print(table(rows))
    if line := limits_line(rows):
        print(line)
    print(f"Results appended to {options.result_file}")
    return rows


class _Session:
    """Measures every case on every partition, then the pairs. watch: None if not known."""

    def __init__(
        self,
        options: OneBatchOptions,
        executor: Executor,
        rates: LaneRates,
        watch: GpuWatch | None = None,
    ) -> None:
        self._options = options
        self._executor = executor
        self._rates = rates
        self._watch = watch
        self._bench = Bench(
            executor.runner,
            Repetitions(options.decode_steps, options.prefill_runs, options.warm_up),
            wait=lambda: rest(executor.lanes),
        )
        self._placement = Placement(
            executor.runner.slot_table,
            num_slots=executor.num_slots,
            page_size=options.server.page_size,
            decode_rows=_decode_rows(options),
            vocab_size=executor.config.vocab_size,
            seed=options.server.random_seed or 0,
        )
        self._slice_layers = min(options.slice_layers, executor.config.num_layers)

    def count(self, partitions: list[Partition]) -> int:
        options = self._options
        alone = len(options.decode) + len(options.prefill)
        pairs = len(options.decode) * len(options.prefill) if options.co_run else 0
        return alone * len(partitions) + pairs * (len(partitions) - 1) + len(options.generation)

    def rows(self, partitions: list[Partition], advance: Callable[[], Any]) -> Iterator[Row]:
        options = self._options
        for partition in partitions:
            alone_ms: dict[Case, float] = {}
            for step in options.decode:
                row = self._decode(step, partition)
                alone_ms[step] = row["ms"]
                advance()
                yield row
            for prompt in options.prefill:
                row = self._prefill(prompt, partition)
                alone_ms[prompt] = row["ms"]
                advance()
                yield row
            if options.co_run and not partition.exclusive:
                for step in options.decode:
                    for prompt in options.prefill:
                        decode, prefill = self._pair(step, prompt, partition)
                        yield decode | {"alone_ms": alone_ms[step]}
                        yield prefill | {"alone_ms": alone_ms[prompt]}
                        advance()
        for generation in options.generation:
            yield self._generate(generation)
            advance()

    def _decode(self, case: DecodeCase, partition: Partition) -> Row:
        lane = self._executor.lanes.lane(Phase.DECODE, partition)
        batch = self._placement.decode(case)
        started_s = time.monotonic()
        times = self._bench.decode(lane, batch)
        rates = self._rates[Phase.DECODE, partition]
        row = decode_row(self._executor.config, case, partition, rates, times)
        return row | self._gpu_state(started_s)

    def _prefill(self, case: PrefillCase, partition: Partition) -> Row:
        lane = self._executor.lanes.lane(Phase.PREFILL, partition)
        batch = self._placement.prefill(case)
        started_s = time.monotonic()
        ways = [self._bench.num_layers, self._slice_layers]
        whole, sliced = self._bench.prefill_in_turn(lane, batch, ways)
        rates = self._rates[Phase.PREFILL, partition]
        row = prefill_row(self._executor.config, case, partition, rates, whole)
        return row | slicing(whole, sliced, self._slice_layers) | self._gpu_state(started_s)

    def _pair(self, step: DecodeCase, prompt: PrefillCase, partition: Partition) -> tuple[Row, Row]:
        lanes, config = self._executor.lanes, self._executor.config
        steps, prompts = self._placement.decode(step), self._placement.prefill(prompt)
        started_s = time.monotonic()
        decode, prefill = self._bench.side_by_side(
            lanes.lane(Phase.DECODE, partition),
            steps,
            lanes.lane(Phase.PREFILL, partition),
            prompts,
            self._slice_layers,
        )
        state = self._gpu_state(started_s)
        decode_row_ = decode_row(
            config, step, partition, self._rates[Phase.DECODE, partition], decode
        )
        prefill_row_ = prefill_row(
            config, prompt, partition, self._rates[Phase.PREFILL, partition], prefill
        )
        return (
            decode_row_ | {"beside": f"prefill {prompt}"} | state,
            prefill_row_ | {"beside": f"decode {step}", "slice_layers": self._slice_layers} | state,
        )

    def _generate(self, case: GenerationCase) -> Row:
        lanes = self._executor.lanes
        whole = lanes.table.whole
        placed = self._placement.sequences(case.requests, case.length)
        ids = self._placement.draw_ids(case.requests * case.input_tokens)
        prompt = placed.fill(0, case.input_tokens, ids)
        started_s = time.monotonic()
        prefill = self._bench.prefill(
            lanes.lane(Phase.PREFILL, whole), prompt, self._bench.num_layers
        )
        # The prefill yields the first token; the last one that is generated is never computed.
        first, last = case.input_tokens + 1, case.length
        lengths = [*[first] * self._options.warm_up, *range(first, last)]
        steps = self._bench.steps(
            lanes.lane(Phase.DECODE, whole), [placed.step(length) for length in lengths]
        )
        spans = [step.span for step in steps[self._options.warm_up :]]
        row = generation_row(case, prefill.run.median / 1e3, spans)
        return row | self._gpu_state(started_s)

    def _gpu_state(self, since_s: float) -> Row:
        """The keys of GpuState; none if the GPU's driver is not heard, or without a GPU."""
        state = self._watch.typical(since_s) if self._watch else None
        return state.to_json() if state else {}


def _check_splits(options: OneBatchOptions) -> None:
    if not options.splits:
        return
    if resolve_device(options.server) == "cpu":
        total, unit = len(os.sched_getaffinity(0)), "cores"
    else:
        properties = torch.cuda.get_device_properties(options.server.base_gpu_id)
        total, unit = properties.multi_processor_count, "SMs"
    for split in options.splits:
        if split.prefill_sms + split.decode_sms != total:
            raise ConfigError(f"--partition {split} does not divide {total} {unit}")


def _bring_up(options: OneBatchOptions) -> Executor:
    """An executor with just the pool and rows that the cases take, and the splits asked for."""
    tokens, case = _pool_need(options)
    given = options.server.max_total_tokens
    if given is not None and given < tokens:
        raise ConfigError(f"--max-total-tokens {given}: {case} takes {tokens} tokens")
    prefill_rows = max((prompt.requests for prompt in options.prefill), default=0)
    with contextlib.ExitStack() as stack:
        args = dataclasses.replace(
            options.server,
            max_total_tokens=given or tokens,
            max_running_requests=_decode_rows(options) + prefill_rows,
            **_pdmux_flags(options.splits, stack),
        )
        try:
            return bring_up(args)
        except ConfigError as error:
            if given is None and str(error).startswith("--max-total-tokens"):
                raise ConfigError(
                    f"{case} takes {tokens} tokens of KV pool, which do not fit: choose a smaller "
                    "case with --decode, --prefill or --batch-size, or raise --mem-fraction-static"
                ) from error
            raise


def _pool_need(options: OneBatchOptions) -> tuple[int, str]:
    """Tokens of the KV pool, and the name of what needs them."""
    page_size = options.server.page_size
    needs = [(pool_tokens(case, page_size), str(case)) for case in options.cases]
    if options.co_run:
        step = max((pool_tokens(case, page_size), str(case)) for case in options.decode)
        prompt = max((pool_tokens(case, page_size), str(case)) for case in options.prefill)
        needs.append((step[0] + prompt[0], f"{step[1]} beside {prompt[1]}"))
    return max(needs)


def _decode_rows(options: OneBatchOptions) -> int:
    cases: tuple[DecodeCase | GenerationCase, ...] = (*options.decode, *options.generation)
    return max((case.requests for case in cases), default=1)


def _pdmux_flags(splits: tuple[Split, ...], stack: contextlib.ExitStack) -> dict[str, Any]:
    """Server flags that make lanes for the splits; their file lasts as long as the stack."""
    if not splits:
        return {}
    folder = stack.enter_context(tempfile.TemporaryDirectory())
    path = Path(folder) / "partitions.yaml"
    # The thresholds in the third column decide nothing here, but have to rise.
    rows = [[split.prefill_sms, split.decode_sms, i] for i, split in enumerate(splits)]
    path.write_text(yaml.safe_dump({"sm_group_num": len(rows) + 2, "manual_divisions": rows}))
    return {
        "enable_pdmux": True,
        "pdmux_config_path": str(path),
        # Any that needs no latency model, which would be measured first.
        "pd_multiplex_policy": "table",
    }


def _check_contexts(options: OneBatchOptions, executor: Executor) -> None:
    longest = max(options.cases, key=lambda case: case.length)
    if longest.length > executor.config.context_length:
        raise ConfigError(
            f"{longest} is longer than the context of {executor.config.context_length} tokens: "
            "choose a shorter case with --decode, --prefill or --input-len, or raise "
            "--context-length"
        )


def _probe(executor: Executor, partitions: list[Partition], sizes: ProbeSizes | None) -> LaneRates:
    on_gpu = executor.device.type == "cuda"
    sizes = sizes or (GPU_SIZES if on_gpu else CPU_SIZES)
    probe = MachineProbe(executor.device, executor.config.dtype, sizes)
    rates = {
        (phase, partition): probe.measure(executor.lanes.lane(phase, partition))
        for partition in partitions
        for phase in Phase
    }
    del probe
    if on_gpu:
        torch.cuda.empty_cache()
    return rates


def _origin(options: OneBatchOptions) -> Row:
    """What all rows of a run say."""
    return {
        "benchmark": "one_batch",
        "run_name": options.run_name,
        "model": options.server.model_path,
        "environment": describe()
        | {"flags": recorded_flags(options.command), "seed": options.server.random_seed or 0},
    }
