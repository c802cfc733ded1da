"""Prefill rate beside decode, by decode step time: measured, drawn, and compared with the choice.

    python -m benchmark.frontier --model benchmark/models/llama-3.1-8b \\
        --out benchmark/results/frontier_h100.jsonl --png frontier.png \\
        --baseline benchmark/baselines/plain_pytorch_split_h100.json -- --drift-profile P.json

For each decode batch: the step alone; split, a sliced prefill beside it on every partition of the
table; fused, prompt tokens riding in it, for every size the dispatcher knows; and turns, which
follow from the times of both alone. All on the lanes that serving uses, launched as it does. Then,
for deadlines of several times the step alone, what the dispatcher would choose from its latency
model, and the measured rate of that choice over the best measured one. With --baseline, splits are
compared with another engine's at the same step time. Server flags follow `--`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmark.command_line import command_line
from benchmark.frontier_baseline import Baseline
from benchmark.frontier_ways import Row, Way, judge, turns, way_row
from benchmark.trace_load import model_flags
from drift_scheduler.lane import LaneProvider, Phase
from drift_scheduler.policies.latency_model import LatencyModel
from drift_scheduler.policies.modes import (
    FUSED_STEP_TOKENS,
    MIN_FUSED_TOKENS,
    Mode,
    best_mode,
    gentlest_split,
)
from drift_scheduler.policies.slices import MAX_SLICE_LAYERS
from drift_scheduler.shapes import DecodeShape, PrefillShape
from sglang.srt.benchmarks.completion import rest
from sglang.srt.benchmarks.engine_flags import whole
from sglang.srt.benchmarks.environment import describe
from sglang.srt.benchmarks.one_batch.batches import Placement
from sglang.srt.benchmarks.one_batch.cases import DecodeCase, PrefillCase, pool_tokens
from sglang.srt.benchmarks.one_batch.measure import Bench, Repetitions
from sglang.srt.benchmarks.one_batch.report import open_results
from sglang.srt.errors import ConfigError
from sglang.srt.model_executor.bring_up import Executor, bring_up
from sglang.srt.profiling.meter import riding
from sglang.srt.server_args import ServerArgs

DEFAULT_DECODE = ("8x4096", "14x9000", "32x9000", "64x1024", "128x2048")
DEFAULT_PREFILL = "4096+4096"
DEADLINES = (1.3, 1.6, 2.0, 3.0, 5.0)  # in decode steps alone


@dataclass(frozen=True, slots=True)
class Frontier:
    """All ways for one decode batch. solo_ms: its step alone; prefill_ms: the prefill alone."""

    decode: DecodeCase
    prefill: PrefillCase
    solo_ms: float
    prefill_ms: float
    ways: tuple[Way, ...]

    @property
    def shapes(self) -> tuple[DecodeShape, PrefillShape]:
        """What a latency model is asked about."""
        step, prompt = self.decode, self.prefill
        parts = [(prompt.new_tokens, prompt.cached_tokens)] * prompt.requests
        return DecodeShape(step.requests, step.requests * step.length), PrefillShape.of(parts)


class Surveyor:
    """Measures frontiers; has the lanes for itself."""

    def __init__(
        self, bench: Bench, lanes: LaneProvider, placement: Placement, slice_layers: int
    ) -> None:
        self._bench = bench
        self._lanes = lanes
        self._placement = placement
        self._slice_layers = slice_layers

    def survey(
        self, decode: DecodeCase, prefill: PrefillCase, note: Callable[[str], None]
    ) -> Frontier:
        """note: told of each way before it is measured."""
        note(f"{decode}: alone")
        whole = self._lanes.table.whole
        step = self._bench.decode(
            self._lanes.lane(Phase.DECODE, whole), self._placement.decode(decode)
        )
        prompt = self._bench.prefill(
            self._lanes.lane(Phase.PREFILL, whole),
            self._placement.prefill(prefill),
            self._bench.num_layers,
        )
        new_tokens = prefill.requests * prefill.new_tokens
        ways = [
            *self._splits(decode, prefill, note),
            *self._fusings(decode, prefill, note),
            *turns(step.step, prompt.run, new_tokens, self._bench.num_layers),
        ]
        return Frontier(decode, prefill, step.step.median, prompt.run.median, tuple(ways))

    def _splits(
        self, decode: DecodeCase, prefill: PrefillCase, note: Callable[[str], None]
    ) -> Iterator[Way]:
        for split in self._lanes.table.splits:
            note(f"{decode}: split {split}")
            step, prompt = self._bench.side_by_side(
                self._lanes.lane(Phase.DECODE, split),
                self._placement.decode(decode),
                self._lanes.lane(Phase.PREFILL, split),
                self._placement.prefill(prefill),
                self._slice_layers,
            )
            rate = prefill.requests * prefill.new_tokens * prompt.runs_per_s
            yield Way(Mode.SPLIT, str(split), step.step.median, step.step.largest, rate)

    def _fusings(
        self, decode: DecodeCase, prefill: PrefillCase, note: Callable[[str], None]
    ) -> Iterator[Way]:
        """Each step carries the first tokens of the prompt behind its cached ones."""
        lane = self._lanes.lane(Phase.DECODE, self._lanes.table.whole)
        for tokens in fused_tokens(decode, prefill):
            note(f"{decode}: fused {tokens}")
            chunk = PrefillCase(tokens, prefill.cached_tokens)
            batch = riding(self._placement.decode(decode), self._placement.prefill(chunk))
            step = self._bench.decode(lane, batch)
            rate = tokens * step.steps_per_s
            yield Way(
                Mode.FUSED,
                "whole",
                step.step.median,
                step.step.largest,
                rate,
                fused_tokens=tokens,
            )


def fused_tokens(decode: DecodeCase, prefill: PrefillCase) -> list[int]:
    """Prompt tokens in a step, of the sizes that the dispatcher chooses among."""
    new_tokens = prefill.requests * prefill.new_tokens
    room = {min(step - decode.requests, new_tokens) for step in FUSED_STEP_TOKENS}
    return sorted(tokens for tokens in room if tokens >= min(MIN_FUSED_TOKENS, new_tokens))


def choices(
    frontier: Frontier, model: LatencyModel, lanes: LaneProvider, num_layers: int
) -> Iterator[Row]:
    """For each deadline, what the dispatcher chooses, and how good that is.

    hopeless: at worst no way would meet the deadline, and the gentlest split is taken.
    """
    decode, prefill = frontier.shapes
    for factor in DEADLINES:
        deadline_ms = factor * frontier.solo_ms
        table = lanes.table
        choice = best_mode(model, table, decode, prefill, deadline_ms / 1e3, num_layers)
        hopeless = choice is None
        if choice is None:
            choice = gentlest_split(model, table, decode, prefill, num_layers)
        yield {
            "benchmark": "frontier_choice",
            "decode": str(frontier.decode),
            "deadline_steps": factor,
            "hopeless": hopeless,
            **judge(frontier.ways, choice, deadline_ms),
        }


def draw(frontiers: Sequence[Frontier], path: Path) -> None:
    """A panel for each decode batch: prefill rate over step time, a line for each way."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        1, len(frontiers), figsize=(4 * len(frontiers), 4), squeeze=False, layout="constrained"
    )
    for panel, frontier in zip(axes[0], frontiers, strict=True):
        for mode, mark in ((Mode.SPLIT, "o-"), (Mode.FUSED, "s-"), (Mode.TURNS, ":")):
            ways = sorted(
                (way for way in frontier.ways if way.mode == mode), key=lambda way: way.step_ms
            )
            panel.plot(
                [way.step_ms for way in ways], [way.rate / 1e3 for way in ways], mark, label=mode
            )
        panel.axvline(frontier.solo_ms, color="grey", linewidth=0.8, linestyle="--")
        panel.set_xlim(0, 6 * frontier.solo_ms)
        panel.set_ylim(bottom=0)
        panel.set_title(f"decode {frontier.decode}, prefill {frontier.prefill}")
        panel.set_xlabel("decode step (ms); dashed: alone")
        panel.grid(alpha=0.3)
    axes[0][0].set_ylabel("prefill (1,000 tokens/s)")
    axes[0][0].legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def measure(given: argparse.Namespace) -> tuple[list[Frontier], list[Row]]:
    """The frontiers and the dispatcher's choices, which are also in --out by then.

    Raises ConfigError naming a flag.
    """
    flags = [*model_flags(given.model), "--enable-pd-multiplex", *given.server_flags]
    executor = bring_up(ServerArgs.from_cli(["--model-path", str(given.model), *flags]))
    try:
        _check(executor, given.decode, given.prefill)
        origin = {
            "model": given.model.name,
            "server_flags": flags,
            "prefill": str(given.prefill),
            "slice_layers": given.slice_layers,
            "seed": given.seed,
            "environment": describe(),
        }
        surveyor = _surveyor(executor, given)
        frontiers: list[Frontier] = []
        chosen: list[Row] = []
        with open_results(given.out) as append:
            for decode in given.decode:
                frontier = surveyor.survey(decode, given.prefill, print)
                frontiers.append(frontier)
                for row in _way_rows(frontier):
                    append(row | origin)
                if executor.latencies is None:
                    continue
                found = choices(
                    frontier, executor.latencies, executor.lanes, executor.config.num_layers
                )
                for row in found:
                    chosen.append(row)
                    append(row | origin)
        return frontiers, chosen
    finally:
        executor.lanes.close()


