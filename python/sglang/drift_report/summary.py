"""A timeline in numbers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sglang.drift_report.source import Timeline

Run = Mapping[str, Any]

IDLE = "idle"
# What an instant counts as when runs of several modes touch it: the first of these.
MODES = ("split", "fused", "prefill", "decode")


@dataclass(frozen=True, slots=True)
class ForecastError:
    """How far runs were from what was expected: |actual / expected - 1|. None without runs."""

    runs: int
    overruns: int
    median: float | None
    p99: float | None


@dataclass(frozen=True, slots=True)
class Summary:
    """mode_shares: of the window's time, `idle` included; they add up to 1. forecasts: by phase.
    repartitions: None where the timeline has no samples."""

    window_ms: float
    truncated: bool
    mode_shares: Mapping[str, float]
    runs_by_mode: Mapping[str, int]
    forecasts: Mapping[str, ForecastError]
    repartitions: int | None
    policies: Sequence[str]


def summarise(timeline: Timeline) -> Summary:
    runs, samples = timeline["runs"], timeline["samples"]
    start_ms, end_ms = span_ms(timeline)
    repartitions = None
    if samples:
        first, last = samples[0], samples[-1]
        repartitions = last["repartitions_since_start"] - first["repartitions_since_start"]
    return Summary(
        window_ms=end_ms - start_ms,
        truncated=timeline["truncated"],
        mode_shares=_mode_shares(runs, start_ms, end_ms),
        runs_by_mode=Counter(run["mode"] for run in runs),
        forecasts={
            phase: _forecast_error([run for run in runs if run["phase"] == phase])
            for phase in ("decode", "prefill")
        },
        repartitions=repartitions,
        policies=[change["policy"] for change in timeline["policies"]],
    )


def span_ms(timeline: Timeline) -> tuple[float, float]:
    """From the first run or sample to the moment when the timeline was taken."""
    starts = [run["start_ms"] for run in timeline["runs"]]
    starts += [sample["time_ms"] for sample in timeline["samples"][:1]]
    end_ms: float = timeline["window_ms"]
    return min(starts, default=end_ms), end_ms


def _mode_shares(runs: Sequence[Run], start_ms: float, end_ms: float) -> dict[str, float]:
    length_ms = dict.fromkeys((*MODES, IDLE), 0.0)
    edges = [(run["start_ms"], 1, run["mode"]) for run in runs]
    edges += [(run["end_ms"], -1, run["mode"]) for run in runs]
    at_work: Counter[str] = Counter()
    before_ms = start_ms
    for time_ms, change, mode in sorted(edges):
        length_ms[_mode_now(at_work)] += time_ms - before_ms
        at_work[mode] += change
        before_ms = time_ms
    length_ms[IDLE] += end_ms - before_ms
    total_ms = end_ms - start_ms
    return {mode: ms / total_ms if total_ms > 0 else 0.0 for mode, ms in length_ms.items()}


def _mode_now(at_work: Mapping[str, int]) -> str:
    return next((mode for mode in MODES if at_work[mode]), IDLE)


def _forecast_error(runs: Sequence[Run]) -> ForecastError:
    forecast = [run for run in runs if run["expected_ms"]]
    errors = sorted(abs(run["actual_ms"] / run["expected_ms"] - 1) for run in forecast)
    return ForecastError(
        runs=len(forecast),
        overruns=sum(is_overrun(run) for run in forecast),
        median=_quantile(errors, 0.5),
        p99=_quantile(errors, 0.99),
    )


def is_overrun(run: Run) -> bool:
    """It took longer than was expected at worst."""
    worst_ms = run["worst_ms"]
    return worst_ms is not None and run["actual_ms"] > worst_ms


def _quantile(ordered: Sequence[float], share: float) -> float | None:
    """Linear between the two nearest; None of nothing."""
    if not ordered:
        return None
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = math.ceil(place)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def render(summary: Summary) -> str:
    """A table for the terminal."""
    lines = [
        f"window          {summary.window_ms / 1000:.2f} s"
        + ("  (truncated: older runs are no longer kept)" if summary.truncated else ""),
        f"policy          {' -> '.join(summary.policies) or 'not said'}",
        "",
        f"{'mode':10} {'share of time':>14} {'runs':>8}",
    ]
    for mode in (*MODES, IDLE):
        runs = "" if mode == IDLE else f"{summary.runs_by_mode.get(mode, 0)}"
        lines.append(f"{mode:10} {summary.mode_shares[mode]:14.1%} {runs:>8}")
    lines += [
        "",
        f"{'forecasts':10} {'runs':>7} {'overruns':>9} {'error median':>13} {'error p99':>10}",
    ]
    for phase, error in summary.forecasts.items():
        lines.append(
            f"{phase:10} {error.runs:7} {error.overruns:9} "
            f"{_percent(error.median):>13} {_percent(error.p99):>10}"
        )
    repartitions = "not known" if summary.repartitions is None else str(summary.repartitions)
    lines += ["", f"re-partitions   {repartitions}"]
    return "\n".join(lines)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"
