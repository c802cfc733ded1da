"""What a token costs between the scheduler and its client, and how long it takes.

    python -m benchmark.message_path --streams 256 --tokens-per-s 50 --seconds 10 --out FILE

Starts a real server (HTTP process and detokenizer) with a scripted scheduler in the place of the
engine, which makes one token for every stream at each step. This process is the client: one
connection a stream. With --arrivals, so many further requests of --prompt-tokens ids a second come
meanwhile: what they cost the streams of others. Appends one JSON line: tokens delivered, the time
from the scheduler's send to the client's receive, and the CPU time of each process.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import json
import multiprocessing
import re
import socket
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import uvloop
import zmq

from benchmark.command_line import command_line
from benchmark.serve_trace import append
from benchmark.smollm2 import model_path
from sglang.srt.benchmarks.environment import describe
from sglang.srt.entrypoints.http_server import launch
from sglang.srt.entrypoints.start_up import Parts
from sglang.srt.ipc import IpcNames, announce_ready
from sglang.srt.managers.scripted_scheduler import ScriptedScheduler
from sglang.srt.messages import GenerateRequest
from sglang.srt.server_args import ServerArgs

START_LIMIT_S = 120.0
FIRST_TOKEN_LIMIT_S = 60.0
STOP_LIMIT_S = 30.0
SETTLE_S = 1.0  # between the last stream's first token and the measurement

PROMPT = "Tell me of the sea. " * 8
ENDPOINTS: dict[str, tuple[str, dict[str, Any]]] = {
    "generate": ("/generate", {"text": PROMPT}),
    "completions": ("/v1/completions", {"prompt": PROMPT}),
    "chat": ("/v1/chat/completions", {"messages": [{"role": "user", "content": PROMPT}]}),
}


@dataclass(frozen=True, slots=True)
class Case:
    """Every stream gets `tokens_per_s` tokens a second for `seconds`. Meanwhile `arrivals` other
    requests a second bring a prompt of `prompt_tokens` ids."""

    endpoint: str
    streams: int
    tokens_per_s: float
    seconds: float
    arrivals: float = 0.0
    prompt_tokens: int = 0

    def request(self) -> tuple[str, dict[str, Any]]:
        """Path and body; the answer is long enough to outlast the measurement."""
        path, body = ENDPOINTS[self.endpoint]
        limit = int((self.seconds + SETTLE_S + FIRST_TOKEN_LIMIT_S) * self.tokens_per_s)
        if self.endpoint == "generate":
            sampling = {"max_new_tokens": limit}
            return path, {**body, "stream": True, "sampling_params": sampling}
        usage = {"include_usage": True, "continuous_usage_stats": True}
        return path, {**body, "stream": True, "max_tokens": limit, "stream_options": usage}


def ordinary_pieces(request: GenerateRequest) -> Iterator[int]:
    """Token ids behind the special and byte tokens of the vocabulary."""
    return itertools.cycle(range(1000, 9000))


def now_us() -> int:
    """The same clock in every process of this machine."""
    return time.monotonic_ns() // 1000


def run_steady_scheduler(
    args: ServerArgs, ipc: IpcNames, rank: int, ready: Connection, *, token_interval_s: float
) -> None:
    """Process main. The time of sending travels to the client as the number of cached tokens."""
    with zmq.Context() as context:
        scheduler = ScriptedScheduler(
            context, ipc, ordinary_pieces, token_interval_s, cached_tokens=now_us
        )
        announce_ready(ready, {})
        scheduler.run()


def serve(model: Path, port: int, token_interval_s: float) -> None:
    """Process main of the server."""
    args = ServerArgs(
        model_path=str(model),
        port=port,
        device="cpu",
        log_level="warning",
        enable_cache_report=True,
        skip_server_warmup=True,
    )
    scheduler = functools.partial(run_steady_scheduler, token_interval_s=token_interval_s)
    sys.exit(launch(args, Parts(scheduler)))


@contextmanager
def server(model: Path, token_interval_s: float) -> Iterator[tuple[int, BaseProcess]]:
    """Port and process of a server that answers."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    process = multiprocessing.get_context("spawn").Process(
        target=serve, args=(model, port, token_interval_s)
    )
    process.start()
    try:
        _wait_healthy(process, port)
        yield port, process
    finally:
        process.terminate()
        process.join(STOP_LIMIT_S)
        process.kill()