def _surveyor(executor: Executor, given: argparse.Namespace) -> Surveyor:
    if executor.device.type == "cuda":
        # Numbers draw more power than zeros, and a GPU at its power limit slows down.
        executor.kv_pool.keys.normal_()
        executor.kv_pool.values.normal_()
    repetitions = Repetitions(given.decode_steps, given.prefill_runs, given.warm_up)
    lanes = executor.lanes
    return Surveyor(
        Bench(executor.runner, repetitions, lambda: rest(lanes)),
        lanes,
        Placement(
            executor.runner.slot_table,
            num_slots=executor.num_slots,
            page_size=given.page_size,
            decode_rows=executor.num_rows - 1 - given.prefill.requests,
            vocab_size=executor.config.vocab_size,
            seed=given.seed,
        ),
        given.slice_layers,
    )


def _way_rows(frontier: Frontier) -> Iterator[Row]:
    for way in frontier.ways:
        yield {
            "benchmark": "frontier",
            "decode": str(frontier.decode),
            "solo_ms": frontier.solo_ms,
            "prefill_solo_ms": frontier.prefill_ms,
            **way_row(way),
        }


def _check(executor: Executor, decode: Sequence[DecodeCase], prefill: PrefillCase) -> None:
    """Raises ConfigError for a case that the engine cannot hold."""
    free_rows = executor.num_rows - 1 - prefill.requests
    for case in decode:
        if case.requests > free_rows:
            raise ConfigError(f"--decode {case}: raise --max-running-requests above {free_rows}")
        # Pages of any size take no more than this.
        tokens = pool_tokens(case, 1) + pool_tokens(prefill, 1)
        if tokens >= executor.num_slots:
            raise ConfigError(
                f"--decode {case} beside {prefill} takes {tokens} tokens of KV pool, and it has "
                f"{executor.num_slots}: choose smaller ones or raise --max-total-tokens"
            )
        longest = max(case.length, prefill.length)
        if longest > executor.config.context_length:
            raise ConfigError(f"{longest} tokens: raise --context-length or choose shorter cases")


