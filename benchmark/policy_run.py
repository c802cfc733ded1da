"""Measures a comparison: one server, one window after the other, one JSON object for each."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import operator
import re
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from benchmark.host_pauses import Pauses
from benchmark.policy_plan import Comparison, Point, Window, dropped_lines
from benchmark.policy_table import Row
from benchmark.server_process import ServerError, ServerProcess
from benchmark.trace_load import (
    LaneUse,
    LoadError,
    TraceLoad,
    call,
    client_flags,
    internal_state,
    model_flags,
    run_bench,
    vocab_size,
)
from sglang.bench.goodput import Objectives

START_LIMIT_S = 300.0
STOP_LIMIT_S = 60.0
# Of every request, kept with the timeline.
CLIENT_DETAILS = (
    "conversations",
    "turns",
    "start_times",
    "input_lens",
    "cached_tokens",
    "output_lens",
    "ttfts",
    "itls",
    "errors",
)
JUDGED_DETAILS = ("input_lens", "cached_tokens", "ttfts", "itl_p99s_ms", "errors")


class Target(Protocol):
    """A server whose policy can be changed while it runs."""

    ready_s: float
    """How long its start took."""

    @property
    def running(self) -> bool: ...

    def choose(self, policy: str) -> None:
        """Raises ServerError in the server's words."""
        ...

    def state(self) -> dict[str, Any]:
        """One entry of /server_info's internal_states. Raises ServerError."""
        ...

    def bench(self, load: TraceLoad, limit_s: float) -> dict[str, Any]:
        """bench_serving's result with the details of each request, from an empty cache. Raises
        LoadError."""
        ...

    def timeline(self, seconds: float) -> dict[str, Any]:
        """What the lanes did in the last seconds; of very many launches the newest."""
        ...

    def last_words(self) -> str: ...


class Host(Protocol):
    """The machine under server and client: see HostWatch."""

    def take(self) -> Pauses | None: ...


class ServedModel:
    """The Target behind ServerProcess: a server that is ready when the constructor returns."""

    def __init__(self, model: Path, flags: Sequence[str]) -> None:
        self._ordinary_ids = vocab_size(model)
        self._process = ServerProcess(model, flags)
        try:
            self.ready_s = asyncio.run(self._process.wait_ready(START_LIMIT_S, lambda: None))
        except BaseException:
            print(self.last_words())
            self._process.kill()
            raise

    @property
    def running(self) -> bool:
        return self._process.running

    @property
    def base_url(self) -> str:
        return self._process.base_url

    def choose(self, policy: str) -> None:
        call(self.base_url, "/pd_multiplex/policy", {"policy": policy})

    def state(self) -> dict[str, Any]:
        return internal_state(self.base_url)

    def bench(self, load: TraceLoad, limit_s: float) -> dict[str, Any]:
        flags = [*client_flags(self.base_url, self._ordinary_ids), *load.bench_flags()]
        flags += ["--flush-cache", f"--extra-request-body={json.dumps({'slo': load.slo})}"]
        flags += ["--output-details"]
        return run_bench(flags, limit_s, quiet=True)

    def timeline(self, seconds: float) -> dict[str, Any]:
        found: dict[str, Any] = call(self.base_url, f"/pd_multiplex/timeline?seconds={seconds:.0f}")
        return found

    def last_words(self) -> str:
        return self._process.log_tail()

    def stop(self) -> None:
        """Raises ServerError unless it leaves in good order."""
        self._process.stop(STOP_LIMIT_S)

    def kill(self) -> None:
        self._process.kill()


def server_flags(model: Path, given: Sequence[str]) -> list[str]:
    return [*model_flags(model), "--enable-pd-multiplex", *given]


