"""How long launches took in measured windows, for simulating those windows.

A profile is measured under steady load. Serving leaves pauses in which a GPU cools and its clock
rises, and prompts of other content draw other power: launches take some percent less or more than
the profile says, differently for each workload. A goodput hangs on whether tokens come within a
limit or just after it, so some percent are much.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmark.policy_table import Row
from drift_scheduler.lane import Phase, Span
from drift_scheduler.latencies import Latencies
from drift_scheduler.partition import PartitionTable
from drift_scheduler.shapes import DecodeShape, PrefillShape
from drift_scheduler.simulation.machine import Machine
from drift_scheduler.timeline import LaneRun
from sglang.bench.errors import BenchError


def seen_in(timelines: Path, rows: Sequence[Row], machine: Machine) -> dict[str, Latencies]:
    """For each workload the machine's times, corrected by every launch in the windows of its rows.

    timelines: the folder that `benchmark.policies --timelines` filled. Raises BenchError if the
    timeline of a row is not there, or is of partitions that the machine's profile does not have.
    """
    found: dict[str, Latencies] = {}
    for workload in dict.fromkeys(row["workload"] for row in rows):
        windows = [row for row in rows if row["workload"] == workload]
        latencies = copy.deepcopy(machine.model)
        for run in _runs(timelines, windows, machine.table):
            latencies.observe(run)
        found[workload] = latencies
    return found


def runs_of(timeline: Mapping[str, Any], table: PartitionTable) -> Iterator[LaneRun]:
    """The runs of GET /pd_multiplex/timeline, as far as a latency model learns from them. Raises
    BenchError for a partition that the table does not have."""
    partitions = {str(part): part for part in (table[index] for index in range(len(table)))}
    for run in timeline["runs"]:
        if run["partition"] not in partitions:
            raise BenchError(f"--profile has no partition {run['partition']}; a timeline has")
        yield LaneRun(
            Phase(run["phase"]),
            partitions[run["partition"]],
            Span(run["start_ms"] / 1e3, (run["start_ms"] + run["actual_ms"]) / 1e3),
            requests=run["requests"],
            tokens=run["tokens"],
            layers=run["layers"],
            fused_tokens=run["fused_tokens"],
            decode=_decode(run),
            prefill=_prefill(run),
        )


def _runs(timelines: Path, rows: Iterable[Row], table: PartitionTable) -> Iterator[LaneRun]:
    # A window that is judged by several TBTs has several rows and one timeline.
    for name in dict.fromkeys(row.get("timeline") for row in rows):
        if name is None:
            raise BenchError("--timelines: a row was measured without, and names none")
        path = timelines / name
        try:
            timeline = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError) as error:
            raise BenchError(f"--timelines: {path}: {error}") from error
        yield from runs_of(timeline, table)


def _decode(run: Mapping[str, Any]) -> DecodeShape | None:
    requests = run["decode_requests"]
    return None if requests is None else DecodeShape(requests, run["decode_context_tokens"])


def _prefill(run: Mapping[str, Any]) -> PrefillShape | None:
    tokens = run["prefill_tokens"]
    if tokens is None:
        return None
    return PrefillShape(tokens, run["prefill_squares"], run["prefill_cross"])