def report(
    frontiers: Sequence[Frontier], chosen: Sequence[Row], baseline: Baseline | None = None
) -> str:
    """Ways in the order of their steps, then the choices."""
    lines = [] if baseline is None else [f"Baseline: {baseline.what}"]
    for frontier in frontiers:
        lines.append(
            f"decode {frontier.decode} ({frontier.solo_ms:.1f} ms alone), "
            f"prefill {frontier.prefill} ({frontier.prefill_ms:.1f} ms alone)"
        )
        measured = [way for way in frontier.ways if way.mode != Mode.TURNS]
        lines += [
            f"  {way!s:18} {way.step_ms:7.1f} ms  {way.rate / 1e3:6.1f}k tokens/s"
            + _gain(baseline, frontier, way)
            for way in sorted(measured, key=lambda way: (way.mode, way.step_ms))
        ]
    for row in chosen:
        ratio = "" if row["ratio"] is None else f", {row['ratio']:.2f} of the best rate in time"
        late = "" if row.get("in_time", True) else ", late"
        late += ", expected to be late" if row["hopeless"] else ""
        lines.append(
            f"decode {row['decode']}, {row['deadline_steps']:g} steps "
            f"({row['deadline_ms']:.1f} ms): {row['choice']} for {row['best']}{ratio}{late}"
        )
    return "\n".join(lines)


