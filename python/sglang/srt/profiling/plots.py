"""The plots of a profile's report. Imported only where matplotlib is installed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from drift_scheduler.profile import Kind, Sample, Split
from sglang.srt.profiling.report import Findings, slowdowns

_INCHES = 4.0
_COLUMNS = 4


def write_plots(folder: Path, findings: Findings) -> list[Path]:
    """A PNG for each kind, with one square a partition, and one of slowdowns; those that have
    anything to show."""
    alone = [sample for sample in (*findings.fitted, *findings.checked) if not sample.beside]
    paths = []
    for kind in Kind:
        splits = sorted(
            {sample.partition for sample in alone if sample.kind is kind},
            key=lambda split: (not split.exclusive, split.decode_sms),
        )
        if splits:
            path = folder / f"{kind.value}.png"
            _predicted_against_measured(path, kind, splits, findings)
            paths.append(path)
    if any(slowdowns(findings)):
        paths.append(_slowdown_plot(folder / "slowdown.png", findings))
    return paths


def _predicted_against_measured(
    path: Path, kind: Kind, splits: Sequence[Split], findings: Findings
) -> None:
    columns = min(_COLUMNS, len(splits))
    rows = -(-len(splits) // columns)
    figure = Figure(figsize=(_INCHES * columns, _INCHES * rows), layout="constrained")
    for place, split in enumerate(splits):
        axes = figure.add_subplot(rows, columns, place + 1)
        axes.set_title(f"{kind.value} on {split}")
        axes.set_xlabel("measured, ms")
        axes.set_ylabel("predicted, ms")
        axes.loglog()
        for name, marker, samples in (
            ("fitted", "o", findings.fitted),
            ("held out", "x", findings.checked),
        ):
            mine = [s for s in samples if not s.beside and (s.kind, s.partition) == (kind, split)]
            _scatter(axes, mine, findings, name, marker)
        low, high = axes.get_xlim()
        axes.plot([low, high], [low, high], color="grey", linewidth=0.8)
        axes.legend()
    figure.savefig(path)


def _scatter(
    axes: Axes, samples: Sequence[Sample], findings: Findings, name: str, marker: str
) -> None:
    axes.scatter(
        [sample.seconds * 1e3 for sample in samples],
        [findings.estimator.solo_s(sample) * 1e3 for sample in samples],
        marker=marker,
        label=name,
    )


def _slowdown_plot(path: Path, findings: Findings) -> Path:
    figure = Figure(figsize=(2 * _INCHES, _INCHES), layout="constrained")
    axes = figure.add_subplot()
    for kind, marker in ((Kind.DECODE, "o"), (Kind.PREFILL, "^")):
        shown = [
            (slowdown.partition, factor)
            for slowdown in slowdowns(findings)
            if slowdown.kind is kind
            for factor in slowdown.factors
        ]
        axes.scatter(
            [str(split) for split, _ in shown],
            [factor for _, factor in shown],
            marker=marker,
            label=kind.value,
        )
    axes.axhline(1.0, color="grey", linewidth=0.8)
    axes.set_ylabel("time beside the other phase / alone")
    axes.legend()
    figure.savefig(path)
    return path
