"""One run of profile_drift, top to bottom: bring up, measure, fit, keep, report."""

from __future__ import annotations

import contextlib
import logging
import time
from dataclasses import dataclass
from pathlib import Path

from drift_scheduler.latencies import Latencies
from drift_scheduler.profile import Profile
from drift_scheduler.profile_grid import Effort, grid, held_out
from drift_scheduler.profile_pace import Costs
from sglang.srt.errors import ConfigError
from sglang.srt.model_executor.bring_up import Executor, bring_up
from sglang.srt.profiling.calibrate import key_of, limits_of
from sglang.srt.profiling.graph_sizes import padded_sizes
from sglang.srt.profiling.key import cache_path
from sglang.srt.profiling.meter import CLOCK_INTERVAL_S, engine_meter
from sglang.srt.profiling.nvml import device_clock
from sglang.srt.profiling.options import ProfileOptions
from sglang.srt.profiling.report import Findings, error_table, write_report
from sglang.srt.profiling.session import measure_within

logger = logging.getLogger(__name__)

# Of the time: for points that the model is not fitted to.
CHECKING_SHARE = 0.12


@dataclass(frozen=True, slots=True)
class Outcome:
    profile: Profile
    profile_path: Path
    report_path: Path
    findings: Findings


def run(options: ProfileOptions) -> Outcome:
    """Measures, writes profile and report, prints the table and where they lie.

    Raises ConfigError naming the flag, before the first measurement where it can.
    """
    for flag, path in (("--out", options.out), ("--report", options.report)):
        _check_writable(flag, path if flag == "--report" else path and path.parent)
    executor = bring_up(options.server)
    try:
        profile, findings = _measure(options, executor)
    finally:
        executor.close()
    path = options.out or cache_path(profile.key, brief=False)
    try:
        profile.save(path)
    except OSError as error:
        raise ConfigError(f"--out {path} cannot be written: {error}") from error
    folder = options.report or path.with_name(f"{path.stem}-report")
    try:
        report_path = write_report(folder, profile.key, findings)
    except OSError as error:
        raise ConfigError(f"--report {folder} cannot be written: {error}") from error
    print(error_table(findings))
    for note in findings.notes:
        print(note)
    print(f"Profile: {path}\nReport: {report_path}")
    return Outcome(profile, path, report_path, findings)


def _measure(options: ProfileOptions, executor: Executor) -> tuple[Profile, Findings]:
    args, lanes, runner = options.server, executor.lanes, executor.runner
    started_s = time.monotonic()
    budget_s = options.minutes * 60
    limits = limits_of(
        args, runner, num_slots=executor.num_slots, prefill_tokens=executor.prefill_tokens
    )
    with contextlib.ExitStack() as stack:
        clock = device_clock(executor.device, interval_s=CLOCK_INTERVAL_S)
        if clock is not None:
            stack.enter_context(clock)
        meter = engine_meter(runner, lanes, limits, clock=clock, seed=args.random_seed or 0)
        points = grid(lanes.table, limits, Effort.FULL)
        costs = Costs.probe(meter, points, budget_s)
        left_s = budget_s - (time.monotonic() - started_s)
        fitted = measure_within(
            meter,
            points,
            costs,
            (1 - CHECKING_SHARE) * left_s,
            title="Measuring",
            shows_progress=options.show_progress,
        )
        checked = measure_within(
            meter,
            held_out(lanes.table, limits),
            costs,
            CHECKING_SHARE * left_s,
            title="Checking",
            shows_progress=options.show_progress,
        )
    profile = Profile(
        key_of(args, lanes, runner),
        tuple(fitted.samples),
        sizes=padded_sizes(lanes.table, runner),
        checked=tuple(checked.samples),
    )
    findings = Findings(
        estimator=Latencies.of(profile, runner.num_layers).estimator,
        fitted=fitted.samples,
        checked=checked.samples,
        seconds=time.monotonic() - started_s,
        notes=[
            *(f"Measuring: {note}" for note in fitted.notes),
            *(f"Checking: {note}" for note in checked.notes),
        ],
    )
    return profile, findings


def _check_writable(flag: str, folder: Path | None) -> None:
    """A folder that cannot be made is told before minutes have gone by."""
    if folder is None:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{flag}: {error}") from error
