"""A window of the timeline as trace events, which ui.perfetto.dev and chrome://tracing load.

One thread a lane, with a slice for each run; counter tracks for the SMs that each phase uses,
the queue, and how near the next deadline is. Perfetto colours slices by their name, which is why
a run is named after its mode and partition and the rest stands in its arguments.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator

from drift_scheduler.lane import Phase
from drift_scheduler.samples import QueueSample
from drift_scheduler.timeline import LaneRun, RunMode
from drift_scheduler.window import JsonObject, TimelineWindow, details

_PROCESS = 1
_THREADS = {Phase.DECODE: 1, Phase.PREFILL: 2}


def trace_events(window: TimelineWindow) -> JsonObject:
    """The object form of the trace-event format. Times in microseconds since window.origin_s."""
    events = [
        *_names(),
        *(_slice(run, window.origin_s) for run in window.runs),
        *_sm_counters(window),
        *(event for sample in window.samples for event in _counters(sample, window.origin_s)),
        *(
            {
                "ph": "i",
                "s": "g",
                "name": f"policy {change.policy}",
                "ts": _us(change.time_s, window.origin_s),
                "pid": _PROCESS,
                "tid": 0,
            }
            for change in window.policies_shown()
        ),
    ]
    return {
        "traceEvents": events,
        "displayTimeUnit": "ms",
        "otherData": {"total_sms": window.total_sms, "truncated": window.truncated},
    }


def _names() -> Iterator[JsonObject]:
    yield _metadata("process_name", 0, {"name": "engine"})
    for phase, thread in _THREADS.items():
        yield _metadata("thread_name", thread, {"name": f"{phase} lane"})
        yield _metadata("thread_sort_index", thread, {"sort_index": thread})


def _metadata(name: str, thread: int, args: JsonObject) -> JsonObject:
    return {"ph": "M", "name": name, "pid": _PROCESS, "tid": thread, "args": args}


def _slice(run: LaneRun, origin_s: float) -> JsonObject:
    return {
        "ph": "X",
        "name": slice_name(run),
        "cat": run.mode,
        "ts": _us(run.span.start_s, origin_s),
        "dur": round(run.span.duration_s * 1e6, 3),
        "pid": _PROCESS,
        "tid": _THREADS[run.phase],
        "args": {"partition": str(run.partition), **details(run)},
    }


def slice_name(run: LaneRun) -> str:
    """Like "decode", "prefill p116/d16" or "fused": phase, and how it had the device."""
    if run.mode is RunMode.SPLIT:
        return f"{run.phase} {run.partition}"
    return run.mode


def _sm_counters(window: TimelineWindow) -> Iterator[JsonObject]:
    """The SMs of a phase while it runs; nothing in between runs."""
    for phase in _THREADS:
        runs = [run for run in window.runs if run.phase is phase]
        name = f"{phase} SMs"
        for run, following in itertools.zip_longest(runs, runs[1:]):
            part = run.partition
            sms = part.decode_sms if phase is Phase.DECODE else part.prefill_sms
            yield _counter(name, run.span.start_s, window.origin_s, sms)
            if following is None or following.span.start_s > run.span.end_s:
                yield _counter(name, run.span.end_s, window.origin_s, 0)


def _counters(sample: QueueSample, origin_s: float) -> Iterable[JsonObject]:
    values = {
        "waiting prompts": sample.waiting_prompts,
        "waiting tokens": sample.waiting_tokens,
        "running requests": sample.running,
        "slack of next token (ms)": sample.token_slack_s * 1000,
        "slack of first token (ms)": sample.first_token_slack_s * 1000,
    }
    for name, value in values.items():
        # Nothing is due: a counter has no way to say so but to stay as it was.
        if math.isfinite(value):
            yield _counter(name, sample.time_s, origin_s, round(value, 3))
    if sample.sm_clock_mhz is not None:
        yield _counter("SM clock (MHz)", sample.time_s, origin_s, sample.sm_clock_mhz)


def _counter(name: str, time_s: float, origin_s: float, value: float) -> JsonObject:
    return {
        "ph": "C",
        "name": name,
        "ts": _us(time_s, origin_s),
        "pid": _PROCESS,
        "args": {"value": value},
    }


def _us(time_s: float, origin_s: float) -> float:
    return round((time_s - origin_s) * 1e6, 3)
