"""Simulated beside measured goodput: how far apart, and whether the best policy is the same."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence

from benchmark.policy_table import Row

# Measured goodputs that are no further apart than this are a tie: runs differ as much.
TIE = 0.03


# Workload, TBT, rate, and the commit that was measured: another one was run at another time, on
# another machine maybe, and does not compare.
_Point = tuple[str, float, float, str]


def render(lines: Sequence[Row]) -> str:
    """A table for each point, and what holds for all. Of a window measured twice the last counts
    in the tables."""
    points: dict[_Point, dict[str, Row]] = {}
    for line in lines:
        commit = str((line["window"].get("environment") or {}).get("commit", "unknown"))
        point = line["workload"], line["slo_tbt_ms"], line["rate"], commit
        points.setdefault(point, {})[line["policy"]] = line
    parts = [_table(point, list(by_policy.values())) for point, by_policy in points.items()]
    return "\n\n".join([*parts, summary(lines, [list(rows.values()) for rows in points.values()])])


def summary(lines: Sequence[Row], points: Sequence[Sequence[Row]]) -> str:
    """Errors over all windows, and at how many points the ranking is the same."""
    errors = [abs(line["goodput_error"]) for line in lines if line["goodput_error"] is not None]
    text = []
    if errors:
        text.append(
            f"goodput, simulated against measured: median error {statistics.median(errors):.1%}, "
            f"largest {max(errors):.1%}, over {len(errors)} windows"
        )
    if left_out := len(lines) - len(errors):
        text.append(f"{left_out} windows had a measured goodput of 0 and have no relative error")
    ranked = [rows for rows in points if len(rows) > 1]
    same = sum(not swapped(rows) for rows in ranked)
    if ranked:
        text.append(f"same ranking at {same} of {len(ranked)} points with several policies")
    else:
        text.append("no point has several policies to rank")
    return "\n".join(text)


def swapped(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """Pairs of one point's policies, (better, worse) as measured, that the simulator does not tell
    apart so."""
    found = []
    for pair in itertools.combinations(rows, 2):
        better, worse = sorted(pair, key=_measured, reverse=True)
        tied = _measured(better) - _measured(worse) < TIE * _measured(better)
        if not tied and _measured(better) and _simulated(better) <= _simulated(worse):
            found.append((better["policy"], worse["policy"]))
    return found


def _table(point: _Point, rows: Sequence[Row]) -> str:
    workload, tbt_ms, rate, commit = point
    ranked = sorted(rows, key=_measured, reverse=True)
    by_simulated = sorted(rows, key=_simulated, reverse=True)
    cells = [["policy", "measured", "simulated", "rank", "error", "attainment"]]
    for row in ranked:
        error = row["goodput_error"]
        cells.append(
            [
                row["policy"],
                f"{_measured(row):.3f}",
                f"{_simulated(row):.3f}",
                f"{ranked.index(row) + 1} -> {by_simulated.index(row) + 1}",
                "" if error is None else f"{error:+.1%}",
                f"{row['measured']['attainment']:.2f} -> {row['simulated']['attainment']:.2f}",
            ]
        )
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    load = f"{workload}, TBT {tbt_ms:g} ms, {rate:g} requests/s"
    text = [f"{load}, commit {commit}: goodput in requests/s"]
    text += [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in cells
    ]
    if len(rows) > 1:
        pairs = swapped(rows)
        names = ", ".join(f"{better} is not above {worse}" for better, worse in pairs)
        text.append(f"ranking differs: {names}" if pairs else "same ranking")
    return "\n".join(text)


def _measured(row: Row) -> float:
    return float(row["measured"]["goodput"])


def _simulated(row: Row) -> float:
    return float(row["simulated"]["goodput"])
