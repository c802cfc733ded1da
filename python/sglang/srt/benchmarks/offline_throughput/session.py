"""One run of bench_offline_throughput: build the engine, give it all prompts, report."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from tqdm import tqdm

from drift_scheduler.lane import LaneTimeout, Phase
from sglang.bench.datasets import load_conversations
from sglang.bench.errors import BenchError
from sglang.bench.options import BenchOptions
from sglang.bench.prompts import PromptMaker, ordinary_ids_of
from sglang.bench.tokenizer import Tokenizer
from sglang.bench.workload import Turn
from sglang.srt.benchmarks.completion import rest
from sglang.srt.benchmarks.environment import describe, recorded_flags
from sglang.srt.benchmarks.offline_throughput.options import OfflineOptions
from sglang.srt.errors import ConfigError
from sglang.srt.managers.cycle_collector import undisturbed
from sglang.srt.managers.engine_parts import EngineParts, build_engine
from sglang.srt.messages import GenerateRequest, TokenBatch, token_ids
from sglang.srt.model_source import resolve_model_source
from sglang.srt.sampling_params import SamplingParams
from sglang.srt.server_args import ServerArgs
from sglang.srt.tokenizer import load_tokenizer

# Enough to run every kind of work once; the prefix cache is emptied afterwards.
WARM_UP_REQUESTS = 4
WARM_UP_TOKENS = 16
_ID_DATASETS = ("random-ids", "generated-shared-prefix", "mooncake")


@dataclass(slots=True)
class Totals:
    """What became of the requests. errors: one message for each that was not served."""

    completed: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    retractions: int = 0
    errors: list[str] = dataclasses.field(default_factory=list)

    def add(self, batch: TokenBatch) -> int:
        """Counts the requests that end with this batch, and returns how many do."""
        ended = 0
        for i, finish in enumerate(batch.finish):
            if finish is None:
                continue
            ended += 1
            if finish.type == "abort":
                self.errors.append(finish.message or "aborted")
                continue
            self.completed += 1
            self.input_tokens += batch.prompt_tokens[i]
            self.output_tokens += batch.completion_tokens[i]
            self.cached_tokens += batch.cached_tokens[i]
            self.retractions += batch.retractions[i]
        return ended


def run(options: OfflineOptions) -> dict[str, Any]:
    """Prints the report, appends it to the result file and returns it.

    Raises ConfigError or BenchError naming the flag or file.
    """
    parts = build_engine(options.server)
    try:
        turns = _turns(options.bench, _prompt_maker(options, parts))
        if not options.skip_warmup:
            _warm_up(options, parts, turns)
        requests = _requests(options.bench, turns)
        with (
            undisturbed(),  # as a server is
            tqdm(total=len(requests), unit="req", disable=not options.bench.show_progress) as bar,
        ):
            busy_before = _busy(parts)
            started_s = time.perf_counter()
            totals = generate(parts, requests, options.server.watchdog_timeout, bar.update)
            latency_s = time.perf_counter() - started_s
        parts.engine.check()
        busy = {name: after - busy_before[name] for name, after in _busy(parts).items()}
        result = _result(options, totals, latency_s, busy)
    finally:
        parts.executor.close()
    print(report(result))
    if totals.errors:
        print(f"{len(totals.errors)} requests were not served. The first: {totals.errors[0]}")
    if options.result_file is not None:
        _append(result, options.result_file)
    return result


def generate(
    parts: EngineParts,
    requests: Sequence[GenerateRequest],
    stall_limit_s: float,
    on_ended: Callable[[int], Any] = lambda count: None,
) -> Totals:
    """Queues all requests and returns when the last has ended.

    Raises LaneTimeout when nothing happens for stall_limit_s.
    """
    totals = Totals()
    for request in requests:
        parts.engine.add(request)
    progress_s = time.monotonic()
    while True:
        progressed = parts.gang.turn()
        batch = parts.outbox.flush()
        if batch is not None:
            on_ended(totals.add(batch))
        if parts.engine.idle and parts.gang.idle:
            return totals
        if progressed:
            progress_s = time.monotonic()
        elif time.monotonic() - progress_s > stall_limit_s:
            raise LaneTimeout(f"no progress for {stall_limit_s:.0f} s (--watchdog-timeout)")
        else:
            rest(parts.executor.lanes)


def _prompt_maker(options: OfflineOptions, parts: EngineParts) -> PromptMaker:
    """Prompts of token ids. Data sets of ids make do without a tokenizer."""
    every_id = np.arange(parts.executor.config.vocab_size, dtype=np.int32)
    without = PromptMaker(every_id, None, send_ids=True)
    if options.server.skip_tokenizer_init:
        return without
    try:
        tokenizer = _load_tokenizer(options.server)
    except ConfigError:
        if options.server.tokenizer_path or options.bench.dataset_name not in _ID_DATASETS:
            raise
        return without
    return PromptMaker(ordinary_ids_of(tokenizer), tokenizer, send_ids=True)


def _load_tokenizer(args: ServerArgs) -> Tokenizer:
    source = resolve_model_source(
        args.model_path,
        load_format=args.load_format,
        revision=args.revision,
        download_dir=args.download_dir,
    )
    loaded = load_tokenizer(
        source,
        tokenizer_path=args.tokenizer_path,
        tokenizer_mode=args.tokenizer_mode,
        trust_remote_code=args.trust_remote_code,
    )
    return cast(Tokenizer, loaded)


def _turns(bench: BenchOptions, prompts: PromptMaker) -> list[Turn]:
    """One turn a prompt: without a client, nobody could ask the next one."""
    loaded = load_conversations(bench, prompts)
    if loaded.note:
        print(loaded.note)
    if any(len(conversation.turns) > 1 for conversation in loaded.conversations):
        raise BenchError(
            f"--dataset-name {bench.dataset_name}: a conversation has several turns, which only "
            "bench_serving can hold"
        )
    if not loaded.conversations:
        raise BenchError(f"--dataset-name {bench.dataset_name}: there are no prompts")
    return [conversation.turns[0] for conversation in loaded.conversations]


def _requests(bench: BenchOptions, turns: Sequence[Turn]) -> list[GenerateRequest]:
    requests = []
    for index, turn in enumerate(turns):
        assert isinstance(turn.prompt, np.ndarray), "prompts are made of token ids"
        requests.append(
            GenerateRequest(
                rid=f"prompt-{index}",
                input_ids=token_ids(turn.prompt.tolist()),
                sampling=SamplingParams(
                    max_new_tokens=turn.max_tokens,
                    temperature=bench.temperature,
                    top_p=bench.top_p,
                    ignore_eos=bench.ignore_eos,
                ),
                arrival_s=time.monotonic(),
            )
        )
    return requests


def _warm_up(options: OfflineOptions, parts: EngineParts, turns: Sequence[Turn]) -> None:
    short = [
        dataclasses.replace(turn, max_tokens=min(turn.max_tokens, WARM_UP_TOKENS))
        for turn in turns[:WARM_UP_REQUESTS]
    ]
    generate(parts, _requests(options.bench, short), options.server.watchdog_timeout)
    parts.engine.reset_cache()


def _busy(parts: EngineParts) -> dict[str, float]:
    """Seconds since start in which each lane, and both, had work."""
    timeline = parts.timeline
    return {
        "prefill_busy_s": timeline.busy_s(Phase.PREFILL),
        "decode_busy_s": timeline.busy_s(Phase.DECODE),
        "both_busy_s": timeline.both_busy_s,
    }


def _result(
    options: OfflineOptions, totals: Totals, latency_s: float, busy: Mapping[str, float]
) -> dict[str, Any]:
    """SGLang's keys, and what only this engine can tell behind them."""
    return {
        "backend": "engine",
        "successful_requests": totals.completed,
        "total_latency": latency_s,
        "total_input_tokens": totals.input_tokens,
        "total_output_tokens": totals.output_tokens,
        "request_throughput": totals.completed / latency_s,
        "input_throughput": totals.input_tokens / latency_s,
        "output_throughput": totals.output_tokens / latency_s,
        "total_throughput": (totals.input_tokens + totals.output_tokens) / latency_s,
        "failed_requests": len(totals.errors),
        "cached_tokens": totals.cached_tokens,
        "retractions": totals.retractions,
        **busy,
        "model": options.server.model_path,
        "dataset_name": options.bench.dataset_name,
        "environment": describe()
        | {"flags": recorded_flags(options.command), "seed": options.bench.seed},
    }


