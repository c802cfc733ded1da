"""latencies_for: the latency model a server starts with, from a file or measured on the spot.

--drift-profile    the file that was asked for, or an error
cache, full        what `python -m sglang.profile_drift` left for this machine and model
cache, brief       what an earlier start measured
neither            a brief calibration, kept for the next start
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from pathlib import Path

import torch

from drift_scheduler.clock import ClockRatio
from drift_scheduler.estimator import EstimatorError
from drift_scheduler.lane import LaneProvider
from drift_scheduler.latencies import Latencies
from drift_scheduler.partition import PartitionTable
from drift_scheduler.profile import Profile, ProfileError, ProfileKey, Split
from drift_scheduler.profile_grid import Effort, Limits, grid
from drift_scheduler.profile_pace import Costs
from sglang.srt.errors import ConfigError
from sglang.srt.model_executor.lane_kernels import choose_attention_backend
from sglang.srt.model_executor.model_runner import ModelRunner
from sglang.srt.profiling.graph_sizes import padded_sizes
from sglang.srt.profiling.key import cache_path, profile_key
from sglang.srt.profiling.nvml import device_clock
from sglang.srt.profiling.session import measure_within
from sglang.srt.server_args import ServerArgs

logger = logging.getLogger(__name__)

BRIEF_BUDGET_S = 13.0
# Of a CPU's pool no more is used: memory is taken, page by page, when it is first written, and to
# take gigabytes of it would be most of what is measured.
CPU_POOL_TOKENS = 16384


def latencies_for(
    args: ServerArgs,
    lanes: LaneProvider,
    runner: ModelRunner,
    *,
    num_slots: int,
    prefill_tokens: int,
    clock: ClockRatio | None = None,
    folder: Path | None = None,
    budget_s: float = BRIEF_BUDGET_S,
) -> Latencies:
    """Of an engine that is ready and serves nothing yet: rows and slots are used as if free.

    clock: fed by the caller, see device_clock. folder: of cached profiles, default_folder() if
    None. budget_s: of a brief calibration.
    Raises ConfigError naming --drift-profile.
    """
    key, table = key_of(args, lanes, runner), lanes.table
    if args.drift_profile is not None:
        try:
            profile = Profile.load(args.drift_profile, key)
            latencies = _fitted(profile, table, runner, clock)
        except (ProfileError, EstimatorError) as error:
            raise ConfigError(f"--drift-profile: {error}") from error
        if missing := _missing(profile, table):
            logger.warning(
                "--drift-profile has nothing of %s: they are guessed from their neighbours",
                ", ".join(map(str, missing)),
            )
        return latencies
    for brief in (False, True):
        path = cache_path(key, brief=brief, folder=folder)
        cached = _cached(path, key)
        if cached is None:
            continue
        if missing := _missing(cached, table):
            logger.info("%s has nothing of %s", path, ", ".join(map(str, missing)))
            continue
        logger.info("Latency model from %s", path)
        if brief:
            _recommend_profile()
        return _fitted(cached, table, runner, clock)
    limits = limits_of(args, runner, num_slots=num_slots, prefill_tokens=prefill_tokens)
    profile = _calibrate(runner, lanes, limits, key, budget_s)
    try:
        profile.save(cache_path(key, brief=True, folder=folder))
    except OSError as error:
        logger.warning("The calibration is not kept for the next start: %s", error)
    _recommend_profile()
    return _fitted(profile, table, runner, clock)


def key_of(args: ServerArgs, lanes: LaneProvider, runner: ModelRunner) -> ProfileKey:
    config = runner.model.config
    return profile_key(
        args,
        config,
        runner.device,
        total_sms=lanes.table.total_sms,
        attention_backend=choose_attention_backend(args.attention_backend, config, runner.device),
    )


def limits_of(
    args: ServerArgs, runner: ModelRunner, *, num_slots: int, prefill_tokens: int
) -> Limits:
    """What the engine can hold; one row and one page are not for requests."""
    num_rows, context_length = runner.slot_table.shape
    pool_tokens = num_slots - args.page_size
    if runner.device.type == "cpu":
        pool_tokens = min(pool_tokens, CPU_POOL_TOKENS // args.page_size * args.page_size)
    return Limits(
        prefill_tokens=prefill_tokens,
        requests=num_rows - 1,
        pool_tokens=pool_tokens,
        context_length=context_length,
        page_size=args.page_size,
    )


def _calibrate(
    runner: ModelRunner, lanes: LaneProvider, limits: Limits, key: ProfileKey, budget_s: float
) -> Profile:
    # The meter drives lanes as the benchmarks do, and those bring up engines, which calls us.
    from sglang.srt.profiling.meter import CLOCK_INTERVAL_S, engine_meter

    started_s = time.monotonic()
    with contextlib.ExitStack() as stack:
        clock = device_clock(runner.device, interval_s=CLOCK_INTERVAL_S)
        if clock is not None:
            stack.enter_context(clock)
        meter = engine_meter(runner, lanes, limits, clock=clock)
        points = grid(lanes.table, limits, Effort.BRIEF)
        costs = Costs.probe(meter, points, budget_s)
        session = measure_within(meter, points, costs, budget_s, title="Calibrating latencies")
    if runner.device.type == "cuda":
        torch.cuda.empty_cache()
    logger.info("Calibrated the latency model in %.1f s", time.monotonic() - started_s)
    # As the next start will read it, so that both fit the very same rows in the same order.
    profile = Profile(key, session.samples, sizes=padded_sizes(lanes.table, runner))
    return Profile.from_json(profile.to_json())


def _cached(path: Path, key: ProfileKey) -> Profile | None:
    if not path.exists():
        return None
    try:
        return Profile.load(path, key)
    except ProfileError as error:
        logger.warning("A cached profile is left aside: %s", error)
        return None


def _missing(profile: Profile, table: PartitionTable) -> list[Split]:
    """Partitions of the table that were not measured: another division of the device may have
    been asked for than when the profile was made."""
    measured = {sample.partition for sample in profile.samples}
    splits = [Split.of(table[index]) for index in range(len(table))]
    return [split for split in splits if split not in measured]


def _fitted(
    profile: Profile, table: PartitionTable, runner: ModelRunner, clock: ClockRatio | None
) -> Latencies:
    """Raises EstimatorError if the profile says nothing of a phase."""
    sizes = padded_sizes(table, runner)
    return Latencies.of(profile, runner.num_layers, sizes=sizes, clock=clock)


def keep_what_was_learnt(args: ServerArgs, latencies: Latencies | None) -> None:
    """With --drift-profile-save: what the guard has seen goes to the profile it started from."""
    path = args.drift_profile
    if not args.drift_profile_save or path is None or latencies is None:
        return
    cells = tuple(latencies.guard.rows())
    try:
        profile = Profile.from_json(Path(path).read_bytes())
        dataclasses.replace(profile, cells=cells).save(path)
    except (OSError, ProfileError) as error:
        logger.warning("--drift-profile-save: %s", error)
    else:
        logger.info("%d rows of the contention guard are kept in %s", len(cells), path)


def _recommend_profile() -> None:
    logger.info(
        "The latency model comes from a brief calibration; `python -m sglang.profile_drift` with "
        "the same flags makes a better one, which the next start will find"
    )
