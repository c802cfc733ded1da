"""A measured window, simulated: the same requests, policy and limits, on a profiled machine."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmark.policy_plan import Workload
from benchmark.policy_table import Row
from benchmark.simulated_load import BLOCK_TOKENS, comparison_of, requests_of
from benchmark.simulated_times import Seen
from benchmark.trace_load import TraceLoad
from drift_scheduler.host_delay import HostDelay
from drift_scheduler.lane_virtual import VirtualClock, VirtualLanes
from drift_scheduler.latencies import Latencies
from drift_scheduler.policies.factory import PolicyFactory
from drift_scheduler.simulation.cluster import Cluster, ClusterSpec
from drift_scheduler.simulation.engine import EngineLimits
from drift_scheduler.simulation.machine import Machine
from drift_scheduler.simulation.replica import Driver
from drift_scheduler.simulation.results import Summary
from drift_scheduler.slo import Slo
from sglang.bench.errors import BenchError
from sglang.srt.errors import ConfigError
from sglang.srt.model_executor.bring_up import GPU_CHUNK_TOKENS, GPU_MAX_RUNNING, make_policies
from sglang.srt.server_args import ServerArgs

# A measured row's keys, and where the simulator has the same.
_FIGURES = {
    "requests": "offered",
    "completed": "finished",
    "unfinished": "unfinished",
    "duration_s": "duration_s",
    "attainment": "attainment",
    "attainment_ttft": "met_ttft",
    "attainment_tbt": "met_tbt",
    "goodput": "goodput_rps",
    "ttft_p50_ms": "ttft_p50_ms",
    "ttft_p99_ms": "ttft_p99_ms",
    "tbt_p50_ms": "tbt_p50_ms",
    "tbt_p99_ms": "tbt_p99_ms",
    "cached_share": "cached_share",
    "prefill_busy_share": "prefill_busy",
    "decode_busy_share": "decode_busy",
    "both_busy_share": "both_busy",
    "fused_share": "fused_busy",
}
# What tells a measured row from others.
_WINDOW = ("started_at", "seconds", "seed", "model", "server", "server_flags", "environment")


@dataclass(frozen=True, slots=True)
class Host:
    """What a profile does not say. launch_us, batch_launch_us, layer_launch_us: see EngineLimits;
    head_us: see LaunchTimes; noise: see Noise.

    kv_tokens: of the pool, where the server's flags do not say. drain_seconds: after the last
    arrival, when the client stops, where the row does not say.
    """

    launch_us: float
    batch_launch_us: float
    layer_launch_us: float
    head_us: float
    noise: float
    kv_tokens: int
    drain_seconds: float


class WindowSimulator:
    """Simulates rows in the order in which they were measured.

    A server learns how long its launches take, from the warm-ups too, and takes that from window to
    window, whatever their policies; so rows of one server share what was learnt.

    folder: for traces that are made. seen: in the windows of the rows; if left out, launches take
    as long as the machine's profile says and the host never pauses. What a server knows at its
    start is the machine's either way.
    """

    def __init__(
        self,
        machine: Machine,
        host: Host,
        folder: Path,
        seen: Seen | None = None,
    ) -> None:
        self._machine = machine
        self._host = host
        self._folder = folder
        self._seen = seen
        self._learnt: dict[str, Latencies] = {}

    def simulate(self, row: Row, workload: Workload) -> Row:
        """The line for a measured row: what was measured, what was simulated, how they differ.

        Raises BenchError if the row cannot be simulated.
        """
        drain_seconds = row.get("drain_seconds", self._host.drain_seconds)
        host = dataclasses.replace(self._host, drain_seconds=drain_seconds)
        comparison = comparison_of(row, workload, drain_seconds)
        comparison.check()
        (point,), tbt_ms = comparison.points, row["slo_tbt_ms"]
        window = self._window(row, host)
        warm_up = comparison.warm_up(point, tbt_ms, self._folder)
        if warm_up is not None:
            window(warm_up)
        summary = window(comparison.load(point, tbt_ms, self._folder))
        simulated = {key: getattr(summary, name) for key, name in _FIGURES.items()}
        measured = {key: row[key] for key in _FIGURES}
        return {
            "policy": row["policy"],
            "workload": row["workload"],
            "rate": row["rate"],
            "slo_tbt_ms": row["slo_tbt_ms"],
            "window": {key: row.get(key) for key in _WINDOW},
            "measured": measured | server_count(row),
            "simulated": simulated | {"preemptions": summary.preemptions},
            "goodput_error": relative_error(simulated["goodput"], measured["goodput"]),
            "attainment_error": relative_error(simulated["attainment"], measured["attainment"]),
            "host": dataclasses.asdict(host),
            "times": "profile" if self._seen is None else "timelines",
        }

    def _window(self, row: Row, host: Host) -> Callable[[TraceLoad], Summary]:
        """Runs a load under the row's policy, on an empty cache."""
        machine, seen = self._machine, self._seen
        args = _server_args(row)
        self._check_partitions(row)
        prefill_tokens = _prefill_tokens(args)
        latencies = self._latencies(row)
        policies = self._policies(args, latencies, prefill_tokens)
        host_delay = HostDelay()
        spec = ClusterSpec(
            replicas=1,
            table=machine.table,
            model=seen.latencies[row["workload"]] if seen else machine.model,
            num_layers=machine.num_layers,
            limits=EngineLimits(
                kv_tokens=args.max_total_tokens or host.kv_tokens,
                max_running=args.max_running_requests or GPU_MAX_RUNNING,
                prefill_tokens=prefill_tokens,
                launch_s=host.launch_us / 1e6,
                batch_launch_s=host.batch_launch_us / 1e6,
                layer_launch_s=host.layer_launch_us / 1e6,
                graph_tokens=machine.graph_tokens,
                block_tokens=BLOCK_TOKENS,
            ),
            noise_sigma=host.noise,
            head_s=host.head_us / 1e6,
            seed=row["seed"],
            host_pauses=seen.host_pauses[row["timeline"]] if seen else (),
        )
        try:
            policies.make(row["policy"])
        except ValueError as error:
            raise BenchError(f"a row's policy cannot be simulated: {error}") from None

        def run(load: TraceLoad) -> Summary:
            requests = requests_of(load)
            # Poisson arrivals may last longer than their mean; the client waits from its start.
            until_s = max(load.seconds + host.drain_seconds, requests[-1].arrival_s)
            driver = Driver(policies.make(row["policy"]), latencies.observe, host_delay)
            return Cluster(spec, lambda: driver).run(requests, _slo_of(load), until_s)

        return run

    def _latencies(self, row: Row) -> Latencies:
        about = {key: row.get(key) for key in ("model", "server_flags", "environment", "server")}
        server = json.dumps(about, sort_keys=True)
        if server not in self._learnt:
            self._learnt[server] = self._machine.learner()
        return self._learnt[server]

    def _policies(
        self, args: ServerArgs, latencies: Latencies, prefill_tokens: int
    ) -> PolicyFactory:
        machine = self._machine
        lanes = VirtualLanes(machine.table, VirtualClock())
        policies = make_policies(args, lanes, latencies, machine.num_layers, prefill_tokens)
        return dataclasses.replace(policies, max_step_tokens=machine.max_step_tokens)

    def _check_partitions(self, row: Row) -> None:
        profiled = ["whole"]
        profiled += [f"p{s.prefill_sms}/d{s.decode_sms}" for s in self._machine.table.splits]
        if sorted(row["launches"]) != sorted(profiled):
            raise BenchError(
                f"--profile has the partitions {', '.join(profiled)}; the server of a row had "
                f"{', '.join(row['launches'])}"
            )