def _append(result: dict[str, Any], path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(result) + "\n")
    except OSError as error:
        raise ConfigError(f"--result-filename: {error}") from error


_LABELS = (
    ("Backend:", "backend"),
    ("Successful requests:", "successful_requests"),
    ("Benchmark duration (s):", "total_latency"),
    ("Total input tokens:", "total_input_tokens"),
    ("Total generated tokens:", "total_output_tokens"),
    ("Request throughput (req/s):", "request_throughput"),
    ("Input token throughput (tok/s):", "input_throughput"),
    ("Output token throughput (tok/s):", "output_throughput"),
    ("Total token throughput (tok/s):", "total_throughput"),
    ("Cached input tokens:", "cached_tokens"),
    ("Prefill lane busy (s):", "prefill_busy_s"),
    ("Decode lane busy (s):", "decode_busy_s"),
    ("Both lanes busy (s):", "both_busy_s"),
)


def report(result: dict[str, Any]) -> str:
    """Several lines, under the labels that scripts look for."""
    lines = [" Offline Throughput Benchmark Result ".center(56, "=")]
    for label, key in _LABELS:
        value = result[key]
        lines.append(f"{label:<40} {f'{value:.2f}' if isinstance(value, float) else value}")
    return "\n".join([*lines, "=" * 56])
