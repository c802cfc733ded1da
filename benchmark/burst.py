"""A burst of long prompts while others decode: what becomes of the tokens that were flowing.

    python -m benchmark.burst --model benchmark/models/llama-3.1-8b --policy adaptive chunked:512 \\
        --out benchmark/results/burst_h100.jsonl --timelines timelines -- --context-length 40960

Starts one server with --enable-pd-multiplex. For each policy: an empty cache, --decoding requests
of --context tokens that have begun to decode, a quiet time, then --burst prompts of --prompt tokens
at once. The burst lasts until the last of them has its first token. One JSON line a policy: every
decoding request's token gaps in the quiet time and in the burst, and the burst's TTFTs. The lanes'
timeline of that time is kept for `python -m sglang.drift_report trace`. Server flags follow `--`.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import math
import re
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np

from benchmark.command_line import command_line
from benchmark.conversation import GenerateError, parse_event, percentile
from benchmark.policies import environment
from benchmark.policy_run import ServedModel, server_flags
from benchmark.serve_trace import append
from benchmark.server_process import ServerError
from benchmark.trace_load import call, vocab_size
from sglang.srt.benchmarks.engine_flags import whole

LIMIT_S = 600.0
# Each decoding request has had so many tokens before the quiet time begins.
STEADY_TOKENS = 8
POLL_S = 0.02


@dataclass(frozen=True, slots=True)
class Burst:
    """Requests and their sizes in tokens.

    decode_tokens: of each decoding request at most; they are stopped when the burst is over.
    """

    decoding: int
    context: int
    decode_tokens: int
    burst: int
    prompt: int
    burst_tokens: int
    quiet_s: float
    slo: Mapping[str, float]
    seed: int


@dataclass(slots=True)
class Stream:
    """One request as its client saw it, times from time.monotonic().

    arrivals_s: of every event that brought tokens. tokens: had so far.
    """

    sent_s: float = 0.0
    arrivals_s: list[float] = field(default_factory=list)
    tokens: int = 0
    finished: bool = False

    @property
    def ttft_s(self) -> float:
        """Needs a token."""
        return self.arrivals_s[0] - self.sent_s

    def gaps_inside_ms(self, begin_s: float, end_s: float) -> list[float]:
        """Between events that both came in the time given."""
        return [
            (late - early) * 1e3
            for early, late in self._gaps()
            if begin_s <= early and late <= end_s
        ]

    def gaps_touching_ms(self, begin_s: float, end_s: float) -> list[float]:
        """Those that overlap the time given: a stall counts even if it outlasts that time."""
        return [
            (late - early) * 1e3 for early, late in self._gaps() if late > begin_s and early < end_s
        ]

    def _gaps(self) -> Iterator[tuple[float, float]]:
        return itertools.pairwise(self.arrivals_s)


@dataclass(frozen=True, slots=True)
class Observed:
    """All streams; the quiet time lies before the burst."""

    decoding: Sequence[Stream]
    burst: Sequence[Stream]
    quiet_from_s: float
    burst_from_s: float
    burst_to_s: float


async def observe(base_url: str, burst: Burst, ordinary_ids: int) -> Observed:
    """Holds the scenario once. Raises an ExceptionGroup of GenerateError if a request fails, or if
    one that decodes ends before the burst begins; TimeoutError after LIMIT_S."""
    rng = np.random.default_rng(burst.seed)
    contexts = rng.integers(0, ordinary_ids, (burst.decoding, burst.context)).tolist()
    prompts = rng.integers(0, ordinary_ids, (burst.burst, burst.prompt)).tolist()
    decoding = [Stream() for _ in contexts]
    bursting = [Stream() for _ in prompts]
    async with (
        asyncio.timeout(LIMIT_S),
        aiohttp.ClientSession(
            base_url,
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=None),
            read_bufsize=1 << 20,
        ) as session,
        asyncio.TaskGroup() as group,
    ):
        tasks = [
            group.create_task(_stream(session, ids, burst.decode_tokens, burst.slo, stream))
            for ids, stream in zip(contexts, decoding, strict=True)
        ]
        while any(stream.tokens < STEADY_TOKENS for stream in decoding):
            _check_decoding(decoding)
            await asyncio.sleep(POLL_S)
        quiet_from_s = time.monotonic()
        await asyncio.sleep(burst.quiet_s)
        _check_decoding(decoding)
        burst_from_s = time.monotonic()
        arrived = [
            group.create_task(_stream(session, ids, burst.burst_tokens, burst.slo, stream))
            for ids, stream in zip(prompts, bursting, strict=True)
        ]
        await asyncio.wait(arrived)
        burst_to_s = max(stream.arrivals_s[0] for stream in bursting)
        # A token more of each, so that a gap which the burst began has an end.
        while any(not s.finished and s.arrivals_s[-1] <= burst_to_s for s in decoding):
            await asyncio.sleep(POLL_S)
        for task in tasks:
            task.cancel()
    return Observed(decoding, bursting, quiet_from_s, burst_from_s, burst_to_s)


def _check_decoding(decoding: Sequence[Stream]) -> None:
    if any(stream.finished for stream in decoding):
        raise GenerateError("a decoding request ended before the burst: raise --decode-tokens")


async def _stream(
    session: aiohttp.ClientSession,
    input_ids: Sequence[int],
    max_new_tokens: int,
    slo: Mapping[str, float],
    stream: Stream,
) -> None:
    body = {
        "input_ids": input_ids,
        "sampling_params": {
            "temperature": 0,
            "max_new_tokens": max_new_tokens,
            "ignore_eos": True,
        },
        "stream": True,
        "slo": dict(slo),
    }
    payload = json.dumps(body).encode()
    stream.sent_s = time.monotonic()
    headers = {"Content-Type": "application/json"}
    async with session.post("/generate", data=payload, headers=headers) as response:
        if response.status != 200:
            raise GenerateError(f"HTTP {response.status}: {await response.text()}")
        async for event_line in response.content:
            event = parse_event(event_line)
            if event is None:
                continue
            meta = event["meta_info"]
            if meta["completion_tokens"] > stream.tokens:
                stream.arrivals_s.append(time.monotonic())
                stream.tokens = meta["completion_tokens"]
            if (meta.get("finish_reason") or {}).get("type") == "abort":
                raise GenerateError(f"aborted: {meta['finish_reason'].get('message')}")
    if not stream.tokens:
        raise GenerateError("a stream ended without a token")
    stream.finished = True


def result(burst: Burst, observed: Observed) -> dict[str, Any]:
    """The numbers of one scenario, in ms unless named otherwise.

    tbt_attainment: of decoding requests whose gaps in the burst are within the SLO at their 99th
    percentile. ended_early: decoding requests that had all their tokens before the burst was over.
    """
    quiet = (observed.quiet_from_s, observed.burst_from_s)
    under_burst = (observed.burst_from_s, observed.burst_to_s)
    gaps = [stream.gaps_touching_ms(*under_burst) for stream in observed.decoding]
    ttfts_ms = sorted(stream.ttft_s * 1e3 for stream in observed.burst)
    ttft_limit_ms = max(burst.slo["ttft_ms"], burst.slo["ttft_ms_per_token"] * burst.prompt)
    per_request_p99_ms = [percentile(own, 99) for own in gaps]
    return {
        "decoding": burst.decoding,
        "context": burst.context,
        "burst": burst.burst,
        "prompt": burst.prompt,
        "slo": dict(burst.slo),
        "seed": burst.seed,
        "burst_s": observed.burst_to_s - observed.burst_from_s,
        "prefill_tokens_per_s": burst.burst
        * burst.prompt
        / (observed.burst_to_s - observed.burst_from_s),
        "quiet_gaps_ms": _spread([s.gaps_inside_ms(*quiet) for s in observed.decoding]),
        "burst_gaps_ms": _spread(gaps),
        "requests": [{"gaps": len(own), **_quantiles(own)} for own in gaps],
        "tbt_attainment": _share(p99_ms <= burst.slo["tbt_ms"] for p99_ms in per_request_p99_ms),
        "ended_early": sum(stream.finished for stream in observed.decoding),
        "ttft_ms": ttfts_ms,
        "ttft_p50_ms": percentile(ttfts_ms, 50),
        "ttft_limit_ms": ttft_limit_ms,
        "ttft_attainment": _share(ttft_ms <= ttft_limit_ms for ttft_ms in ttfts_ms),
    }


def _spread(by_request: Sequence[Sequence[float]]) -> dict[str, float]:
    return _quantiles([gap_ms for own in by_request for gap_ms in own])


def _quantiles(values: Sequence[float]) -> dict[str, float]:
    return {
        "p50": percentile(values, 50),
        "p99": percentile(values, 99),
        "max": max(values, default=0.0),
    }


def _share(verdicts: Iterable[bool]) -> float:
    found = list(verdicts)
    return sum(found) / len(found) if found else 0.0


def lane_ms(timeline: Mapping[str, Any]) -> dict[str, float]:
    """How long each lane was busy under each partition, from GET /pd_multiplex/timeline."""
    busy_ms: dict[str, float] = {}
    for run in timeline["runs"]:
        name = f"{run['phase']} {run['partition']}"
        busy_ms[name] = busy_ms.get(name, 0.0) + run["end_ms"] - run["start_ms"]
    return busy_ms


def hold(server: ServedModel, policy: str, burst: Burst, ids: int, folder: Path) -> dict[str, Any]:
    """The scenario under a policy; its timeline goes to a file in `folder`.

    Raises ServerError, TimeoutError or an ExceptionGroup of GenerateError and ClientError.
    """
    server.choose(policy)
    call(server.base_url, "/flush_cache?timeout=30", {})
    started_s = time.monotonic()
    observed = asyncio.run(observe(server.base_url, burst, ids))
    seconds = math.ceil(time.monotonic() - observed.quiet_from_s)
    timeline = call(server.base_url, f"/pd_multiplex/timeline?seconds={seconds}")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"burst_{re.sub(r'[^a-z0-9]+', '_', policy.lower())}.json"
    path.write_text(json.dumps(timeline), encoding="utf-8")
    return {
        **result(burst, observed),
        "seconds": time.monotonic() - started_s,
        "timeline": path.name,
        "timeline_truncated": timeline["truncated"],
        "lane_ms": lane_ms(timeline),
    }


def summary(row: Mapping[str, Any]) -> str:
    """The row in two lines for people."""
    if "error" in row:
        return f"{row['policy']}: {row['error']}"
    quiet, under = row["quiet_gaps_ms"], row["burst_gaps_ms"]
    return (
        f"{row['policy']}: {row['burst']} x {row['prompt']} tokens in {row['burst_s']:.1f} s, "
        f"{row['prefill_tokens_per_s']:.0f} tokens/s; TTFT p50 {row['ttft_p50_ms']:.0f} ms, "
        f"{row['ttft_attainment']:.0%} in time\n"
        f"  token gaps of {row['decoding']} x {row['context']}: p50 {under['p50']:.1f} ms, "
        f"p99 {under['p99']:.1f} ms, longest {under['max']:.1f} ms (before {quiet['p50']:.1f}, "
        f"{quiet['p99']:.1f}, {quiet['max']:.1f}); {row['tbt_attainment']:.0%} in time"
    )


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command_line("burst", __doc__)
    parser.add_argument("--model", type=Path, required=True, help="folder with a config.json, GGUF")
    parser.add_argument("--policy", nargs="+", required=True, help="as the server names them")
    for name, default in (
        ("--decoding", 32),
        ("--context", 9000),
        ("--decode-tokens", 2048),
        ("--burst", 20),
        ("--prompt", 16384),
        ("--burst-tokens", 16),
    ):
        parser.add_argument(
            name, type=whole(1), default=default, help=f"see above (default: {default})"
        )
    parser.add_argument("--quiet-seconds", type=whole(0), default=3, help="(default: 3)")
    parser.add_argument("--slo-tbt-ms", type=float, default=50.0)
    parser.add_argument("--slo-ttft-ms", type=float, default=1000.0)
    parser.add_argument("--slo-ttft-ms-per-token", type=float, default=0.5)
    parser.add_argument("--seed", type=whole(0), default=0)
    parser.add_argument("--out", type=Path, required=True, help="JSON lines file to append to")
    parser.add_argument("--timelines", type=Path, required=True, help="folder for the timelines")
    parser.add_argument("server_flags", nargs="*", help="flags of the server, behind --")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """0 if every policy has a result."""
    given = parse(argv)
    burst = Burst(
        decoding=given.decoding,
        context=given.context,
        decode_tokens=given.decode_tokens,
        burst=given.burst,
        prompt=given.prompt,
        burst_tokens=given.burst_tokens,
        quiet_s=float(given.quiet_seconds),
        slo={
            "ttft_ms": given.slo_ttft_ms,
            "ttft_ms_per_token": given.slo_ttft_ms_per_token,
            "tbt_ms": given.slo_tbt_ms,
        },
        seed=given.seed,
    )
    flags = server_flags(given.model, given.server_flags)
    origin = {"model": given.model.name, "server_flags": flags, "environment": environment()}
    ids = vocab_size(given.model)
    failed = False
    try:
        server = ServedModel(given.model, flags)
    except ServerError as error:
        print(error, file=sys.stderr)
        return 1
    try:
        for policy in given.policy:
            row = {"benchmark": "burst", "policy": policy, **origin}
            row["started_at"] = datetime.now(UTC).isoformat(timespec="seconds")
            try:
                row |= hold(server, policy, burst, ids, given.timelines)
            except (ServerError, OSError, ExceptionGroup) as error:
                failed = True
                row["error"] = _words(error)
            append(row, given.out)
            print(summary(row), flush=True)
            if not server.running:
                print(server.last_words(), file=sys.stderr)
                return 1
        server.stop()
    finally:
        server.kill()
    return 1 if failed else 0


def _words(error: BaseException) -> str:
    if isinstance(error, BaseExceptionGroup):
        return "; ".join(dict.fromkeys(_words(part) for part in error.exceptions))
    return f"{type(error).__name__}: {error}"


if __name__ == "__main__":
    sys.exit(main())
