"""Simulates a cluster that serves a trace: `python -m drift_scheduler.simulate --help`.

The times that work takes come from a profile of a machine; the loop and the policies are the ones
that serve.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from drift_scheduler.estimator import EstimatorError
from drift_scheduler.policies.factory import PolicyFactory
from drift_scheduler.policies.names import NAMES
from drift_scheduler.profile import ProfileError
from drift_scheduler.simulation.cluster import Cluster, ClusterSpec
from drift_scheduler.simulation.engine import EngineLimits
from drift_scheduler.simulation.goodput import GoodputSearch, find_goodput
from drift_scheduler.simulation.machine import Machine, load_machine
from drift_scheduler.simulation.replica import Driver
from drift_scheduler.simulation.results import Summary
from drift_scheduler.simulation.trace import (
    TraceError,
    TraceRequest,
    TraceRow,
    at_own_times,
    at_poisson_times,
    read_trace,
)
from drift_scheduler.slo import Slo


def main(argv: Sequence[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(argv)
    try:
        study = _study(options)
        requests = study.requests(options.rate) if options.find_goodput is None else []
    except (TraceError, ProfileError, EstimatorError, ValueError) as error:
        parser.error(str(error))
    started_s = time.perf_counter()
    result: dict[str, Any] = {"options": _plain(vars(options))}
    if options.find_goodput is None:
        summary = study.run(requests)
    else:
        search, summary = study.search(options.find_goodput, options.rate or options.gpus)
        print(_search_lines(search, options.find_goodput))
        result["search"] = dataclasses.asdict(search)
    wall_s = time.perf_counter() - started_s
    print(_table(options.policy, summary))
    print(f"simulated {study.simulated / wall_s:.0f} requests/s in {wall_s:.1f} s")
    if options.json is not None:
        result |= {"summary": _plain(dataclasses.asdict(summary)), "wall_s": wall_s}
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(result, file, indent=1)
            file.write("\n")
    return 0


@dataclass(slots=True)
class _Study:
    """One trace, machine and policy, at any rate. simulated: requests so far."""

    options: argparse.Namespace
    rows: list[TraceRow]
    machine: Machine
    spec: ClusterSpec
    policies: PolicyFactory
    slo: Slo
    simulated: int = 0

    def requests(self, rate_per_s: float | None) -> list[TraceRequest]:
        seconds, speed, seed = self.options.seconds, self.options.speed, self.options.seed
        if rate_per_s is None:
            return at_own_times(self.rows, speed, seconds)
        return at_poisson_times(self.rows, rate_per_s, seconds, seed)

    def run(self, requests: Sequence[TraceRequest]) -> Summary:
        self.simulated += len(requests)
        return Cluster(self.spec, self.driver).run(requests, self.slo)

    def driver(self) -> Driver:
        """As a server: its policy learns from what it sees, whatever the policy."""
        latencies = self.machine.learner()
        policies = dataclasses.replace(self.policies, model=latencies)
        return Driver(policies.make(self.options.policy), latencies.observe)

    def search(self, target: float, first_rate_per_s: float) -> tuple[GoodputSearch, Summary]:
        """The summary is that of the rate found, or of the lowest one tried."""
        summaries: dict[float, Summary] = {}

        def attainment_at(rate_per_s: float) -> float:
            summaries[rate_per_s] = self.run(self.requests(rate_per_s))
            return summaries[rate_per_s].attainment

        search = find_goodput(attainment_at, target, first_rate_per_s)
        return search, summaries[search.rate_per_s or min(summaries)]


def _study(options: argparse.Namespace) -> _Study:
    """Raises an error that says which option cannot be used, before anything is simulated."""
    if options.rate is not None and options.seconds is None:
        raise ValueError("--rate needs --seconds: for how long requests arrive")
    if options.find_goodput is not None and options.seconds is None:
        raise ValueError("--find-goodput needs --seconds: for how long requests arrive")
    if options.find_goodput is not None and options.speed != 1.0:
        raise ValueError("--find-goodput sets the rate itself: leave --speed away")
    if options.rate is not None and options.speed != 1.0:
        raise ValueError("--speed is for the trace's own times: leave it or --rate away")
    rows = read_trace(options.trace, options.max_input_len)
    machine = load_machine(options.profile, options.num_layers)
    policies = _policies(options, machine)
    policies.make(options.policy)
    return _Study(
        options,
        rows,
        machine,
        ClusterSpec(
            replicas=options.gpus,
            table=machine.table,
            model=machine.model,
            num_layers=machine.num_layers,
            limits=EngineLimits(
                kv_tokens=options.kv_tokens,
                max_running=options.max_running,
                prefill_tokens=options.prefill_tokens,
                launch_s=options.launch_us / 1e6,
                batch_launch_s=options.batch_launch_us / 1e6,
                layer_launch_s=options.layer_launch_us / 1e6,
                graph_tokens=machine.graph_tokens,
            ),
            route_slack_tokens=options.route_slack_tokens,
            noise_sigma=options.noise,
            head_s=options.head_us / 1e6,
            seed=options.seed,
        ),
        policies,
        Slo(
            ttft_s=options.slo_ttft_ms / 1e3,
            ttft_per_token_s=options.slo_ttft_ms_per_token / 1e3,
            tbt_s=options.slo_tbt_ms / 1e3,
        ),
    )


def _policies(options: argparse.Namespace, machine: Machine) -> PolicyFactory:
    return PolicyFactory(
        machine.table,
        machine.model,
        machine.num_layers,
        options.prefill_tokens,
        max_step_tokens=machine.max_step_tokens,
        sheds=options.slo_overload == "shed",
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m drift_scheduler.simulate",
        description="Simulates GPUs that serve a trace, with the times of a measured machine.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    load = parser.add_argument_group("load")
    load.add_argument("--trace", required=True, help="JSONL in Mooncake's format, .gz or not")
    load.add_argument("--max-input-len", type=_count, help="leave longer prompts out")
    load.add_argument("--rate", type=_positive, help="Poisson arrivals, requests/s for all GPUs")
    load.add_argument("--speed", type=_positive, default=1.0, help="of the trace's own times")
    load.add_argument("--seconds", type=_positive, help="for how long requests arrive")
    load.add_argument("--seed", type=_zero_or_more, default=0, help="of arrivals and noise")
    machine = parser.add_argument_group("machine")
    machine.add_argument("--profile", required=True, help="JSON that profile_drift has written")
    machine.add_argument("--num-layers", type=_count, help="of the model, if not in the profile")
    machine.add_argument("--gpus", type=_count, default=1, help="replicas, one GPU each")
    machine.add_argument("--kv-tokens", type=_count, default=420_000, help="of one KV pool")
    machine.add_argument("--max-running", type=_count, default=256, help="requests of one GPU")
    machine.add_argument("--prefill-tokens", type=_count, default=8192, help="of a prefill batch")
    machine.add_argument("--launch-us", type=_not_negative, default=0.0, help="host, a launch")
    machine.add_argument(
        "--batch-launch-us",
        type=_not_negative,
        default=0.0,
        help="host, more before a prefill batch that is no graph",
    )
    machine.add_argument(
        "--layer-launch-us",
        type=_not_negative,
        default=0.0,
        help="host, each layer that is launched kernel by kernel",
    )
    machine.add_argument(
        "--head-us",
        type=_not_negative,
        default=0.0,
        help="of a prefill batch's time, what comes behind its last layer",
    )
    machine.add_argument(
        "--noise",
        type=_not_negative,
        default=0.0,
        help="sigma of the logarithm of the times that launches take; of decode steps alone a "
        "small part of it",
    )
    machine.add_argument(
        "--route-slack-tokens",
        type=_zero_or_more,
        default=16384,
        help="prompt tokens that a GPU may have to fill more than another and still get a "
        "request whose prefix it has cached",
    )
    goal = parser.add_argument_group("policy and goal")
    goal.add_argument("--policy", default="adaptive", help=", ".join(NAMES))
    goal.add_argument("--slo-ttft-ms", type=_positive, default=math.inf, help="first token")
    goal.add_argument(
        "--slo-ttft-ms-per-token",
        type=_not_negative,
        default=0.0,
        help="first token, for each uncached prompt token, where that is longer",
    )
    goal.add_argument(
        "--slo-tbt-ms", type=_positive, default=math.inf, help="a request's P99 token gap"
    )
    goal.add_argument("--slo-overload", choices=("queue", "shed"), default="queue", help="late")
    goal.add_argument(
        "--find-goodput",
        type=_share,
        metavar="ATTAINMENT",
        help="search the highest Poisson rate that so large a share of requests survives, "
        "beginning with --rate or 1 a GPU",
    )
    parser.add_argument("--json", metavar="OUT", help="write the results to this file too")
    return parser


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return value


def _zero_or_more(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative")
    return value


def _positive(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return value


def _not_negative(text: str) -> float:
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a finite number of at least 0")
    return value


def _share(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and at most 1")
    return value


def _table(policy: str, summary: Summary) -> str:
    rows = {
        "policy": policy,
        "GPUs": f"{summary.replicas}",
        "requests": f"{summary.offered} in {summary.duration_s:.1f} s, "
        f"{summary.shed} shed, {summary.refused} too long",
        "attainment": f"{summary.attainment:.1%} "
        f"(first token {summary.met_ttft:.1%}, gaps {summary.met_tbt:.1%})",
        "goodput": f"{summary.goodput_rps:.3f} requests/s",
        "TTFT p50 / p99": f"{summary.ttft_p50_ms:.1f} / {summary.ttft_p99_ms:.1f} ms",
        "TBT p50 / p99": f"{summary.tbt_p50_ms:.2f} / {summary.tbt_p99_ms:.2f} ms",
        "prompt tokens cached": f"{summary.cached_share:.1%}",
        "lanes busy": f"prefill {summary.prefill_busy:.1%}, decode {summary.decode_busy:.1%} "
        f"(fused {summary.fused_busy:.1%}), both {summary.both_busy:.1%}",
        "pre-emptions": f"{summary.preemptions}",
        "retractions": f"{summary.retractions}",
    }
    width = max(map(len, rows))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows.items())


def _search_lines(search: GoodputSearch, target: float) -> str:
    lines = [f"{'requests/s':>10}  attainment"]
    lines += [f"{probe.rate_per_s:10.3f}  {probe.attainment:.1%}" for probe in search.probes]
    if search.unbounded:
        lines.append(f"every rate tried meets {target:.0%}")
    elif search.rate_per_s:
        lines.append(f"goodput at {target:.0%}: {search.rate_per_s:.3f} requests/s")
    else:
        lines.append(f"no rate tried meets {target:.0%}")
    return "\n".join(lines)


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """JSON knows no infinity, which asks for nothing, and no NaN."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in values.items()
    }


if __name__ == "__main__":
    sys.exit(main())
