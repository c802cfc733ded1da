"""What a decision of the adaptive dispatcher costs the engine thread.

    python -m benchmark.dispatch_time --profile PROFILE.json --out FILE

PROFILE is of `python -m sglang.profile_drift`; of any machine, for only the dispatcher's own time
counts. For each queue length, four situations in turn: prompts wait beside decode, a batch runs
beside decode and could be pre-empted, the same with slices enough in flight, decode alone. Where
admit lets a batch in, dispatch is asked with that batch, as in a turn of the server; what makes
the batch is not counted. The garbage collector does not run meanwhile, as in the server.

One JSON line a queue length: microseconds of admit and dispatch together, p50, p99 and largest.
"""

from __future__ import annotations

import itertools
import math
import random
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmark.command_line import command_line
from benchmark.serve_trace import append
from drift_scheduler.backlog import Backlog, Prompt
from drift_scheduler.dispatcher import Admission
from drift_scheduler.latencies import Latencies
from drift_scheduler.partition import Partition, PartitionTable
from drift_scheduler.policies.adaptive import Adaptive
from drift_scheduler.profile import Profile
from drift_scheduler.shapes import DecodeShape, PrefillShape
from drift_scheduler.view import LoadView, PrefillView
from sglang.srt.benchmarks.environment import describe
from sglang.srt.managers.cycle_collector import undisturbed

LAYERS = 32
RUNNING = 256
TBT_S = 0.05
SETTLED = 200  # decisions before the first that counts


def table_of(profile: Profile) -> PartitionTable:
    """The partitions that were measured."""
    shares = sorted(
        {
            (sample.partition.decode_sms, sample.partition.prefill_sms)
            for sample in profile.samples
            if not sample.partition.exclusive
        }
    )
    splits = (Partition(i + 1, prefill, decode) for i, (decode, prefill) in enumerate(shares))
    return PartitionTable(profile.key.sms, tuple(splits))


def views(waiting: int, now_s: float, draw: random.Random) -> Iterator[LoadView]:
    """The four situations, over and over, their numbers a little different each time."""
    backlog = Backlog()
    for index in range(waiting):
        new = draw.randint(50, 12_000)
        arrival_s = now_s - draw.uniform(0, 20)
        due_s = arrival_s + max(1.0, 5e-4 * new) + draw.uniform(0, 20)
        backlog.add(Prompt(f"{index:05}", new, draw.randint(0, 8000), arrival_s, due_s))
    for turn in itertools.count():
        context = RUNNING * draw.randint(1000, 3000)
        batch = PrefillShape.of([(draw.randint(500, 4096), draw.randint(0, 16384))])
        prefill = PrefillView(batch, 8, LAYERS, turn % 4, 6e-3, due_s=now_s + 5.0)
        common: dict[str, Any] = {
            "running": RUNNING,
            "decode": DecodeShape(RUNNING, context),
            "decode_step_s": 0.03,
            "tbt_s": TBT_S,
            "backlog": backlog,
            "waiting": waiting,
            "waiting_tokens": backlog.new_tokens,
        }
        yield LoadView(decode_in_flight=0, prefill=None, **common)
        yield LoadView(decode_in_flight=0, prefill=prefill, **common)
        yield LoadView(decode_in_flight=1, decode_ends_s=now_s + 0.02, prefill=prefill, **common)
        yield LoadView(
            decode_in_flight=0, prefill=None, **common | {"waiting": 0, "backlog": Backlog()}
        )


def with_admitted(view: LoadView, admission: Admission) -> LoadView:
    """What dispatch sees of an admission: the batch, none of it launched."""
    left = admission.tokens or 0
    parts: list[tuple[int, int]] = []
    due_s = math.inf
    for prompt in map(view.backlog.__getitem__, admission.order or ()):
        new = min(prompt.new, left)
        if new:
            parts.append((new, prompt.cached))
            due_s = min(due_s, prompt.due_s)
        left -= new
    batch = PrefillView(PrefillShape.of(parts), 0, LAYERS, 0, None, due_s)
    return replace(view, prefill=batch, parked=view.prefill)


def decide_ns(policy: Adaptive, view: LoadView, now_s: float) -> int:
    """A turn's decisions."""
    started_ns = time.perf_counter_ns()
    admission = policy.admit(view, now_s) if view.waiting else None
    took_ns = time.perf_counter_ns() - started_ns
    if admission is not None and admission.order:
        view = with_admitted(view, admission)
    started_ns = time.perf_counter_ns()
    policy.dispatch(view, now_s)
    return took_ns + time.perf_counter_ns() - started_ns


def measure(profile: Profile, waiting: int, decisions: int, seed: int) -> dict[str, float]:
    """Microseconds of a decision."""
    table = table_of(profile)
    policy = Adaptive(table, Latencies.of(profile, LAYERS), LAYERS, max_batch_tokens=8192)
    now_s = 1000.0
    looked_at = itertools.islice(views(waiting, now_s, random.Random(seed)), SETTLED + decisions)
    with undisturbed():  # as a server is
        took_us = [decide_ns(policy, view, now_s) / 1e3 for view in looked_at]
    p50, p99, largest = np.percentile(took_us[SETTLED:], [50, 99, 100]).round(1).tolist()
    return {"p50_us": p50, "p99_us": p99, "largest_us": largest}


def main(argv: Sequence[str] | None = None) -> int:
    parser = command_line("dispatch_time", __doc__)
    parser.add_argument("--profile", type=Path, required=True)
    parser.add_argument("--waiting", type=int, nargs="+", default=[0, 1000, 10_000])
    parser.add_argument("--decisions", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="JSON lines file to append to")
    given = parser.parse_args(argv)
    profile = Profile.from_json(given.profile.read_text(encoding="utf-8"))
    for waiting in given.waiting:
        took = measure(profile, waiting, given.decisions, given.seed)
        row = {
            "benchmark": "dispatch_time",
            "running": RUNNING,
            "waiting": waiting,
            "decisions": given.decisions,
            "seed": given.seed,
            "us": took,
            "environment": describe(),
        }
        append(row, given.out)
        print(
            f"{RUNNING} running, {waiting} waiting: p50 {took['p50_us']:.0f} us, "
            f"p99 {took['p99_us']:.0f} us, largest {took['largest_us']:.0f} us",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
