"""A timeline as a picture: lanes, SMs, queue, slack, and forecasts against what came."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sglang.drift_report.source import Timeline
from sglang.drift_report.summary import Run, Summary, is_overrun, render, span_ms

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes

WIDTH_PX, HEIGHT_PX = 1600, 1000
_DPI = 100
_BLUE, _ORANGE, _PURPLE, _RED, _GREY = "#3b6fb6", "#ee8a2c", "#9a5fb0", "#c8322b", "#777777"
_MODE_COLOURS = {"decode": _BLUE, "prefill": _ORANGE, "fused": _PURPLE}
_PHASE_COLOURS = {"decode": _BLUE, "prefill": _ORANGE}
_LANES = {"prefill": 1.0, "decode": 0.0}  # and its height on the axis
_LANE_HEIGHT = 0.8
# Slack is read around zero, and a first token's is a thousand times another token's.
_LINEAR_SLACK_MS = 100.0


def draw(timeline: Timeline, summary: Summary, out: Path) -> None:
    """Writes a picture of WIDTH_PX x HEIGHT_PX; its format is that of the file's suffix."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH_PX / _DPI, HEIGHT_PX / _DPI), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(1, 2, width_ratios=(2.7, 1))
    left, right = figure.add_subfigure(grid[0, 0]), figure.add_subfigure(grid[0, 1])
    lanes, sms, queue, slack = over_time = left.subplots(
        4, 1, sharex=True, gridspec_kw={"height_ratios": (1.2, 1, 1.1, 1.1)}
    )
    launches, numbers = right.subplots(2, 1)
    start_ms, end_ms = span_ms(timeline)
    origin = _Origin(start_ms)
    _draw_lanes(lanes, timeline["runs"], origin)
    _draw_sms(sms, timeline, origin)
    _draw_queue(queue, timeline["samples"], origin)
    _draw_slack(slack, timeline["samples"], origin)
    for axes in over_time:
        axes.grid(axis="x", alpha=0.25)
        for change in timeline["policies"][1:]:
            axes.axvline(origin.seconds(change["from_ms"]), color="black", ls="--", lw=1)
    _name_policies(lanes, timeline["policies"], origin)
    left.align_ylabels(over_time)
    slack.set_xlabel("time (s)")
    lanes.set_xlim(0, max(origin.seconds(end_ms), 1e-6))
    _draw_forecasts(launches, timeline["runs"])
    _write_summary(numbers, summary)
    figure.savefig(out)


class _Origin:
    """Time zero of the picture."""

    def __init__(self, start_ms: float) -> None:
        self._start_ms = start_ms

    def seconds(self, time_ms: float) -> float:
        return (time_ms - self._start_ms) / 1000


def _draw_lanes(axes: Axes, runs: Sequence[Run], origin: _Origin) -> None:
    colours = _colours(runs)
    for name, colour in colours.items():
        for phase, bottom in _LANES.items():
            bars = [
                (origin.seconds(run["start_ms"]), (run["end_ms"] - run["start_ms"]) / 1000)
                for run in runs
                if run["phase"] == phase and _name(run) == name
            ]
            # An edge of the bar's own colour keeps one visible that is thinner than a pixel.
            axes.broken_barh(bars, (bottom - _LANE_HEIGHT / 2, _LANE_HEIGHT), color=colour, lw=0.3)
        axes.plot([], [], color=colour, lw=8, label=name)
    axes.set_yticks(list(_LANES.values()), [f"{phase}\nlane" for phase in _LANES])
    axes.set_ylim(-0.6, 1.6)
    if colours:
        axes.legend(loc="lower left", bbox_to_anchor=(0, 0.98), ncols=7, fontsize=9, frameon=False)


def _name(run: Run) -> str:
    """As in the legend."""
    return f"split {run['partition']}" if run["mode"] == "split" else str(run["mode"])


def _colours(runs: Sequence[Run]) -> dict[str, Any]:
    """By legend name. Splits are shades of green, darker with more SMs for prefill."""
    import matplotlib

    names = {_name(run) for run in runs}
    colours: dict[str, Any] = {
        mode: colour for mode, colour in _MODE_COLOURS.items() if mode in names
    }
    splits = {_name(run): run["prefill_sms"] for run in runs if run["mode"] == "split"}
    shades = matplotlib.colormaps["YlGn"]
    for place, name in enumerate(sorted(splits, key=lambda name: splits[name])):
        colours[name] = shades(0.35 + 0.6 * (place + 1) / len(splits))
    return colours


def _draw_sms(axes: Axes, timeline: Timeline, origin: _Origin) -> None:
    """Decode from below and prefill from above, so that a split shows as the line between."""
    total = timeline["total_sms"]
    for phase, colour in _PHASE_COLOURS.items():
        idle = 0 if phase == "decode" else total
        times_s: list[float] = [0.0]
        bounds: list[int] = [idle]
        for run in timeline["runs"]:
            if run["phase"] == phase:
                sms = run[f"{phase}_sms"]
                times_s += [origin.seconds(run["start_ms"]), origin.seconds(run["end_ms"])]
                bounds += [sms if phase == "decode" else total - sms, idle]
        axes.fill_between(
            times_s, idle, bounds, step="post", color=colour, alpha=0.5, lw=0, label=f"{phase} SMs"
        )
    axes.set_ylim(0, total)
    axes.locator_params(axis="y", integer=True)
    axes.set_ylabel("SMs at work\n(cores on a CPU)")
    _legend(axes, [*axes.get_legend_handles_labels()[0], *_draw_clock(axes, timeline, origin)])


