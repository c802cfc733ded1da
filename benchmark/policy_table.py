"""Rows of a comparison as tables: who met the service level how often."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

ADAPTIVE = "adaptive"
Row = dict[str, Any]


def render(rows: Sequence[Row]) -> str:
    """A table for each workload and TBT: policies down, rates across, in a cell the attainment and
    the goodput in requests/s; * marks the best of a column, "error" a window without a result.
    Below, how far `adaptive` is ahead of the best other policy, in attainment."""
    groups = list(dict.fromkeys((row["workload"], row["slo_tbt_ms"]) for row in rows))
    return "\n\n".join(
        _table(
            f"{workload}, TBT {tbt_ms:g} ms: attainment (requests/s that met both limits)",
            [row for row in rows if (row["workload"], row["slo_tbt_ms"]) == (workload, tbt_ms)],
        )
        for workload, tbt_ms in groups
    )


def margin(rows: Sequence[Row]) -> float | None:
    """Of one point: attainment of `adaptive` less the best of the others; None without either."""
    measured = {row["policy"]: row["attainment"] for row in rows if "error" not in row}
    own = measured.pop(ADAPTIVE, None)
    return own - max(measured.values()) if own is not None and measured else None


def _table(title: str, rows: Sequence[Row]) -> str:
    policies = sorted({row["policy"] for row in rows}, key=lambda name: (name != ADAPTIVE, name))
    rates = sorted({row["rate"] for row in rows})
    columns = [[row for row in rows if row["rate"] == rate] for rate in rates]
    lines = [["requests/s", *(f"{rate:g}" for rate in rates)]]
    lines += [[policy, *(_cell(policy, column) for column in columns)] for policy in policies]
    margins = [margin(column) for column in columns]
    if any(value is not None for value in margins):
        lines.append(
            ["adaptive ahead by", *("" if value is None else f"{value:+.2f}" for value in margins)]
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        [title]
        + [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in lines
        ]
    )


def _cell(policy: str, column: Sequence[Row]) -> str:
    found = [row for row in column if row["policy"] == policy]
    if not found:
        return ""
    row = found[-1]
    if "error" in row:
        return "error"
    best = max(other["attainment"] for other in column if "error" not in other)
    mark = "*" if row["attainment"] == best else ""
    return f"{row['attainment']:.2f} ({row['goodput']:.2f}){mark}"