class Run:
    """Windows in order; a server that has died is replaced, and the rows say so.

    start: a new server. clock: seconds, for the budget. origin: what every row says. host: asked
    how it did in each window. folder: for traces that are made. timelines: folder for what the
    lanes did in each window.
    """

    def __init__(
        self,
        comparison: Comparison,
        start: Callable[[], Target],
        folder: Path,
        origin: Row,
        host: Host,
        *,
        timelines: Path | None = None,
        budget_s: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._comparison = comparison
        self._start = start
        self._folder = folder
        self._origin = origin
        self._host = host
        self._timelines = timelines
        self._budget_s = budget_s
        self._clock = clock
        self._servers = 0

    def rows(self, target: Target) -> Iterator[Row]:
        """The rows of each window of each point that fits in the budget, those that failed too.

        Raises ServerError if a server that died cannot be replaced.
        """
        points = self._comparison.points
        if self._budget_s is not None:
            points = points[: self._comparison.fitting(self._budget_s)]
        began_s = self._clock()
        self._servers = 1
        for number, point in enumerate(points):
            spent_s = self._clock() - began_s
            if self._budget_s is not None and number and self._is_over(spent_s):
                print("Behind the plan, the budget ends here.", *dropped_lines(points[number:]))
                return
            for place, window in enumerate(self._comparison.order(point)):
                if not target.running:
                    target = self._start()
                    self._servers += 1
                for row in self._rows(target, point, window):
                    yield row | {"place_in_point": place}

    def _is_over(self, spent_s: float) -> bool:
        assert self._budget_s is not None
        return self._comparison.fitting(self._budget_s - spent_s, started=True) == 0

    def _rows(self, target: Target, point: Point, window: Window) -> list[Row]:
        comparison = self._comparison
        about: Row = {
            "benchmark": "policies",
            "policy": window.policy,
            "workload": str(point.workload),
            "rate": point.rate,
            "slo_ttft_ms": comparison.ttft_ms,
            "slo_ttft_ms_per_token": comparison.ttft_ms_per_token,
            "seconds": comparison.seconds,
            "warm_up_seconds": comparison.warm_up_seconds,
            "drain_seconds": comparison.drain_seconds,
            "max_input_len": comparison.max_input_len,
            "seed": comparison.seed,
            "server": self._servers,
            "ready_s": target.ready_s,
            "started_at": datetime.now(UTC).isoformat(timespec="seconds"),
            **self._origin,
        }
        try:
            by_tbt = self._measure(target, point, window)
        except (ServerError, LoadError, LookupError, OSError) as error:
            words = "" if target.running else f"; the server had left: {target.last_words()}"
            failure = {"error": f"{type(error).__name__}: {error}{words}"}
            by_tbt = dict.fromkeys(window.tbts_ms, failure)
        return [about | {"slo_tbt_ms": tbt_ms} | row for tbt_ms, row in by_tbt.items()]

    def _measure(self, target: Target, point: Point, window: Window) -> dict[float, Row]:
        """By the TBT that it is judged by."""
        comparison, asked_ms = self._comparison, window.tbts_ms[0]
        target.choose(window.policy)
        warm_up = comparison.warm_up(point, asked_ms, self._folder)
        if warm_up is not None:
            target.bench(warm_up, warm_up.seconds + comparison.drain_seconds)
        load = comparison.load(point, asked_ms, self._folder)
        before = target.state()
        self._host.take()
        result = target.bench(load, load.seconds + comparison.drain_seconds)
        pauses = self._host.take()
        seen = measured(load, result, before, target.state())
        timeline = target.timeline(result["duration"])
        seen["sm_clock_mhz"] = clock_mhz(timeline)
        seen["noticed_late_ms"] = noticed_late_ms(timeline)
        seen["host_pauses"] = None if pauses is None else pauses.to_json()
        if self._timelines is not None:
            seen["timeline"] = self._keep_timeline(timeline, result, f"{window} {point}")
        return {
            tbt_ms: seen | judged(dataclasses.replace(load, tbt_ms=tbt_ms), result)
            for tbt_ms in window.tbts_ms
        }

    def _keep_timeline(self, timeline: dict[str, Any], result: dict[str, Any], name: str) -> str:
        """The name of its file."""
        assert self._timelines is not None
        timeline["client"] = {key: result[key] for key in CLIENT_DETAILS if key in result}
        path = self._timelines / (re.sub(r"[^\w.]+", "-", name) + ".json")
        path.write_text(json.dumps(timeline), encoding="utf-8")
        return path.name


def clock_mhz(timeline: dict[str, Any]) -> float | None:
    """The median of a timeline's SM clocks; None if the server knew none."""
    known = [mhz for sample in timeline["samples"] if (mhz := sample["sm_clock_mhz"]) is not None]
    return statistics.median(known) if known else None


def noticed_late_ms(timeline: dict[str, Any]) -> dict[str, float] | None:
    """How long launches were over before the server noticed; None without any.

    Far beyond a launch's own time it says that something held up the server's loop: host_pauses
    in the same row tell whether that was the machine.
    """
    late = [run["unnoticed_ms"] for run in timeline["runs"] if run["unnoticed_ms"] is not None]
    if not late:
        return None
    p50, p99, longest = np.percentile(late, [50, 99, 100]).tolist()
    return {"p50": p50, "p99": p99, "longest": longest}


def judged(load: TraceLoad, result: dict[str, Any]) -> Row:
    """Who met the load's limits, from the details of each request in a result of bench_serving.

    Requests that had not ended when the client was stopped count as misses, like failed ones.
    """
    limits = Objectives(ttft_ms=load.ttft_ms, ttft_per_token_ms=load.ttft_ms_per_token)
    in_time: list[bool] = []
    smooth: list[bool] = []
    for prompt, cached, ttft_s, gap_p99_ms, error in zip(
        *(result[name] for name in JUDGED_DETAILS), strict=True
    ):
        deadline_ms = limits.ttft_deadline_ms(max(0, prompt - (cached or 0)))
        assert deadline_ms is not None, "the load has limits of the TTFT"
        in_time.append(not error and ttft_s * 1e3 <= deadline_ms)
        smooth.append(not error and gap_p99_ms <= load.tbt_ms)
    good = sum(map(operator.and_, in_time, smooth))
    sent = _sent(load, result)
    return {
        "attainment": _ratio(good, sent),
        "attainment_ttft": _ratio(sum(in_time), sent),
        "attainment_tbt": _ratio(sum(smooth), sent),
        "goodput": good / result["duration"],
    }


def measured(
    load: TraceLoad, result: dict[str, Any], before: dict[str, Any], after: dict[str, Any]
) -> Row:
    """What a window's row says, whatever it is judged by.

    result: of bench_serving. prefill_tokens_per_s: computed ones, without those from the cache.
    engine_waited_share: of the time, that others had the processor which the engine thread wanted;
    above a percent or so the window says more of the host than of the policy. driver_allocations:
    how often memory was asked for meanwhile; each time may have held up a step.
    """
    sent = _sent(load, result)
    lanes = LaneUse.between(before["pd_multiplex"], after["pd_multiplex"])
    cache = result["cache_report"] or {"total_cached_tokens": 0, "total_prompt_tokens": 0}
    computed = cache["total_prompt_tokens"] - cache["total_cached_tokens"]
    duration_s = result["duration"]
    row = {
        "requests": sent,
        "completed": result["completed"],
        "failed": result["failed"],
        "unfinished": sent - result["completed"] - result["failed"],
        "duration_s": duration_s,
        "ttft_p50_ms": result["median_ttft_ms"],
        "ttft_p99_ms": result["p99_ttft_ms"],
        "tbt_p50_ms": result["median_itl_ms"],
        "tbt_p99_ms": result["p99_itl_ms"],
        "client_lag_ms": result["client_max_start_lag_ms"],
        "prefill_tokens_per_s": computed / duration_s,
        "output_tokens_per_s": result["output_throughput"],
        "cached_share": _ratio(cache["total_cached_tokens"], cache["total_prompt_tokens"]),
        "prefill_busy_share": lanes.prefill_busy_s / duration_s,
        "decode_busy_share": lanes.decode_busy_s / duration_s,
        "both_busy_share": lanes.both_busy_s / duration_s,
        "fused_share": lanes.fused_busy_s / duration_s,
        "launches": lanes.launches,
        "counts": lanes.counts,
    }
    row["host_allowance_ms"] = after["pd_multiplex"]["host_allowance_s"] * 1e3
    threads = before["engine_thread"], after["engine_thread"]
    row["engine_cpu_share"] = (threads[1]["cpu_s"] - threads[0]["cpu_s"]) / duration_s
    if threads[0]["waited_s"] is not None:
        row["engine_waited_share"] = (threads[1]["waited_s"] - threads[0]["waited_s"]) / duration_s
    if (taken := after["driver_allocations"]) is not None:
        known = before["driver_allocations"]
        row["driver_allocations"] = {kind: taken[kind] - known[kind] for kind in taken}
    if "slo" in after:
        counted = {"before": before.get("slo"), "after": after["slo"]}
        row["server_slo"] = {"tbt_ms": load.tbt_ms, **counted}
    if result["completed"] == 0:
        row["error"] = "no request completed"
    return row


def _sent(load: TraceLoad, result: dict[str, Any]) -> int:
    ended: int = result["completed"] + result["failed"]
    return load.requests if result["interrupted"] else ended


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else 0.0