def _gain(baseline: Baseline | None, frontier: Frontier, way: Way) -> str:
    if baseline is None or way.mode != Mode.SPLIT or str(frontier.decode) not in baseline.frontiers:
        return ""
    rate = baseline.rate(str(frontier.decode), way.step_ms)
    if rate is None:
        return ", a shorter step than the baseline has"
    return f", {way.rate / rate - 1:+.0%}"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command_line("frontier", __doc__)
    parser.add_argument("--model", type=Path, required=True, help="folder with a config.json, GGUF")
    parser.add_argument(
        "--decode",
        nargs="+",
        type=_case(DecodeCase.parse),
        default=[DecodeCase.parse(text) for text in DEFAULT_DECODE],
        metavar="BATCHxLENGTH",
        help=f"(default: {' '.join(DEFAULT_DECODE)})",
    )
    parser.add_argument(
        "--prefill",
        type=_case(PrefillCase.parse),
        default=PrefillCase.parse(DEFAULT_PREFILL),
        metavar="NEW+CACHED",
        help=f"(default: {DEFAULT_PREFILL})",
    )
    parser.add_argument(
        "--slice-layers",
        type=whole(1),
        default=MAX_SLICE_LAYERS,
        help=f"(default: {MAX_SLICE_LAYERS})",
    )
    parser.add_argument("--decode-steps", type=whole(2), default=30, help="(default: 30)")
    parser.add_argument("--prefill-runs", type=whole(1), default=4, help="(default: 4)")
    parser.add_argument("--warm-up", type=whole(1), default=2, help="(default: 2)")
    parser.add_argument("--page-size", type=whole(1), default=1, help="as the server's")
    parser.add_argument("--seed", type=whole(0), default=0)
    parser.add_argument("--out", type=Path, required=True, help="JSON lines file to append to")
    parser.add_argument("--png", type=Path, help="the frontiers as a picture")
    parser.add_argument("--baseline", type=Path, help="another engine's splits, to compare with")
    parser.add_argument("server_flags", nargs="*", help="flags of the server, behind --")
    return parser.parse_args(argv)


def _case(
    read: Callable[[str], DecodeCase | PrefillCase],
) -> Callable[[str], DecodeCase | PrefillCase]:
    """argparse prints a ValueError's text only if it is an ArgumentTypeError."""

    def convert(text: str) -> DecodeCase | PrefillCase:
        try:
            return read(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return convert


def main(argv: Sequence[str] | None = None) -> int:
    given = parse(argv)
    try:
        baseline = None if given.baseline is None else Baseline.load(given.baseline)
        if baseline is not None and baseline.prefill != str(given.prefill):
            raise ConfigError(f"--prefill {given.prefill}: the baseline's is {baseline.prefill}")
        frontiers, chosen = measure(given)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 1
    print("\n" + report(frontiers, chosen, baseline))
    if given.png is not None:
        draw(frontiers, given.png)
    return 0


if __name__ == "__main__":
    sys.exit(main())
