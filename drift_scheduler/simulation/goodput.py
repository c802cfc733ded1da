"""The highest rate at which enough requests still meet their SLO."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

# Rates tried by doubling or halving before the search gives up.
MAX_DOUBLINGS = 24


@dataclass(frozen=True, slots=True)
class Probe:
    rate_per_s: float
    attainment: float


@dataclass(frozen=True, slots=True)
class GoodputSearch:
    """rate_per_s: the highest that was tried and met the target; 0 if none did.

    unbounded: every rate tried met it. probes: in the order of trial.
    """

    rate_per_s: float
    unbounded: bool
    probes: tuple[Probe, ...]


def find_goodput(
    attainment_at: Callable[[float], float],
    target: float,
    first_rate_per_s: float,
    tolerance: float = 0.02,
) -> GoodputSearch:
    """Doubles or halves the rate until one that meets the target and one that does not are
    neighbours, then halves the interval until the two differ by no more than `tolerance`.

    Attainment is taken to fall as the rate rises.
    """
    if not (0 < target <= 1 and first_rate_per_s > 0 and tolerance > 0):
        raise ValueError(f"{target=}, {first_rate_per_s=}, {tolerance=}")
    probes: list[Probe] = []

    def meets(rate_per_s: float) -> bool:
        probes.append(Probe(rate_per_s, attainment_at(rate_per_s)))
        return probes[-1].attainment >= target

    good, bad = 0.0, 0.0
    rate = first_rate_per_s
    for _ in range(MAX_DOUBLINGS):
        if meets(rate):
            good, rate = rate, rate * 2
        else:
            bad, rate = rate, rate / 2
        if good and bad:
            break
    while good and bad and bad / good > 1 + tolerance:
        middle = (good + bad) / 2
        if meets(middle):
            good = middle
        else:
            bad = middle
    return GoodputSearch(good, bad == 0.0, tuple(probes))
