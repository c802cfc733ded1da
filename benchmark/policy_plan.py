"""What a comparison of policies measures, in which order, and how much of it fits in a budget."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmark import tool_agent
from benchmark.trace_load import TraceLoad
from drift_scheduler.policies.names import heeds_tbt, parse_policy
from sglang.bench.datasets.mooncake import read_trace
from sglang.bench.errors import BenchError

# What a window takes besides its load: starting two clients, the answers after the last arrival.
WINDOW_OVERHEAD_S = 20.0
START_S = 120.0  # of the server, in a budget


@dataclass(frozen=True, slots=True)
class Workload:
    """mooncake: a trace with prefix ids. sharegpt_lengths: one of lengths only. tool_agent: made
    for each rate, and has no file."""

    kind: str
    file: Path | None = None

    def __str__(self) -> str:
        return self.kind if self.file is None else f"{self.kind}:{self.file.name}"

    @classmethod
    def parse(cls, text: str) -> Workload:
        """Reads "mooncake:FILE", "sharegpt_lengths:FILE" or "tool_agent"; ValueError otherwise."""
        kind, _, file = text.partition(":")
        if text == "tool_agent":
            return cls(kind)
        if kind not in ("mooncake", "sharegpt_lengths") or not file:
            raise ValueError(
                f"expected mooncake:FILE, sharegpt_lengths:FILE or tool_agent, got {text!r}"
            )
        return cls(kind, Path(file))

    def trace(
        self, rate: float, requests: int, seed: int, max_input_len: int, folder: Path
    ) -> Path:
        """A trace of at least so many requests that are no longer than max_input_len; one that is
        made is written to `folder`. Needs `check` to have passed."""
        if self.file is not None:
            return self.file
        path = folder / f"tool_agent_{rate:g}_{seed}_{requests}.jsonl.gz"
        if not path.exists():
            rows = tool_agent.trace_of(
                requests, rate=rate, seed=seed, max_input_tokens=max_input_len
            )
            tool_agent.write(rows, path)
        return path

    def check(self, requests: int, max_input_len: int) -> None:
        """Raises BenchError if the file cannot be read or has fewer requests than that."""
        if self.file is None:
            if max_input_len < tool_agent.SHORTEST_USEFUL_LIMIT:
                raise BenchError(
                    f"--max-input-len {max_input_len}: tool_agent needs at least "
                    f"{tool_agent.SHORTEST_USEFUL_LIMIT}"
                )
            return
        short_enough = sum(row.input_tokens <= max_input_len for row in read_trace(str(self.file)))
        if short_enough < requests:
            raise BenchError(
                f"--workload {self}: {short_enough} requests are no longer than --max-input-len "
                f"{max_input_len}, and --rate and --seconds ask for {requests}"
            )


@dataclass(frozen=True, slots=True)
class Point:
    """A load, on which every policy is measured."""

    workload: Workload
    rate: float

    def __str__(self) -> str:
        return f"{self.workload}, {self.rate:g} requests/s"


@dataclass(frozen=True, slots=True)
class Window:
    """One run of a policy on a load.

    tbts_ms: the limits that it is judged by, a row for each; its requests ask for the first.
    """

    policy: str
    tbts_ms: tuple[float, ...]

    def __str__(self) -> str:
        return f"{self.policy}, TBT {' and '.join(f'{tbt_ms:g}' for tbt_ms in self.tbts_ms)} ms"


@dataclass(frozen=True, slots=True)
class Comparison:
    """Every policy at every point, judged by every TBT. Limits of the TTFT as in TraceLoad.

    A policy that heeds the TBT that requests ask for runs once for each, another one once for all.
    warm_up_seconds: of the same load with other prompts, before each window, uncounted.
    """

    workloads: tuple[Workload, ...]
    policies: tuple[str, ...]
    rates: tuple[float, ...]
    tbts_ms: tuple[float, ...]
    seconds: float
    warm_up_seconds: float
    drain_seconds: float
    max_input_len: int
    ttft_ms: float
    ttft_ms_per_token: float
    seed: int

    @property
    def points(self) -> list[Point]:
        return [Point(*place) for place in itertools.product(self.workloads, self.rates)]

    @property
    def windows(self) -> list[Window]:
        """Of each point. Raises ValueError for a policy that does not exist."""
        return [
            Window(policy, tbts_ms)
            for policy in self.policies
            for tbts_ms in (
                [(tbt_ms,) for tbt_ms in self.tbts_ms]
                if heeds_tbt(parse_policy(policy))
                else [self.tbts_ms]
            )
        ]

    def check(self) -> None:
        """Raises BenchError naming a policy that does not exist or a workload that cannot be
        replayed."""
        for policy in self.policies:
            try:
                parse_policy(policy)
            except ValueError as error:
                raise BenchError(f"--policy: {error}") from None
        requests = max(round(rate * self.seconds) for rate in self.rates)
        for workload in self.workloads:
            workload.check(requests, self.max_input_len)

    def order(self, point: Point) -> list[Window]:
        """The windows, shuffled: what drifts on the machine during a run hits all alike."""
        shuffled = self.windows
        random.Random(f"{self.seed} {point}").shuffle(shuffled)
        return shuffled

    def load(self, point: Point, tbt_ms: float, folder: Path) -> TraceLoad:
        return self._load(point, tbt_ms, folder, self.seconds, self.seed)

    def warm_up(self, point: Point, tbt_ms: float, folder: Path) -> TraceLoad | None:
        """Its prompts share nothing with those of `load`."""
        if self.warm_up_seconds == 0:
            return None
        return self._load(point, tbt_ms, folder, self.warm_up_seconds, self.seed + 1)

    def _load(
        self, point: Point, tbt_ms: float, folder: Path, seconds: float, seed: int
    ) -> TraceLoad:
        requests = max(1, round(point.rate * seconds))
        return TraceLoad(
            point.workload.trace(point.rate, requests, seed, self.max_input_len, folder),
            point.rate,
            seconds,
            self.max_input_len,
            seed=seed,
            ttft_ms=self.ttft_ms,
            ttft_ms_per_token=self.ttft_ms_per_token,
            tbt_ms=tbt_ms,
        )

    @property
    def point_s(self) -> float:
        """About how long a point takes with all its windows."""
        return len(self.windows) * (self.seconds + self.warm_up_seconds + WINDOW_OVERHEAD_S)

    def fitting(self, budget_s: float, *, started: bool = False) -> int:
        """How many whole points fit; with `started` the server is up already."""
        left_s = budget_s - (0.0 if started else START_S)
        return max(0, min(len(self.points), int(left_s / self.point_s)))

    def budget_lines(self, budget_s: float) -> list[str]:
        """What will be measured and what will not, in words."""
        windows, points = len(self.windows), self.points
        fitting = self.fitting(budget_s)
        return [
            f"{budget_s / 60:g} minutes: room for {fitting * windows} of "
            f"{len(points) * windows} windows of about {self.point_s / windows:.0f} s",
            *dropped_lines(points[fitting:]),
        ]


def dropped_lines(points: Sequence[Point]) -> list[str]:
    return [f"  not measured: {point}" for point in points]
