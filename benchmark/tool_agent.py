"""A synthetic load of agents that call tools: long shared prefixes, many turns, short answers.

    python -m benchmark.tool_agent --out FILE.jsonl.gz --sessions 400 --seed 0 [--rate 2]

Writes a trace in Mooncake's format, for `--dataset-name mooncake`. It is synthetic: the public
Mooncake tool-and-agent trace is known to us by its statistics only, printed beside our own. Input
tokens min/mean/max 891/8,596/123,000, output 1/182/2,000, reused prefix on average 4,905.

A session belongs to one of a few agents. An agent's system prompt and tool descriptions are the
prefix of all of its sessions; sessions choose agents by Zipf's law, for few agents make most of the
traffic, those with short prompts. A session opens with a user's message, sometimes with a file in
it; then each turn appends the answer before it and a tool's output to the prompt. Sessions begin as
a Poisson process; a turn comes when the answer before it is there and the tool has run.

    system prompt     8 agents, 4,096 to 12,288 tokens in whole blocks, evenly spaced
    opening message   log-normal, median 600, sigma 1.5, at most 24,576 tokens
    turns             geometric, mean 6, at most 40
    tool output       log-uniform, 100 to 800 tokens
    answer            log-normal, median 80, sigma 0.9, at most 500 tokens
    tool's time       log-normal, median 2 s, sigma 1, at most 30 s

Median and tail of the answers follow from what they are: a call is a short piece of JSON, and only
a session's end is prose. 600 sessions make inputs of 4,105/10,200/32,400 tokens, outputs of 115 on
average, and 93 % of a prompt is reused by a cache that keeps everything; in a single minute, whose
sessions are partly new to the cache, 82 to 90 %. So what differs from the public trace: no prompt
is shorter than the shortest system prompt or longer than 32,768 tokens, answers are shorter, and
more is reused, for every session here is a conversation.

Answers appear in the next prompt as tokens that were never generated, as in every replayed trace,
so reuse ends where the prompt before ended. The blocks of a session have its own ids, and the last
block of a prompt keeps its id while it fills up: reuse is exact to the token.
"""

from __future__ import annotations

import gzip
import json
import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmark.command_line import command_line
from sglang.bench.datasets.mooncake import BLOCK_TOKENS, TraceRow

AGENTS = 8
SYSTEM_BLOCKS = (8, 24)
ZIPF_EXPONENT = 1.0
OPENING_MEDIAN, OPENING_SIGMA, OPENING_MAX = 600, 1.5, 24_576
MEAN_TURNS, MAX_TURNS = 6, 40
TOOL_TOKENS = (100, 800)
ANSWER_MEDIAN, ANSWER_SIGMA, ANSWER_MAX = 80, 0.9, 500
TOOL_MEDIAN_S, TOOL_SIGMA, TOOL_MAX_S = 2.0, 1.0, 30.0
MAX_CONTEXT = 32_768
# How fast the answer before a turn came, of a server that keeps its promises.
FIRST_TOKEN_S, TOKEN_S = 0.5, 0.025
# Sessions of this long before the trace are under way when it begins.
LEAD_IN_S = 120.0
# Shorter ones would leave out nearly every request.
SHORTEST_USEFUL_LIMIT = SYSTEM_BLOCKS[0] * BLOCK_TOKENS + 1024
_SESSION_IDS = 1000  # block ids of each agent and of each session; more than a context has


@dataclass(frozen=True, slots=True)
class Summary:
    """Tokens. reused: of a prompt's prefix, with a cache that keeps everything."""

    requests: int
    seconds: float
    input_mean: float
    input_min: int
    input_max: int
    output_mean: float
    output_median: float
    output_max: int
    reused_mean: float

    def __str__(self) -> str:
        return (
            f"{self.requests} requests in {self.seconds:.0f} s; input min/mean/max "
            f"{self.input_min}/{self.input_mean:.0f}/{self.input_max}; output median/mean/max "
            f"{self.output_median:.0f}/{self.output_mean:.0f}/{self.output_max}; reused mean "
            f"{self.reused_mean:.0f} ({self.reused_mean / self.input_mean:.0%})"
        )


def trace(sessions: int, *, rate: float, seed: int) -> list[TraceRow]:
    """The requests of `sessions` sessions in order of time, about `rate` a second. Deterministic.

    The trace begins in the midst of the sessions that had begun before it, and ends with the
    beginning of the last session, so that the load is steady throughout.
    """
    rng = np.random.default_rng(seed)
    per_session_s = _mean_turns() / rate
    starts_s = np.cumsum(rng.exponential(per_session_s, sessions)) - LEAD_IN_S
    systems = np.linspace(*SYSTEM_BLOCKS, AGENTS).round().astype(int)
    popularity = 1.0 / np.arange(1, AGENTS + 1) ** ZIPF_EXPONENT
    agents = rng.choice(AGENTS, size=sessions, p=popularity / popularity.sum())
    rows: list[TraceRow] = []
    for number, (start_s, agent) in enumerate(zip(starts_s.tolist(), agents.tolist(), strict=True)):
        rows += _session(rng, start_s, number, agent, int(systems[agent]))
    end_ms = float(starts_s[-1]) * 1e3
    timed = [row for row in rows if 0 <= (row.timestamp_ms or 0.0) < end_ms]
    return sorted(timed, key=lambda row: row.timestamp_ms or 0.0)