def _wait_healthy(process: BaseProcess, port: int) -> None:
    deadline_s = time.monotonic() + START_LIMIT_S
    while time.monotonic() < deadline_s:
        if not process.is_alive():
            raise RuntimeError(f"the server left with code {process.exitcode} at start")
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.25)
    raise RuntimeError(f"the server was not ready after {START_LIMIT_S:.0f} s")


@dataclass(slots=True)
class Received:
    """What all streams of the client have received since the last `clear`."""

    tokens: int = 0
    events: int = 0
    bytes: int = 0
    delays_us: list[int] = field(default_factory=list)

    def clear(self) -> None:
        self.tokens = self.events = self.bytes = 0
        self.delays_us.clear()


class Stream(asyncio.Protocol):
    """The events of one request, parsed no further than the benchmark needs."""

    def __init__(self, received: Received) -> None:
        self._received = received
        self._rest = b""
        self._tokens = 0
        self.started: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def data_received(self, data: bytes) -> None:
        arrived_us = now_us()
        received = self._received
        received.bytes += len(data)
        *events, self._rest = (self._rest + data).split(b"\n\n")
        for event in events:
            tokens = _number(event, b'"completion_tokens":')
            if tokens is None or tokens == self._tokens:
                continue  # the chat role, which carries no token
            received.tokens += tokens - self._tokens
            received.events += 1
            received.delays_us.append(arrived_us - (_number(event, b'"cached_tokens":') or 0))
            self._tokens = tokens
            if not self.started.done():
                self.started.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.started.done():
            self.started.set_exception(RuntimeError(f"a stream ended at once: {self._rest!r}"))


_DIGITS = re.compile(rb"\d+")


def _number(event: bytes, key: bytes) -> int | None:
    at = event.rfind(key)
    digits = _DIGITS.match(event, at + len(key)) if at >= 0 else None
    return int(digits[0]) if digits else None


def http_request(port: int, path: str, body: Mapping[str, Any]) -> bytes:
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
    return head.encode() + b"Content-Length: %d\r\n\r\n" % len(content) + content


async def stream_all(
    case: Case, port: int, processes: Mapping[str, psutil.Process]
) -> dict[str, Any]:
    """Opens all streams, then measures while they run."""
    loop = asyncio.get_running_loop()
    path, body = case.request()
    request = http_request(port, path, body)
    received = Received()
    opened_s = time.monotonic()
    pairs = [
        await loop.create_connection(lambda: Stream(received), "127.0.0.1", port)
        for _ in range(case.streams)
    ]
    for transport, _ in pairs:
        transport.write(request)
    async with asyncio.timeout(FIRST_TOKEN_LIMIT_S):
        await asyncio.gather(*(stream.started for _, stream in pairs))
    all_started_s = time.monotonic() - opened_s
    await asyncio.sleep(SETTLE_S)

    arriving = asyncio.create_task(_arrive(case, port)) if case.arrivals else None
    received.clear()
    cpu_before = {name: _cpu_s(process) for name, process in processes.items()}
    begin_s = time.monotonic()
    await asyncio.sleep(case.seconds)
    seconds = time.monotonic() - begin_s
    if arriving is not None:
        arriving.cancel()
        with suppress(asyncio.CancelledError):
            await arriving
    cpu = {name: (_cpu_s(p) - cpu_before[name]) / seconds for name, p in processes.items()}
    delays_ms = np.asarray(received.delays_us) / 1000
    result = {
        "all_started_s": all_started_s,
        "tokens_per_s": received.tokens / seconds,
        "delivered_share": received.tokens / seconds / (case.streams * case.tokens_per_s),
        "tokens_per_event": received.tokens / max(received.events, 1),
        "mb_per_s": received.bytes / seconds / 1e6,
        "delay_p50_ms": float(np.percentile(delays_ms, 50)),
        "delay_p99_ms": float(np.percentile(delays_ms, 99)),
        "delay_p999_ms": float(np.percentile(delays_ms, 99.9)),
        "cpu_s_per_s": cpu,
    }
    for transport, _ in pairs:
        transport.close()
    await asyncio.sleep(SETTLE_S)  # the server notices and aborts
    return result


