"""Results as JSON lines, and as one table for people."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from drift_scheduler.lane import Phase, Span
from drift_scheduler.partition import Partition
from sglang.srt.benchmarks.one_batch.cases import DecodeCase, GenerationCase, PrefillCase
from sglang.srt.benchmarks.one_batch.floors import Rates, decode_work, prefill_work
from sglang.srt.benchmarks.one_batch.measure import DecodeTimes, PrefillTimes
from sglang.srt.errors import ConfigError
from sglang.srt.model_config import ModelConfig

Row = dict[str, Any]


def decode_row(
    config: ModelConfig,
    case: DecodeCase,
    partition: Partition,
    rates: Rates,
    times: DecodeTimes,
) -> Row:
    """ratio: measured to least time, on the same lane. gap_ms, launch_ms, cpu_ms: DecodeTimes."""
    floor_ms = decode_work(config, case).floor_s(rates) * 1e3
    return {
        "case": f"decode {case}",
        "partition": str(partition),
        "beside": None,
        "ms": times.step.median,
        "floor_ms": floor_ms,
        "ratio": times.step.median / floor_ms,
        "p10_ms": times.step.p10,
        "p90_ms": times.step.p90,
        "repetitions": times.step.count,
        "tokens_per_s": case.requests * times.steps_per_s,
        "gap_ms": times.gap_ms,
        "launch_ms": times.launch_ms,
        "cpu_ms": times.cpu_ms,
        "rates": rates_json(rates),
    }


def prefill_row(
    config: ModelConfig,
    case: PrefillCase,
    partition: Partition,
    rates: Rates,
    times: PrefillTimes,
) -> Row:
    """launch_ms: host time of one launch, which is one slice."""
    floor_ms = prefill_work(config, case).floor_s(rates) * 1e3
    return {
        "case": f"prefill {case}",
        "partition": str(partition),
        "beside": None,
        "ms": times.run.median,
        "floor_ms": floor_ms,
        "ratio": times.run.median / floor_ms,
        "p10_ms": times.run.p10,
        "p90_ms": times.run.p90,
        "repetitions": times.run.count,
        "tokens_per_s": case.requests * case.new_tokens * times.runs_per_s,
        "launch_ms": times.launch_ms,
        "rates": rates_json(rates),
    }


def slicing(whole: PrefillTimes, sliced: PrefillTimes, slice_layers: int) -> Row:
    """What a prefill row says of the same prefill cut in slices."""
    return {
        "slice_layers": slice_layers,
        "sliced_ms": sliced.run.median,
        "slicing_percent": 100 * (sliced.run.median / whole.run.median - 1),
        "slice_launch_ms": sliced.launch_ms,
    }


def generation_row(case: GenerationCase, prefill_s: float, steps: Sequence[Span]) -> Row:
    """SGLang's keys; latencies in seconds, throughputs in tokens/s.

    steps: of tokens 2 to the last; none, and no keys for decode, if one token is generated.
    """
    row: Row = {
        "case": f"generate {case}",
        "batch_size": case.requests,
        "input_len": case.input_tokens,
        "output_len": case.output_tokens,
        "prefill_latency": prefill_s,
        "prefill_throughput": case.requests * case.input_tokens / prefill_s,
    }
    total_s = prefill_s
    if steps:
        step_s = statistics.median(span.duration_s for span in steps)
        row["median_decode_latency"] = step_s
        row["median_decode_throughput"] = case.requests / step_s
        total_s += steps[-1].end_s - steps[0].start_s
    row["total_latency"] = total_s
    row["overall_throughput"] = case.requests * case.length / total_s
    return row


def rates_json(rates: Rates) -> Row:
    return {
        "copy_tb_per_s": rates.copy_bytes / 1e12,
        "matrix_tflops": rates.matrix_flops / 1e12,
        "attention_tflops": rates.attention_flops / 1e12,
    }


@contextmanager
def open_results(path: Path) -> Iterator[Callable[[Row], None]]:
    """A function that appends a line at once, so that a run cut short keeps what it has.

    Raises ConfigError naming --result-filename.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--result-filename: {error}") from error
    with file:

        def append(row: Row) -> None:
            file.write(json.dumps(row) + "\n")
            file.flush()

        yield append


