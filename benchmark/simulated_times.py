"""How long launches took in measured windows, and when the host paused, to simulate those windows.

A profile is measured under steady load. Serving leaves pauses in which a GPU cools and its clock
rises, and prompts of other content draw other power: launches take some percent less or more than
the profile says, differently for each workload. A goodput hangs on whether tokens come within a
limit or just after it, so some percent are much. A host that stands still for 15 ms once a second
makes tokens late that the device had in time.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
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

# A host at work notices within this time, in ms, that a launch has ended.
NOTICED_MS = 4.0


@dataclass(frozen=True, slots=True)
class Seen:
    """latencies: by workload. host_pauses: by the name of a window's timeline."""

    latencies: dict[str, Latencies]
    host_pauses: dict[str, tuple[Span, ...]]


def seen_in(timelines: Path, rows: Sequence[Row], machine: Machine) -> Seen:
    """For each workload the machine's times, corrected by every launch in the windows of its rows.

    timelines: the folder that `benchmark.policies --timelines` filled. Raises BenchError if the
    timeline of a row is not there, or is of partitions that the machine's profile does not have.
    """
    seen = Seen({}, {})
    # A window that is judged by several TBTs has several rows and one timeline.
    for workload, name in dict.fromkeys((row["workload"], row.get("timeline")) for row in rows):
        if name is None:
            raise BenchError("--timelines: a row was measured without, and names none")
        timeline = _read(timelines / name)
        if workload not in seen.latencies:
            seen.latencies[workload] = copy.deepcopy(machine.model)
        for run in runs_of(timeline, machine.table):
            seen.latencies[workload].observe(run)
        seen.host_pauses[name] = host_pauses(timeline)
    return seen


def host_pauses(timeline: Mapping[str, Any]) -> tuple[Span, ...]:
    """When launches had ended and nobody noticed, in seconds from the timeline's start.

    Pauses in which none ended do not show.
    """
    still = [
        (run["end_ms"], run["end_ms"] + run["unnoticed_ms"])
        for run in timeline["runs"]
        if (run["unnoticed_ms"] or 0.0) > NOTICED_MS
    ]
    pauses: list[tuple[float, float]] = []
    for begin_ms, end_ms in sorted(still):
        if pauses and begin_ms <= pauses[-1][1]:
            pauses[-1] = pauses[-1][0], max(end_ms, pauses[-1][1])
        else:
            pauses.append((begin_ms, end_ms))
    return tuple(Span(begin_ms / 1e3, end_ms / 1e3) for begin_ms, end_ms in pauses)


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


def _read(path: Path) -> dict[str, Any]:
    try:
        timeline: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise BenchError(f"--timelines: {path}: {error}") from error
    return timeline


def _decode(run: Mapping[str, Any]) -> DecodeShape | None:
    requests = run["decode_requests"]
    return None if requests is None else DecodeShape(requests, run["decode_context_tokens"])


def _prefill(run: Mapping[str, Any]) -> PrefillShape | None:
    tokens = run["prefill_tokens"]
    if tokens is None:
        return None
    return PrefillShape(tokens, run["prefill_squares"], run["prefill_cross"])
