"""`mooncake`: replays a trace of lengths and prefix-block ids.

A row is {"timestamp": ms, "input_length": n, "output_length": n, "hash_ids": [id, ...]} with one
id for every block of 512 prompt tokens, the last block being partial. Rows with equal leading ids
shared that prefix, so the tokens made for a block depend on its id alone. Rows without hash_ids
(traces of lengths only) share nothing. The timestamp is needed only to replay arrivals.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sglang.bench.datasets.jsonl import read_rows, required_path
from sglang.bench.datasets.random_ids import DEFAULT_NUM_PROMPTS
from sglang.bench.errors import BenchError
from sglang.bench.options import BenchOptions
from sglang.bench.prompts import PromptMaker
from sglang.bench.workload import Conversation, TokenIds, Turn

BLOCK_TOKENS = 512
_FIRST_OWN_ID = 1 << 40  # block ids of rows without hash_ids: beyond any trace's own


WORKLOADS = ("mooncake", "conversation", "synthetic", "toolagent")


@dataclass(frozen=True, slots=True)
class TraceRow:
    """timestamp_ms is None in traces that have no arrivals."""

    timestamp_ms: float | None
    input_tokens: int
    output_tokens: int
    hash_ids: tuple[int, ...]


def load(options: BenchOptions, prompts: PromptMaker) -> tuple[list[Conversation], str | None]:
    rows = read_trace(_trace_file(options))
    total = len(rows)
    wanted = options.mooncake
    if wanted.duration_s is not None:
        rows = _first_part(rows, wanted.duration_s)
    in_window = len(rows)
    times_ms = _spread(rows) if wanted.spread_batches else [row.timestamp_ms for row in rows]
    timed = list(zip(rows, times_ms, strict=True))
    if wanted.max_input_len is not None:
        timed = [pair for pair in timed if pair[0].input_tokens <= wanted.max_input_len]
    too_long = in_window - len(timed)
    limit = DEFAULT_NUM_PROMPTS if options.num_prompts is None else options.num_prompts
    if wanted.min_turns > 1:
        chosen = set(_whole_conversations([row for row, _ in timed], wanted.min_turns, limit))
        kept = [pair for i, pair in enumerate(timed) if i in chosen]
    else:
        kept = timed[:limit]
    if not kept:
        raise BenchError("mooncake: no row of the trace is left after the --mooncake-* limits")
    if options.use_trace_timestamps and any(time_ms is None for _, time_ms in kept):
        raise BenchError("--use-trace-timestamps: the trace has rows without a timestamp")
    begin_ms = kept[0][1]
    conversations = []
    for row, time_ms in kept:
        trace_s = None if time_ms is None or begin_ms is None else (time_ms - begin_ms) / 1e3
        ids = prompt_ids(row, prompts.ordinary_ids, options.seed)
        blocks = np.split(ids, range(BLOCK_TOKENS, ids.size, BLOCK_TOKENS))
        output_tokens = max(1, row.output_tokens)
        turns = [Turn(prompts.from_ids(*blocks), row.input_tokens, output_tokens)]
        for number in range(1, wanted.num_rounds):
            more = _later_ids(row, number, prompts.ordinary_ids, options.seed)
            turns.append(Turn(prompts.from_ids(more), more.size, output_tokens))
        conversations.append(Conversation(tuple(turns), trace_s))
    note = (
        f"mooncake: {len(kept)} of {total} rows; left out: {total - in_window} after "
        f"--mooncake-duration-s, {too_long} above --mooncake-max-input-len, "
        f"{len(timed) - len(kept)} beyond --num-prompts {limit}"
    )
    if wanted.min_turns > 1:
        note += f"; whole conversations of at least {wanted.min_turns} turns"
    if wanted.spread_batches:
        note += "; arrivals that share a timestamp are spread up to the next one"
    return conversations, note


def read_trace(path: str) -> list[TraceRow]:
    """Rows in order of time. Raises BenchError naming file and line."""
    rows = []
    own_id = _FIRST_OWN_ID
    for where, data in read_rows(path):
        input_tokens = _integer(where, data, "input_length", at_least=1)
        blocks = -(-input_tokens // BLOCK_TOKENS)
        hash_ids = data.get("hash_ids")
        if hash_ids is None:
            hash_ids = range(own_id, own_id + blocks)
            own_id += blocks
        elif not isinstance(hash_ids, list) or not all(type(h) is int and h >= 0 for h in hash_ids):
            raise BenchError(f"{where}: hash_ids must be a list of integers of at least 0")
        if len(hash_ids) != blocks:
            raise BenchError(
                f"{where}: input_length {input_tokens} needs {blocks} hash_ids of "
                f"{BLOCK_TOKENS} tokens, the row has {len(hash_ids)}"
            )
        timestamp_ms = data.get("timestamp")
        if timestamp_ms is not None and not isinstance(timestamp_ms, int | float):
            raise BenchError(f"{where}: timestamp must be a number of milliseconds")
        output_tokens = _integer(where, data, "output_length", at_least=0)
        rows.append(TraceRow(timestamp_ms, input_tokens, output_tokens, tuple(hash_ids)))
    if all(row.timestamp_ms is not None for row in rows):
        rows.sort(key=lambda row: row.timestamp_ms or 0.0)
    return rows


def prompt_ids(row: TraceRow, ordinary_ids: TokenIds, seed: int) -> TokenIds:
    """[input_tokens] i32: the token at position p of a block is a hash of (seed, block id, p).

    A hash rather than a generator seeded per block: whole prompts are made in one vector step.
    """
    positions = np.arange(row.input_tokens, dtype=np.uint64)
    block_ids = np.asarray(row.hash_ids, dtype=np.uint64)
    blocks = np.repeat(block_ids, BLOCK_TOKENS)[: row.input_tokens]
    counter = blocks * np.uint64(BLOCK_TOKENS) + positions % np.uint64(BLOCK_TOKENS)
    key = _splitmix64(np.asarray([seed & 0xFFFF_FFFF_FFFF_FFFF], dtype=np.uint64))
    hashed = _splitmix64(counter + key)
    ids: TokenIds = ordinary_ids[hashed % np.uint64(ordinary_ids.size)]
    return ids


def _later_ids(row: TraceRow, number: int, ordinary_ids: TokenIds, seed: int) -> TokenIds:
    """What the user says in a later round: a block of tokens, or less after a shorter prompt, of
    an id that no trace has."""
    tokens = min(BLOCK_TOKENS, row.input_tokens)
    own_id = row.hash_ids[-1] + number * 2 * _FIRST_OWN_ID
    return prompt_ids(TraceRow(None, tokens, 0, (own_id,)), ordinary_ids, seed)


def _trace_file(options: BenchOptions) -> str:
    path = Path(required_path(options))
    return str(path / f"{options.mooncake.workload}_trace.jsonl" if path.is_dir() else path)


def _splitmix64(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of the SplitMix64 generator, element by element; wraps modulo 2**64."""
    mixed = values + np.uint64(0x9E37_79B9_7F4A_7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58_476D_1CE4_E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D0_49BB_1331_11EB)
    return mixed ^ (mixed >> np.uint64(31))