def relative_error(simulated: float, measured: float) -> float | None:
    """None where nothing was measured."""
    return simulated / measured - 1 if measured else None


def server_count(row: Row) -> dict[str, float]:
    """The shares that met their limits by the server's own count, which ends where the simulator's
    does, before detokenizer and network; empty where it keeps none, and where the requests asked
    for another TBT than the row is judged by.

    The client's one warm-up request is among them.
    """
    slo: dict[str, Any] = row.get("server_slo") or {}
    before, after = slo.get("before"), slo.get("after")
    # Rows of old do not say what was asked: then it was what they are judged by.
    if not before or not after or slo.get("tbt_ms", row["slo_tbt_ms"]) != row["slo_tbt_ms"]:
        return {}
    spent = {key: after[key] - before[key] for key in ("finished", "met", "met_ttft", "met_tbt")}
    if not spent["finished"]:
        return {}
    return {
        f"server_{name}": spent[key] / spent["finished"]
        for name, key in (
            ("attainment", "met"),
            ("attainment_ttft", "met_ttft"),
            ("attainment_tbt", "met_tbt"),
        )
    }


def _server_args(row: Row) -> ServerArgs:
    try:
        return ServerArgs.from_cli(["--model-path", row["model"], *row["server_flags"]])
    except ConfigError as error:
        raise BenchError(f"a row's server_flags: {error}") from error


def _prefill_tokens(args: ServerArgs) -> int:
    """Of a prefill batch of the server on a GPU."""
    chunk = args.chunked_prefill_size
    if chunk == -1:
        return args.max_prefill_tokens
    return min(args.max_prefill_tokens, chunk or GPU_CHUNK_TOKENS)


def _slo_of(load: TraceLoad) -> Slo:
    return Slo(
        ttft_s=load.ttft_ms / 1e3,
        ttft_per_token_s=load.ttft_ms_per_token / 1e3,
        tbt_s=load.tbt_ms / 1e3,
    )
