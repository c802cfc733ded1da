"""How well a latency model fits what was measured: report.md, and plots beside it."""

from __future__ import annotations

import importlib.util
import logging
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from drift_scheduler.estimator import Estimator
from drift_scheduler.profile import Kind, ProfileKey, Sample, Split

logger = logging.getLogger(__name__)

Group = tuple[Kind, Split]


@dataclass(frozen=True, slots=True)
class Findings:
    """What was measured and what the estimator makes of it.

    fitted, checked: samples that it was fitted to, and others. seconds: that measuring took.
    notes: what was given up for time.
    """

    estimator: Estimator
    fitted: Sequence[Sample]
    checked: Sequence[Sample]
    seconds: float
    notes: Sequence[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Slowdown:
    """Of one phase beside the other, against what the estimator says of it alone."""

    kind: Kind
    partition: Split
    factors: Sequence[float]


def slowdowns(findings: Findings) -> list[Slowdown]:
    """By phase and partition, of all samples taken side by side."""
    beside = [s for s in (*findings.fitted, *findings.checked) if s.beside]
    return [
        Slowdown(*group, [s.seconds / findings.estimator.solo_s(s) for s in samples])
        for group, samples in _grouped(beside)
    ]


def error_table(findings: Findings) -> str:
    """Errors by kind and partition in aligned columns, for a terminal."""
    rows = [_ERROR_TITLES, *_error_rows(findings)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column < _TEXT_COLUMNS else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def write_report(folder: Path, key: ProfileKey, findings: Findings) -> Path:
    """Writes report.md, and with matplotlib the plots that it shows; returns the report's path.

    Raises OSError.
    """
    folder.mkdir(parents=True, exist_ok=True)
    plots = _plots(folder, findings)
    path = folder / "report.md"
    path.write_text("\n".join(_lines(key, findings, plots)) + "\n", encoding="utf-8")
    return path


_TEXT_COLUMNS = 2
_ERROR_TITLES = ["kind", "on", "fitted", "mean", "worst", "held out", "mean", "worst"]
_SLOWDOWN_TITLES = ["kind", "on", "samples", "least", "mean", "most"]


def _error_rows(findings: Findings) -> list[list[str]]:
    errors = [
        {
            (row.kind, row.partition): [str(row.count), f"{row.mean:.1%}", f"{row.worst:.1%}"]
            for row in findings.estimator.errors(samples).rows
        }
        for samples in (findings.fitted, findings.checked)
    ]
    groups = sorted(errors[0].keys() | errors[1].keys(), key=_order)
    return [
        [group[0].value, str(group[1]), *(cell for part in errors for cell in part.get(group, _NO))]
        for group in groups
    ]


_NO = ["0", "-", "-"]


def _slowdown_rows(findings: Findings) -> list[list[str]]:
    return [
        [
            slowdown.kind.value,
            str(slowdown.partition),
            str(len(slowdown.factors)),
            *(f"{of(slowdown.factors):.2f}" for of in (min, statistics.fmean, max)),
        ]
        for slowdown in slowdowns(findings)
    ]


def _lines(key: ProfileKey, findings: Findings, plots: Sequence[Path]) -> Iterable[str]:
    yield from ("# Latency profile", "")
    yield f"{key.model}, {key.dtype}, on {key.gpu} ({key.sms} SMs or cores)."
    yield from ("", ", ".join(f"{name} {version}" for name, version in key.versions.items()), "")
    count = len(findings.fitted) + len(findings.checked)
    yield f"{count} samples, measured in {findings.seconds:.0f} s."
    yield from (f"- {note}" for note in findings.notes)
    yield from ("", "## Relative error of the estimator, alone", "")
    yield "Held-out samples were measured, but the estimator was not fitted to them."
    yield from ("", *_table(_ERROR_TITLES, _error_rows(findings)))
    rows = _slowdown_rows(findings)
    if rows:
        yield from ("", "## Slowdown of each phase beside the other", "")
        yield "Measured time over what the estimator says of the same work alone."
        yield from ("", *_table(_SLOWDOWN_TITLES, rows))
    clocks = _clock_rows(findings)
    if clocks:
        yield from ("", "## Clock of the SMs, MHz", "")
        yield from _table(["kind", "on", "beside", "samples", "least", "mean", "most"], clocks)
    if plots:
        yield from ("", "## Predicted against measured", "")
        yield from (f"![{plot.stem}]({plot.name})" for plot in plots)


def _clock_rows(findings: Findings) -> list[list[str]]:
    known = [s for s in (*findings.fitted, *findings.checked) if s.clock_mhz is not None]
    rows = []
    for beside in (False, True):
        for group, samples in _grouped([s for s in known if s.beside is beside]):
            mhz = [s.clock_mhz for s in samples if s.clock_mhz is not None]
            rows.append(
                [
                    group[0].value,
                    str(group[1]),
                    "yes" if beside else "no",
                    str(len(mhz)),
                    *(f"{of(mhz):.0f}" for of in (min, statistics.fmean, max)),
                ]
            )
    return rows


def _table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    dashes = ["---" if column < _TEXT_COLUMNS else "---:" for column in range(len(titles))]
    return [f"| {' | '.join(cells)} |" for cells in (titles, dashes, *rows)]


def _grouped(samples: Iterable[Sample]) -> list[tuple[Group, list[Sample]]]:
    groups: dict[Group, list[Sample]] = {}
    for sample in samples:
        groups.setdefault((sample.kind, sample.partition), []).append(sample)
    return sorted(groups.items(), key=lambda item: _order(item[0]))


def _order(group: Group) -> tuple[str, bool, int]:
    kind, split = group
    return kind.value, not split.exclusive, split.decode_sms


def _plots(folder: Path, findings: Findings) -> list[Path]:
    if importlib.util.find_spec("matplotlib") is None:
        logger.info("The report has no plots: they need matplotlib, of the extra `bench`")
        return []
    from sglang.srt.profiling.plots import write_plots

    return write_plots(folder, findings)
