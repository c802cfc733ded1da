"""Matrix products of Llama-3.1-8B's layers on lanes: torch, Triton tiles and DeepGEMM.

`python -m benchmark.matmul_lanes --out FILE [--sms 116,100,84,68,32,16] [--m 128,2048,4096]`.
Every lane is a real one, its SMs held by a green context. Each kernel runs in a CUDA graph, over
random weights in turn so that the last-level cache holds none of them, and its result is compared
with torch's. One JSON line a case; a table last. --sweep takes all tiles and prints each.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from benchmark.command_line import command_line
from drift_scheduler.lane import Lane, Phase
from drift_scheduler.lane_cuda import CudaLanes
from sglang.srt.benchmarks.environment import describe
from sglang.srt.benchmarks.one_batch.floors import Rates
from sglang.srt.benchmarks.one_batch.machine import MachineProbe, ProbeSizes
from sglang.srt.benchmarks.one_batch.report import Row, limits_line, open_results
from sglang.srt.layers.activation import silu_and_mul
from sglang.srt.layers.matmul.choice import Backend, Choice, product_of, supports
from sglang.srt.layers.matmul.tiles import tiles_for
from sglang.srt.layers.matmul.timing import LIMIT_S, median_s
from sglang.srt.profiling.nvml import GpuWatch, watch_device

SHAPES = {  # (k, n) of Llama-3.1-8B
    "qkv": (4096, 6144),
    "o": (4096, 4096),
    "gate_up": (4096, 28672),
    "down": (14336, 4096),
}
FUSED = "gate_up"
DEFAULT_M = (128, 2048, 4096)
# Without --m, smaller lanes are measured as decode lanes: with the first of DEFAULT_M.
PREFILL_SMS = 64
COLD_BYTES = 120 << 20  # twice an H100's L2, and some
TARGET_REPLAY_S = 3e-3
WATCH_INTERVAL_S = 0.02  # a candidate takes some 20 to 50 ms
REPLAYS = 5
HOST_CALLS = 20
MAX_ERROR = 1e-2
Run = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (x, weight) -> result

PROBE = ProbeSizes(copy_bytes=256 << 20, copy_buffers=2, matrix_side=8192, repetitions=10)


@dataclass(frozen=True, slots=True)
class Case:
    """A product of m tokens with a layer's weight on a lane; fused: with silu(gate) * up."""

    layer: str
    m: int
    lane: Lane
    fused: bool

    @property
    def k(self) -> int:
        return SHAPES[self.layer][0]

    @property
    def n(self) -> int:
        return SHAPES[self.layer][1]

    @property
    def flops(self) -> float:
        return 2.0 * self.m * self.n * self.k

    @property
    def bytes(self) -> float:
        """Least traffic: every operand and the result once."""
        out = self.n // 2 if self.fused else self.n
        return 2.0 * (self.m * self.k + self.n * self.k + self.m * out)

    def floor_s(self, lane: Rates, whole: Rates, total_sms: int) -> float:
        """The lane's share of the whole device's arithmetic, or its own bandwidth."""
        matrix_flops = whole.matrix_flops * self.lane.sms / total_sms
        return max(self.flops / matrix_flops, self.bytes / lane.copy_bytes)

    def __str__(self) -> str:
        return f"{self.layer}{' fused' if self.fused else ''} m{self.m} n{self.n} k{self.k}"


