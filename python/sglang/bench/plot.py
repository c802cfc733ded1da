"""--plot-throughput: a run over time, drawn with characters."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

from sglang.bench.metrics import in_flight_by_second, tokens_by_second
from sglang.bench.records import RequestRecord

_ROWS = 30
_BAR = 40


def throughput_chart(records: Sequence[RequestRecord]) -> str:
    """A row a second, or of as many seconds as leave _ROWS rows: output tokens per second as a
    bar, and the most requests in flight."""
    done = [record for record in records if record.ok]
    in_flight = in_flight_by_second(done)
    if not in_flight:
        return "--plot-throughput: no request completed"
    tokens = tokens_by_second(done)
    tokens += [0] * (len(in_flight) - len(tokens))
    width_s = ceil(len(tokens) / _ROWS)
    starts = range(0, len(tokens), width_s)
    rates = [sum(part) / len(part) for part in (tokens[s : s + width_s] for s in starts)]
    most = max(rates) or 1.0
    lines = [f"{'second':>8} {'tok/s':>10} {'in flight':>10}"]
    for start, rate in zip(starts, rates, strict=True):
        bar = "#" * round(_BAR * rate / most)
        flying = max(in_flight[start : start + width_s])
        lines.append(f"{start:>8} {rate:>10.1f} {flying:>10} {bar}".rstrip())
    return "\n".join(lines)