async def _arrive(case: Case, port: int) -> None:
    """Requests at an even pace, until cancelled; each wants one token."""
    ids = [1000 + i % 8000 for i in range(case.prompt_tokens)]
    body = {"input_ids": ids, "sampling_params": {"max_new_tokens": 1}}
    request = http_request(port, "/generate", body)

    async def ask() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(request)
        await reader.readuntil(b"\r\n\r\n")
        writer.close()

    async with asyncio.TaskGroup() as asked:
        while True:
            asked.create_task(ask())
            await asyncio.sleep(1 / case.arrivals)


def _cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def _processes(http_server: int) -> dict[str, psutil.Process]:
    """By role; children of the server have their role as their title."""
    found = {"http": psutil.Process(http_server), "client": psutil.Process()}
    for child in found["http"].children():
        role = child.cmdline()[0].partition("sglang::")[2]
        if role:
            found[role] = child
    return found


def run(case: Case, model: Path) -> dict[str, Any]:
    """One case against a fresh server, as a row."""
    with server(model, 1 / case.tokens_per_s) as (port, process):
        assert process.pid is not None
        processes = _processes(process.pid)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            result = runner.run(stream_all(case, port, processes))
    return {
        "benchmark": "message_path",
        "model": model.name,
        "endpoint": case.endpoint,
        "streams": case.streams,
        "tokens_per_s_each": case.tokens_per_s,
        "seconds": case.seconds,
        "arrivals_per_s": case.arrivals,
        "prompt_tokens": case.prompt_tokens,
        **result,
        "environment": describe(),
    }


def summary(row: Mapping[str, Any]) -> str:
    """The row in two lines for people."""
    cpu = ", ".join(f"{name} {share:.2f}" for name, share in row["cpu_s_per_s"].items())
    return (
        f"{row['endpoint']} {row['streams']} streams: {row['tokens_per_s']:.0f} tokens/s "
        f"({row['delivered_share']:.0%}, {row['tokens_per_event']:.2f} an event), delay p50 "
        f"{row['delay_p50_ms']:.1f} ms, p99 {row['delay_p99_ms']:.1f} ms, "
        f"p99.9 {row['delay_p999_ms']:.1f} ms, "
        f"{row['mb_per_s']:.1f} MB/s, all started after {row['all_started_s']:.2f} s\n"
        f"  CPU seconds a second: {cpu}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = command_line("message_path", __doc__)
    parser.add_argument("--endpoint", nargs="+", choices=ENDPOINTS, default=["generate", "chat"])
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--tokens-per-s", type=float, default=50.0, help="of one stream")
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--arrivals", type=float, default=0.0, help="of other requests a second")
    parser.add_argument("--prompt-tokens", type=int, default=16_000, help="of each of them")
    parser.add_argument("--model", type=Path, help="whose tokenizer is used; default SmolLM2")
    parser.add_argument("--out", type=Path, required=True, help="JSON lines file to append to")
    given = parser.parse_args(argv)
    model = given.model or model_path()
    for endpoint in given.endpoint:
        case = Case(
            endpoint,
            given.streams,
            given.tokens_per_s,
            given.seconds,
            given.arrivals,
            given.prompt_tokens if given.arrivals else 0,
        )
        row = run(case, model)
        append(row, given.out)
        print(summary(row), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