def _whole_conversations(rows: Sequence[TraceRow], min_turns: int, limit: int) -> list[int]:
    """Indices of the rows of the first conversations that fit in `limit`, each with all its rows.

    A row continues the conversation with which it shares its longest run of blocks beyond the
    first; the first block is often one system prompt common to all.
    """
    conversations: list[list[int]] = []
    conversation_of_block: dict[int, int] = {}
    for index, row in enumerate(rows):
        own_blocks = row.hash_ids[1:]
        known = (conversation_of_block.get(block) for block in reversed(own_blocks))
        number = next((found for found in known if found is not None), len(conversations))
        if number == len(conversations):
            conversations.append([])
        conversations[number].append(index)
        for block in own_blocks:
            conversation_of_block.setdefault(block, number)
    chosen: list[int] = []
    for turns in conversations:
        if min_turns <= len(turns) <= limit - len(chosen):
            chosen += turns
    return chosen


def _first_part(rows: list[TraceRow], duration_s: float) -> list[TraceRow]:
    times_ms = _times_ms(rows, "--mooncake-duration-s")
    return [
        row
        for row, time_ms in zip(rows, times_ms, strict=True)
        if time_ms - times_ms[0] < duration_s * 1e3
    ]


def _spread(rows: Sequence[TraceRow]) -> list[float | None]:
    """Timestamps in which a batch of equal ones is spread evenly up to the next one.

    The last batch has no next one and takes the width of the batch before it.
    """
    times_ms = _times_ms(rows, "--mooncake-spread-batches")
    spread: list[float | None] = []
    width_ms = 0.0
    begin = 0
    while begin < len(times_ms):
        end = begin
        while end < len(times_ms) and times_ms[end] == times_ms[begin]:
            end += 1
        if end < len(times_ms):
            width_ms = times_ms[end] - times_ms[begin]
        step_ms = width_ms / (end - begin)
        spread += [times_ms[begin] + step_ms * i for i in range(end - begin)]
        begin = end
    return spread


def _times_ms(rows: Sequence[TraceRow], flag: str) -> list[float]:
    times_ms = [row.timestamp_ms for row in rows if row.timestamp_ms is not None]
    if len(times_ms) < len(rows):
        raise BenchError(f"{flag}: the trace has rows without a timestamp")
    return times_ms


def _integer(where: str, row: dict[str, Any], field: str, *, at_least: int) -> int:
    value = row.get(field)
    if type(value) is not int or value < at_least:
        raise BenchError(f"{where}: {field} must be an integer of at least {at_least}")
    return value
