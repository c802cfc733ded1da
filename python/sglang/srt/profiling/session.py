"""Measuring a list of points within a time, with a progress bar that says what it is at."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass

from tqdm import tqdm

from drift_scheduler.profile import Sample
from drift_scheduler.profile_pace import Costs, Pacer, schedule
from drift_scheduler.profiler import Meter, Point, measure

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Session:
    """notes: what was given up for time, in words."""

    samples: list[Sample]
    seconds: float
    notes: list[str]


def measure_within(
    meter: Meter,
    points: Sequence[Point],
    costs: Costs,
    budget_s: float,
    *,
    title: str,
    shows_progress: bool = True,
) -> Session:
    """Says in the log what will be measured and what not, and measures it."""
    started_s = time.monotonic()
    plan = schedule(points, costs, budget_s)
    told = plan.told()
    logger.info("%s: %s", title, "; ".join(told))
    begun = itertools.count()
    pacer = Pacer(plan, costs, budget_s, time.monotonic)
    with tqdm(total=len(plan.points), desc=title, unit="point", disable=not shows_progress) as bar:

        def show(point: Point) -> None:
            bar.update(next(begun) - bar.n)
            bar.set_postfix_str(str(point))

        samples = measure(meter, plan.points, pacer, show)
        bar.update(len(plan.points) - bar.n)
    notes = told[1:]
    if pacer.slightest != plan.repetitions:
        notes.append(f"Slower than expected: some points got only {pacer.slightest}")
        logger.info("%s: %s", title, notes[-1])
    return Session(samples, time.monotonic() - started_s, notes)