def trace_of(
    requests: int, *, rate: float, seed: int, max_input_tokens: int = MAX_CONTEXT
) -> list[TraceRow]:
    """The first `requests` that are short enough, of a trace that has so many of them.

    max_input_tokens: at least SHORTEST_USEFUL_LIMIT.
    """
    assert max_input_tokens >= SHORTEST_USEFUL_LIMIT, max_input_tokens
    sessions = 16 + math.ceil((requests + rate * LEAD_IN_S) / _mean_turns())
    while True:
        rows = [
            row
            for row in trace(sessions, rate=rate, seed=seed)
            if row.input_tokens <= max_input_tokens
        ]
        if len(rows) >= requests:
            return rows[:requests]
        sessions *= 2


def write(rows: Sequence[TraceRow], path: Path) -> None:
    """Mooncake's JSON lines, compressed if the name ends in .gz; equal rows, equal bytes."""
    lines = [
        json.dumps(
            {
                "timestamp": round(row.timestamp_ms or 0.0),
                "input_length": row.input_tokens,
                "output_length": row.output_tokens,
                "hash_ids": list(row.hash_ids),
            }
        )
        for row in rows
    ]
    data = ("\n".join(lines) + "\n").encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)


def summarise(rows: Sequence[TraceRow]) -> Summary:
    """Needs at least one row."""
    tokens_of_block: dict[int, int] = {}
    reused = 0
    for row in rows:
        reused += _known(row, tokens_of_block)
        for at, block in enumerate(row.hash_ids):
            filled = min(BLOCK_TOKENS, row.input_tokens - at * BLOCK_TOKENS)
            tokens_of_block[block] = max(filled, tokens_of_block.get(block, 0))
    inputs = [row.input_tokens for row in rows]
    outputs = [row.output_tokens for row in rows]
    return Summary(
        requests=len(rows),
        seconds=((rows[-1].timestamp_ms or 0.0) - (rows[0].timestamp_ms or 0.0)) / 1e3,
        input_mean=statistics.fmean(inputs),
        input_min=min(inputs),
        input_max=max(inputs),
        output_mean=statistics.fmean(outputs),
        output_median=statistics.median(outputs),
        output_max=max(outputs),
        reused_mean=reused / len(rows),
    )


def _known(row: TraceRow, tokens_of_block: dict[int, int]) -> int:
    """Leading tokens of the row that were in a prompt before it."""
    known = 0
    for block in row.hash_ids:
        filled = tokens_of_block.get(block, 0)
        known += filled
        if filled < BLOCK_TOKENS:
            break
    return min(known, row.input_tokens)


def _session(
    rng: np.random.Generator, start_s: float, number: int, agent: int, system_blocks: int
) -> list[TraceRow]:
    at_s = start_s
    tokens = system_blocks * BLOCK_TOKENS + _log_normal(
        rng, OPENING_MEDIAN, OPENING_SIGMA, OPENING_MAX
    )
    rows = []
    for _ in range(min(MAX_TURNS, int(rng.geometric(1 / MEAN_TURNS)))):
        if tokens > MAX_CONTEXT:
            break
        answer = _log_normal(rng, ANSWER_MEDIAN, ANSWER_SIGMA, ANSWER_MAX)
        ids = _ids(number, agent, system_blocks, tokens)
        rows.append(TraceRow(at_s * 1e3, tokens, answer, ids))
        low, high = TOOL_TOKENS
        tokens += answer + round(math.exp(rng.uniform(math.log(low), math.log(high))))
        tool_s = min(TOOL_MAX_S, TOOL_MEDIAN_S * math.exp(TOOL_SIGMA * rng.standard_normal()))
        at_s += FIRST_TOKEN_S + answer * TOKEN_S + tool_s
    return rows


def _ids(number: int, agent: int, system_blocks: int, tokens: int) -> tuple[int, ...]:
    """Block ids: the agent's, then the session's."""
    own = -(-tokens // BLOCK_TOKENS) - system_blocks
    of_agent = range(agent * _SESSION_IDS, agent * _SESSION_IDS + system_blocks)
    first_own = (AGENTS + number) * _SESSION_IDS
    return (*of_agent, *range(first_own, first_own + own))


def _log_normal(rng: np.random.Generator, median: float, sigma: float, most: int) -> int:
    return min(most, max(1, round(median * math.exp(sigma * rng.standard_normal()))))


def _mean_turns() -> float:
    """Of the geometric distribution cut off at MAX_TURNS."""
    return MEAN_TURNS * (1 - (1 - 1 / MEAN_TURNS) ** MAX_TURNS)


def main(argv: Sequence[str] | None = None) -> int:
    parser = command_line("tool_agent", __doc__)
    parser.add_argument("--out", type=Path, required=True, help="trace to write, .jsonl or .gz")
    parser.add_argument("--sessions", type=int, default=400)
    parser.add_argument("--rate", type=float, default=2.0, help="requests/s (default: 2)")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(argv)
    if given.sessions < 1 or given.rate <= 0 or given.seed < 0:
        parser.error("--sessions and --rate must be positive, --seed not negative")
    rows = trace(given.sessions, rate=given.rate, seed=given.seed)
    if not rows:
        parser.error(
            f"--sessions {given.sessions}: all of them end in the {LEAD_IN_S:.0f} s before the "
            "trace begins; ask for more"
        )
    write(rows, given.out)
    print(summarise(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