def _draw_clock(axes: Axes, timeline: Timeline, origin: _Origin) -> list[Artist]:
    """On an axis of its own, from zero, so that a lower clock looks as slow as it is."""
    known = [
        (origin.seconds(sample["time_ms"]), sample["sm_clock_mhz"] / 1e3)
        for sample in timeline["samples"]
        if sample.get("sm_clock_mhz") is not None
    ]
    if not known:
        return []
    clock = axes.twinx()
    clock.set_ylabel("SM clock (GHz)")
    times_s, ghz = zip(*known, strict=True)
    line = clock.step(times_s, ghz, where="post", color=_GREY, lw=1, label="clock (right)")
    clock.set_ylim(0, 1.1 * max(ghz))
    return list(line)


def _legend(axes: Axes, handles: Sequence[Artist]) -> None:
    """Above the axes, where it hides nothing."""
    axes.legend(
        handles=list(handles),
        loc="lower right",
        bbox_to_anchor=(1, 0.98),
        fontsize=8,
        ncols=3,
        frameon=False,
    )


def _draw_queue(axes: Axes, samples: Sequence[Mapping[str, Any]], origin: _Origin) -> None:
    times_s = [origin.seconds(sample["time_ms"]) for sample in samples]
    tokens = axes.twinx()
    lines = []
    for where, key, label, colour in (
        (axes, "waiting_prompts", "waiting prompts", _ORANGE),
        (axes, "running_requests", "running requests", _BLUE),
        (tokens, "waiting_tokens", "waiting tokens (right)", _GREY),
    ):
        values = [sample[key] for sample in samples]
        lines += where.step(times_s, values, where="post", color=colour, lw=1.2, label=label)
    for where in (axes, tokens):
        where.set_ylim(bottom=0)
        where.locator_params(axis="y", integer=True)
    axes.set_ylabel("requests")
    tokens.set_ylabel("tokens")
    _legend(axes, lines)


def _draw_slack(axes: Axes, samples: Sequence[Mapping[str, Any]], origin: _Origin) -> None:
    drawn = False
    for key, label, colour in (
        ("token_slack_ms", "next token of a running request", _BLUE),
        ("first_token_slack_ms", "first token of a prompt", _ORANGE),
    ):
        points = [(s["time_ms"], s[key]) for s in samples]
        if any(slack_ms is not None for _, slack_ms in points):
            drawn = True
            axes.step(
                [origin.seconds(time_ms) for time_ms, _ in points],
                [float("nan") if slack_ms is None else slack_ms for _, slack_ms in points],
                where="post",
                color=colour,
                lw=1.2,
                label=label,
            )
    axes.set_yscale("symlog", linthresh=_LINEAR_SLACK_MS)
    axes.axhline(0, color=_RED, lw=1)
    axes.set_ylabel("smallest slack (ms)\nbelow 0: late")
    if drawn:
        _legend(axes, axes.get_legend_handles_labels()[0])
    else:
        _say(axes, "no request has a deadline")


def _draw_forecasts(axes: Axes, runs: Sequence[Run]) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    axes.set_title("one launch", fontsize=10)
    axes.set_xlabel("expected (ms)")
    axes.set_ylabel("actual (ms)")
    shown = [run for run in runs if run["expected_ms"] and run["actual_ms"]]
    if not shown:
        _say(axes, "no forecasts: this policy\nworks without a latency model")
        axes.set(xticks=[], yticks=[])
        return
    for phase, colour in _PHASE_COLOURS.items():
        _scatter(axes, (r for r in shown if r["phase"] == phase), phase, color=colour, s=9)
    late = [run for run in shown if is_overrun(run)]
    _scatter(axes, late, "over its worst case", marker="o", s=30, facecolors="none", color=_RED)
    for axis, scale in ((axes.xaxis, axes.set_xscale), (axes.yaxis, axes.set_yscale)):
        scale("log")
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter(NullFormatter())
    ends = [min(r["expected_ms"] for r in shown) * 0.7, max(r["expected_ms"] for r in shown) * 1.4]
    axes.plot(ends, ends, color="black", lw=0.8, label="as expected")
    axes.legend(loc="upper left", fontsize=8)
    axes.grid(alpha=0.25)


def _scatter(axes: Axes, runs: Iterable[Run], label: str, **style: Any) -> None:
    points = [(run["expected_ms"], run["actual_ms"]) for run in runs]
    if points:
        axes.scatter(*zip(*points, strict=True), label=label, alpha=0.6, lw=0.8, **style)


def _name_policies(axes: Axes, policies: Sequence[Mapping[str, Any]], origin: _Origin) -> None:
    for change in policies:
        axes.annotate(
            change["policy"],
            (max(origin.seconds(change["from_ms"]), 0.0), 0.97),
            xycoords=("data", "axes fraction"),
            xytext=(4, 0),
            textcoords="offset points",
            fontsize=8,
            rotation=90,  # changes may be close to each other
            va="top",
            bbox={"facecolor": "white", "alpha": 0.85, "pad": 1.5, "lw": 0},
        )


def _write_summary(axes: Axes, summary: Summary) -> None:
    axes.axis("off")
    axes.text(
        -0.1,
        1,
        render(summary),
        family="monospace",
        fontsize=8.5,
        va="top",
        transform=axes.transAxes,
        in_layout=False,  # it would take its width from the axes above
    )


def _say(axes: Axes, text: str) -> None:
    axes.text(0.5, 0.5, text, ha="center", va="center", color=_GREY, transform=axes.transAxes)