_COLUMNS = (
    ("case", "case", "{}"),
    ("partition", "on", "{}"),
    ("beside", "beside", "{}"),
    ("ms", "ms", "{:.2f}"),
    ("p10_ms", "p10", "{:.2f}"),
    ("p90_ms", "p90", "{:.2f}"),
    ("alone_ms", "alone", "{:.2f}"),
    ("floor_ms", "floor", "{:.2f}"),
    ("ratio", "ratio", "{:.2f}"),
    ("tokens_per_s", "tokens/s", "{:.0f}"),
    ("gap_ms", "gap", "{:.3f}"),
    ("launch_ms", "launch", "{:.3f}"),
    ("cpu_ms", "cpu", "{:.3f}"),
    ("slice_launch_ms", "slice launch", "{:.3f}"),
    ("slicing_percent", "slicing %", "{:+.1f}"),
    ("sm_clock_mhz", "MHz", "{:.0f}"),
    ("power_w", "W", "{:.0f}"),
)
_GENERATION_COLUMNS = (
    ("case", "case", "{}"),
    ("prefill_latency", "prefill s", "{:.4f}"),
    ("prefill_throughput", "tokens/s", "{:.0f}"),
    ("median_decode_latency", "step s", "{:.5f}"),
    ("median_decode_throughput", "tokens/s", "{:.0f}"),
    ("total_latency", "total s", "{:.3f}"),
    ("overall_throughput", "tokens/s", "{:.0f}"),
    ("sm_clock_mhz", "MHz", "{:.0f}"),
    ("power_w", "W", "{:.0f}"),
)


def table(rows: Sequence[Row]) -> str:
    """Aligned columns; those that no row fills are left out."""
    cases = [row for row in rows if "ms" in row]
    generations = [row for row in rows if "total_latency" in row]
    parts = [(cases, _COLUMNS), (generations, _GENERATION_COLUMNS)]
    return "\n\n".join(_aligned(part, columns) for part, columns in parts if part)


def limits_line(rows: Sequence[Row]) -> str:
    """What held the GPU's clock down in how many of the cases; empty if nothing did."""
    counts = Counter(name for row in rows for name in row.get("limited_by", ()))
    found = ", ".join(f"{name} in {count}" for name, count in counts.most_common())
    return f"Clock held down, of {len(rows)} cases: {found}" if found else ""


def machine_lines(rates: dict[tuple[Phase, Partition], Rates], unit: str) -> str:
    """What each lane can do at best, one line a lane."""
    lines = []
    for (phase, partition), lane_rates in rates.items():
        sms = partition.prefill_sms if phase is Phase.PREFILL else partition.decode_sms
        lines.append(
            f"{phase} lane of {partition} ({sms} {unit}): "
            f"copy {lane_rates.copy_bytes / 1e12:.3f} TB/s, "
            f"matrices {lane_rates.matrix_flops / 1e12:.3g} TFLOP/s"
        )
    return "\n".join(lines)


def _aligned(rows: Sequence[Row], columns: Sequence[tuple[str, str, str]]) -> str:
    used = [column for column in columns if any(row.get(column[0]) is not None for row in rows)]
    lines = [[title for _, title, _ in used]]
    for row in rows:
        values = [(row.get(key), style) for key, _, style in used]
        lines.append(["" if value is None else style.format(value) for value, style in values])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [any(isinstance(row.get(key), str) for row in rows) for key, _, _ in used]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if is_text else cell.rjust(width)
            for cell, width, is_text in zip(line, widths, text, strict=True)
        ).rstrip()
        for line in lines
    )