class Operands:
    """Random activations, and as many weights of a layer as no cache holds."""

    def __init__(self, layer: str, max_m: int, device: torch.device) -> None:
        k, n = SHAPES[layer]
        generator = torch.Generator(device).manual_seed(0)
        count = max(2, -(-COLD_BYTES // (2 * n * k)))
        weights = torch.randn((count, n, k), generator=generator, device=device)
        self.weights = (weights / k**0.5).to(torch.bfloat16)
        self.x = torch.randn((max_m, k), generator=generator, device=device).to(torch.bfloat16)


class Bench:
    """Measures candidates on one device's lanes. watch: None if not known."""

    def __init__(
        self, device: torch.device, sweep: bool, max_m: int, watch: GpuWatch | None
    ) -> None:
        self._device = device
        self._sweep = sweep
        self._watch = watch
        self._operands = {layer: Operands(layer, max_m, device) for layer in SHAPES}

    def rows(self, lane: Lane, m: int, floor: Callable[[Case], float]) -> Iterator[Row]:
        """A row for every layer and candidate, of `m` tokens on the lane."""
        for layer in SHAPES:
            case = Case(layer, m, lane, fused=False)
            plain = list(self._rows(case, self._plain_runs(case), floor(case)))
            yield from plain
            if layer == FUSED:
                best = min((row for row in plain if "ms" in row), key=lambda row: row["ms"])
                case = Case(layer, m, lane, fused=True)
                yield from self._rows(case, self._fused_runs(case, best["choice"]), floor(case))

    def _plain_runs(self, case: Case) -> Iterator[tuple[str, Choice, Run]]:
        for choice in (Choice(Backend.TORCH), Choice(Backend.DEEP_GEMM), *self._tiles(case)):
            if supports(choice.backend, torch.bfloat16, self._device):
                yield str(choice), choice, plain_run(choice, case.lane.sms)

    def _fused_runs(self, case: Case, best: Choice) -> Iterator[tuple[str, Choice, Run]]:
        for choice in dict.fromkeys((Choice(Backend.TORCH), best)):
            yield f"{choice} + silu", choice, then_silu(plain_run(choice, case.lane.sms))
        for choice in self._tiles(case):
            yield str(choice), choice, fused_run(choice, case.lane.sms)

    def _tiles(self, case: Case) -> Iterator[Choice]:
        if not supports(Backend.TRITON, torch.bfloat16, self._device):
            return
        sms = case.lane.sms
        for tile in tiles_for(case.m, case.n, case.k, sms, fused=case.fused, rare=self._sweep):
            yield Choice(Backend.TRITON, tile)

    def _rows(
        self, case: Case, runs: Iterator[tuple[str, Choice, Run]], floor_s: float
    ) -> Iterator[Row]:
        operands = self._operands[case.layer]
        for name, choice, run in runs:
            row: Row = {
                "case": str(case),
                "sms": case.lane.sms,
                "candidate": name,
                "choice": choice,
                "floor_ms": floor_s * 1e3,
            }
            started_s = time.monotonic()
            row |= measure(case, operands, run, floor_s)
            if self._watch and (state := self._watch.typical(started_s)):
                row |= state.to_json()
            if "ms" in row:
                row["ratio"] = row["ms"] / row["floor_ms"]
                row["tflops"] = case.flops / row["ms"] / 1e9
            yield row


def plain_run(choice: Choice, num_sms: int) -> Run:
    product = product_of(choice, num_sms)

    def run(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        out = x.new_empty((x.shape[0], weight.shape[0]))
        product(x, weight, out)
        return out

    return run


def fused_run(choice: Choice, num_sms: int) -> Run:
    product = product_of(choice, num_sms, fused=True)

    def run(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        out = x.new_empty((x.shape[0], weight.shape[0] // 2))
        product(x, weight, out)
        return out

    return run


def then_silu(run: Run) -> Run:
    return lambda x, weight: silu_and_mul(run(x, weight))


def measure(case: Case, operands: Operands, run: Run, floor_s: float) -> Row:
    """Keys ms, host_us and error; or failure alone."""
    x = operands.x[: case.m]
    results: list[torch.Tensor] = []

    def once() -> None:
        # Memory of an earlier result would hide what is not written.
        torch.full_like(expected, math.nan)
        results[:] = [run(x, operands.weights[0])]

    def reference() -> None:
        results[:] = [x @ operands.weights[0].t()]

    case.lane.launch(reference).wait(LIMIT_S)
    expected = silu_and_mul(results[0]) if case.fused else results[0]
    try:
        case.lane.launch(once).wait(LIMIT_S)
    # Whatever one kernel's compiler or launch says, the others are still worth measuring.
    except Exception as failure:
        return {"failure": f"{type(failure).__name__}: {str(failure)[-200:]}"}
    error = float((results[0].float() - expected.float()).norm() / expected.float().norm())
    if not error < MAX_ERROR:
        return {"failure": f"relative error {error:.2g}"}
    count = min(50, max(4, int(TARGET_REPLAY_S / floor_s)))
    weights = [operands.weights[i % len(operands.weights)] for i in range(count)]
    calls = [functools.partial(run, x, weight) for weight in weights]
    return {
        "ms": median_s(case.lane, calls, REPLAYS) * 1e3,
        "host_us": host_us(case.lane, calls[0]),
        "error": error,
    }


def host_us(lane: Lane, call: Callable[[], object]) -> float:
    """Microseconds of the launching thread a call."""
    spent_s: list[float] = []

    def work() -> None:
        started_s = time.perf_counter()
        for _ in range(HOST_CALLS):
            call()
        spent_s.append(time.perf_counter() - started_s)

    lane.launch(work).wait(LIMIT_S)
    return spent_s[0] / HOST_CALLS * 1e6


def lanes_of(lanes: CudaLanes, wanted: Sequence[int]) -> list[Lane]:
    """The lane of each SM count, or of the next larger one that was granted."""
    table = lanes.table
    every = [lanes.lane(phase, table[index]) for index in range(len(table)) for phase in Phase]
    found = [
        min((lane for lane in every if lane.sms >= sms), key=lambda lane: lane.sms)
        for sms in wanted
    ]
    return list(dict.fromkeys(found))


def table(rows: Sequence[Row], every: bool) -> str:
    """A line a case and lane: torch, DeepGEMM, and the best tile beside the floor. `every`: a line
    a candidate."""
    lines = []
    for (sms, case), group in itertools.groupby(rows, key=lambda row: (row["sms"], row["case"])):
        measured = sorted(group, key=lambda row: float(row.get("ms", math.inf)))
        lines.append(f"{sms} SMs, {case}: floor {measured[0]['floor_ms']:.4f} ms")
        tiles = [row for row in measured if row["candidate"] == str(row["choice"])]
        tiles = [row for row in tiles if row["choice"].backend is Backend.TRITON]
        hidden = [] if every else [row for row in tiles[1:] if "ms" in row]
        shown = [row for row in measured if row not in hidden]
        lines += [_line(row) for row in shown]
    return "\n".join(lines)


def _line(row: Row) -> str:
    if "failure" in row:
        return f"  failed: {row['candidate']}: {row['failure']}"
    clock = f"{row['sm_clock_mhz']:5.0f} MHz  " if "sm_clock_mhz" in row else ""
    return (
        f"  {row['ms']:9.4f} ms  x{row['ratio']:.2f}  {row['tflops']:5.0f} TFLOP/s "
        f" host {row['host_us']:4.0f} us  {clock}{row['candidate']}"
    )


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command_line("matmul_lanes", __doc__)
    parser.add_argument("--out", type=Path, required=True, help="JSON lines are appended here")
    parser.add_argument("--sms", type=counts, default=(116, 100, 84, 68, 32, 16))
    parser.add_argument(
        "--m",
        type=counts,
        default=None,
        help="tokens, on every lane; default: 128 on lanes of less than 64 SMs, else 2048,4096",
    )
    parser.add_argument("--sweep", action="store_true", help="all tiles, and a line for each")
    return parser.parse_args(argv)


def counts(text: str) -> tuple[int, ...]:
    numbers = tuple(int(word) for word in text.split(","))
    if min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be positive")
    return numbers


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    if not torch.cuda.is_available():
        raise SystemExit("matmul_lanes needs a CUDA GPU")
    device = torch.device("cuda", 0)
    total_sms = torch.cuda.get_device_properties(device).multi_processor_count
    if max(args.sms) > total_sms:
        raise SystemExit(f"--sms {max(args.sms)}: the device has {total_sms}")
    shares = sorted({min(sms, total_sms - sms) for sms in args.sms if sms < total_sms})
    lanes = CudaLanes(device, decode_shares=shares)
    environment = describe() | {"flags": sys.argv[1:] if argv is None else list(argv)}
    probe = MachineProbe(device, torch.bfloat16, PROBE)
    whole = probe.measure(lanes.lane(Phase.PREFILL, lanes.table.whole))
    work = []
    for lane in lanes_of(lanes, args.sms):
        rates = probe.measure(lane)
        default = DEFAULT_M[1:] if lane.sms >= PREFILL_SMS else DEFAULT_M[:1]
        work += [(lane, rates, m) for m in args.m or default]
    del probe
    rows: list[Row] = []
    with (
        watch_device(device, interval_s=WATCH_INTERVAL_S) or contextlib.nullcontext() as watch,
        open_results(args.out) as append,
        tqdm(work, unit="lane and m") as bar,
    ):
        bench = Bench(device, args.sweep, max(m for _, _, m in work), watch)
        for lane, rates, m in bar:
            bar.set_description(f"{lane.sms} SMs, {m} tokens")

            def floor_s(case: Case, lane_rates: Rates = rates) -> float:
                return case.floor_s(lane_rates, whole, total_sms)

            for row in bench.rows(lane, m, floor_s):
                rows.append(row)
                append({**row, "benchmark": "matmul_lanes", "environment": environment})
    print(table(rows, args.sweep))
    if line := limits_line(rows):
        print(line)
    lanes.close()


if __name__ == "__main__":
    main()
