"""Requests to simulate, from a trace in Mooncake's format or made up.

A line is {"timestamp": ms, "input_length": n, "output_length": n, "hash_ids": [id, ...]} with one
id for every block of 512 prompt tokens, the last block being partial. Equal leading ids are equal
prefixes; a partial block is never shared. Rows without hash_ids share nothing.
"""

from __future__ import annotations

import gzip
import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated

import msgspec

from drift_scheduler.simulation.kv_pool import BLOCK_TOKENS


class TraceError(ValueError):
    """A trace cannot be read or used; says where and why."""


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """blocks: ids of the prompt's full blocks, of block_tokens each; none where nothing is to be
    shared."""

    arrival_s: float
    input_tokens: int
    output_tokens: int
    blocks: tuple[int, ...] = ()
    block_tokens: int = BLOCK_TOKENS

    def __post_init__(self) -> None:
        if self.input_tokens < 1 or self.output_tokens < 1:
            raise ValueError(f"a request has a prompt and an answer: {self}")
        if len(self.blocks) > self.input_tokens // self.block_tokens:
            raise ValueError(f"{len(self.blocks)} full blocks in {self.input_tokens} tokens")


@dataclass(frozen=True, slots=True)
class TraceRow:
    """timestamp_s is None in traces without arrivals."""

    timestamp_s: float | None
    input_tokens: int
    output_tokens: int
    blocks: tuple[int, ...]

    def at(self, arrival_s: float, first_id: int = 0) -> TraceRequest:
        """first_id is added to the ids: rows with another one share nothing with this."""
        blocks = tuple(block + first_id for block in self.blocks) if first_id else self.blocks
        return TraceRequest(arrival_s, self.input_tokens, self.output_tokens, blocks)


_Count = Annotated[int, msgspec.Meta(ge=0)]


class _Line(msgspec.Struct):
    input_length: Annotated[int, msgspec.Meta(ge=1)]
    output_length: _Count
    timestamp: Annotated[float, msgspec.Meta(ge=0)] | None = None
    hash_ids: list[_Count] | None = None


def read_trace(path: str, max_input_tokens: int | None = None) -> list[TraceRow]:
    """Rows in order of time, prompts longer than max_input_tokens left out.

    An answer has one token at least. Raises TraceError naming file and line.
    """
    decoder = msgspec.json.Decoder(_Line)
    rows = []
    for number, text in enumerate(_read(path).splitlines(), start=1):
        if not text.strip():
            continue
        try:
            line = decoder.decode(text)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise TraceError(f"{path}:{number}: {error}") from error
        blocks = -(-line.input_length // BLOCK_TOKENS)
        if line.hash_ids is not None and len(line.hash_ids) != blocks:
            raise TraceError(
                f"{path}:{number}: input_length {line.input_length} needs {blocks} hash_ids of "
                f"{BLOCK_TOKENS} tokens, the row has {len(line.hash_ids)}"
            )
        if max_input_tokens is not None and line.input_length > max_input_tokens:
            continue
        rows.append(
            TraceRow(
                timestamp_s=None if line.timestamp is None else line.timestamp / 1e3,
                input_tokens=line.input_length,
                output_tokens=max(1, line.output_length),
                blocks=tuple((line.hash_ids or [])[: line.input_length // BLOCK_TOKENS]),
            )
        )
    if not rows:
        raise TraceError(f"{path}: no requests (of at most {max_input_tokens} prompt tokens)")
    if all(row.timestamp_s is not None for row in rows):
        rows.sort(key=lambda row: row.timestamp_s or 0.0)
    return rows


def at_own_times(
    rows: Sequence[TraceRow], speed: float = 1.0, seconds: float | None = None
) -> list[TraceRequest]:
    """At the trace's times from its first row on, `speed` times as fast, for so many seconds."""
    times_s = [row.timestamp_s for row in rows if row.timestamp_s is not None]
    if len(times_s) < len(rows):
        raise TraceError("the trace has rows without a timestamp: give a rate instead")
    arrivals = zip(rows, ((time_s - times_s[0]) / speed for time_s in times_s), strict=True)
    return [row.at(when_s) for row, when_s in arrivals if seconds is None or when_s < seconds]


def at_poisson_times(
    rows: Sequence[TraceRow], rate_per_s: float, seconds: float, seed: int
) -> list[TraceRequest]:
    """Rows in order, at a Poisson process's times, the first at 0.

    When the rows run out they begin anew, with block ids of their own. With one seed, a higher
    rate has the same arrivals closer together, so that rates can be compared.
    """
    own_ids = 1 + max((block for row in rows for block in row.blocks), default=0)
    requests = []
    repeated = itertools.cycle(rows)
    for number, when_s in enumerate(_poisson_times(rate_per_s, seed)):
        if when_s >= seconds:
            break
        requests.append(next(repeated).at(when_s, number // len(rows) * own_ids))
    return requests


def _poisson_times(rate_per_s: float, seed: int) -> Iterator[float]:
    random_gaps = random.Random(seed)
    when = 0.0
    while True:
        yield when / rate_per_s
        when += random_gaps.expovariate(1.0)


def _read(path: str) -> bytes:
    try:
        with gzip.open(path, "rb") if path.endswith(".gz") else open(path, "rb") as file:
            return file.read()
    except (OSError, EOFError) as error:
        raise TraceError(f"trace {path} cannot be read: {error}") from error
