"""One benchmark, top to bottom: find the server, make the workload, run it, report."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import date
from typing import Any

import aiohttp
import numpy as np

from sglang.bench import goodput as goodput_of
from sglang.bench.arrivals import poisson_arrivals_s, trace_arrivals_s
from sglang.bench.clients import make_client
from sglang.bench.clients.base import Client
from sglang.bench.datasets import load_conversations
from sglang.bench.errors import BenchError
from sglang.bench.metrics import summarise
from sglang.bench.options import BenchOptions, ProfileOptions
from sglang.bench.plot import throughput_chart
from sglang.bench.prompts import PromptMaker, ordinary_ids_of, vocab_size_of_config
from sglang.bench.records import RequestRecord
from sglang.bench.report import render, render_failures, request_line
from sglang.bench.result_file import accept_length, append_result, result_of
from sglang.bench.runner import LoadRun, run_load
from sglang.bench.server import ServerControl
from sglang.bench.tokenizer import Tokenizer, load_tokenizer
from sglang.bench.workload import Conversation

EXIT_OK = 0
EXIT_NOTHING_COMPLETED = 1
EXIT_INTERRUPTED = 130

_REQUEST_TIMEOUT_S = 6 * 3600  # a queue under overload may be hours long
# Below the 5 s after which uvicorn closes an idle connection: one closed while we write to it
# would look like a failed request.
_IDLE_CONNECTION_S = 2.0
_READ_BUFFER_BYTES = 1 << 20
_WARMUP_TOKENS = 32


async def run_benchmark(options: BenchOptions) -> int:
    """Prints the report, appends the result and returns the exit code.

    Raises BenchError when the benchmark cannot start.
    """
    async with aiohttp.ClientSession(
        headers={**options.headers, "Content-Type": "application/json"},
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_IDLE_CONNECTION_S),
        timeout=aiohttp.ClientTimeout(total=_REQUEST_TIMEOUT_S),
        read_bufsize=_READ_BUFFER_BYTES,
    ) as http:
        server = ServerControl(http, options.base_url)
        first_model = await server.wait_ready(options.ready_timeout_s)
        model = options.served_model_name or options.model or first_model
        tokenizer, prompts = await _prepare_prompts(options, server, first_model)
        loaded = load_conversations(options, prompts)
        if loaded.note:
            print(loaded.note)
        conversations = loaded.conversations
        if not conversations:
            raise BenchError(f"{options.dataset_path}: the file holds no prompts")
        arrivals_s = _arrivals_s(options, conversations)
        client = make_client(http, options, model)
        await _warm_up(client, conversations[0], options.warmup_requests)
        if options.flush_cache:
            await server.flush_cache(options.flush_cache_timeout_s)
        if options.profile is not None:
            await server.start_profile(options.profile)
        run = await _measure(options, conversations, arrivals_s, client)
        if options.profile is not None:
            await _stop_profile(server, options.profile)
        server_info = await server.server_info()
    return _report(options, run, tokenizer, server_info)


async def _prepare_prompts(
    options: BenchOptions, server: ServerControl, first_model: str
) -> tuple[Tokenizer | None, PromptMaker]:
    """A tokenizer that cannot be loaded is fatal only where a prompt needs it."""
    if options.vocab_size is not None:
        ids = np.arange(options.vocab_size, dtype=np.int32)
        return None, PromptMaker(ids, None, send_ids=True)
    info = await server.model_info() or {}
    path = options.tokenizer or info.get("tokenizer_path") or options.model or first_model
    try:
        tokenizer = load_tokenizer(path)
    except BenchError as error:
        if options.tokenizer or options.tokenize_prompt:
            raise
        size = vocab_size_of_config(info.get("model_path") or path)
        if not options.speaks_native or size is None:
            print(f"Going on without a tokenizer: {error}", file=sys.stderr)
            return None, PromptMaker(None, None, send_ids=False)
        print(f"Sending token ids below {size}: {error}", file=sys.stderr)
        return None, PromptMaker(np.arange(size, dtype=np.int32), None, send_ids=True)
    by_ids = options.tokenize_prompt or (
        options.speaks_native and options.dataset_name == "mooncake"
    )
    return tokenizer, PromptMaker(ordinary_ids_of(tokenizer), tokenizer, send_ids=by_ids)


def _arrivals_s(options: BenchOptions, conversations: Sequence[Conversation]) -> list[float]:
    if options.use_trace_timestamps:
        return trace_arrivals_s(conversations, options.mooncake.slowdown_factor)
    return poisson_arrivals_s(len(conversations), options.request_rate, options.seed)


async def _warm_up(client: Client, conversation: Conversation, requests: int) -> None:
    first = conversation.turns[0]
    short = replace(first, max_tokens=min(first.max_tokens, _WARMUP_TOKENS))
    answers = await asyncio.gather(*(client.open_dialogue().ask(short) for _ in range(requests)))
    for answer in answers:
        if answer.error:
            raise BenchError(f"the warm-up request failed: {answer.error}")


async def _stop_profile(server: ServerControl, profile: ProfileOptions) -> None:
    """What was measured is worth its report even if no trace came of it."""
    try:
        await server.stop_profile(profile)
    except BenchError as error:
        print(error, file=sys.stderr)


async def _measure(
    options: BenchOptions,
    conversations: Sequence[Conversation],
    arrivals_s: Sequence[float],
    client: Client,
) -> LoadRun:
    total = sum(len(conversation.turns) for conversation in conversations)
    with _stop_on_interrupt() as stop, _progress(options, total) as advance:
        return await run_load(
            conversations,
            arrivals_s,
            client,
            max_concurrency=options.max_concurrency,
            stop=stop,
            on_record=advance,
        )


def _report(
    options: BenchOptions,
    run: LoadRun,
    tokenizer: Tokenizer | None,
    server_info: dict[str, Any] | None,
) -> int:
    summary = summarise(run.records, run.duration_s)
    goodput = None
    if options.objectives is not None:
        goodput = goodput_of.evaluate(run.records, options.objectives, run.duration_s)
    retokenized = None if tokenizer is None else _count_text_tokens(run.records, tokenizer)
    if run.interrupted:
        print("\nInterrupted: the report covers the requests that had ended.")
    print(
        render(
            options,
            run,
            summary,
            goodput,
            retokenized=retokenized,
            accept_length=accept_length(server_info),
        )
    )
    if options.plot_throughput:
        print(throughput_chart(run.records))
    failures = render_failures(run)
    if failures:
        print(failures, file=sys.stderr)
    result = result_of(
        options, run, summary, goodput, retokenized=retokenized, server_info=server_info
    )
    try:
        path = append_result(options, result, date.today())
    except OSError as error:
        raise BenchError(f"--output-file: {error}") from error
    print(f"Result appended to {path}")
    if run.interrupted:
        return EXIT_INTERRUPTED
    return EXIT_OK if summary.completed else EXIT_NOTHING_COMPLETED


def _count_text_tokens(records: Sequence[RequestRecord], tokenizer: Tokenizer) -> int:
    return sum(
        len(tokenizer.encode(record.answer.text, add_special_tokens=False))
        for record in records
        if record.ok
    )


@contextmanager
def _stop_on_interrupt() -> Iterator[asyncio.Event]:
    """The first Ctrl-C sets the event; a second one is an ordinary KeyboardInterrupt."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()

    def interrupt() -> None:
        stop.set()
        loop.remove_signal_handler(signal.SIGINT)

    loop.add_signal_handler(signal.SIGINT, interrupt)
    try:
        yield stop
    finally:
        loop.remove_signal_handler(signal.SIGINT)


@contextmanager
def _progress(options: BenchOptions, total: int) -> Iterator[Callable[[RequestRecord], None]]:
    from tqdm import tqdm

    with tqdm(total=total, disable=not options.show_progress, unit="req") as bar:

        def advance(record: RequestRecord) -> None:
            bar.update()
            if options.print_requests:
                bar.write(request_line(record))

        yield advance
