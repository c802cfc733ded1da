"""A window of the timeline, put together from its pages, and its JSON form."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from drift_scheduler.samples import QueueSample
from drift_scheduler.timeline import LaneRun, PolicyChange, TimelinePage

JsonObject = dict[str, Any]


@dataclass(frozen=True, slots=True)
class TimelineWindow:
    """What a device of `total_sms` did up to `now_s`, oldest first.

    origin_s: time zero of what is shown, the start of the oldest run or sample. truncated: some
    runs of the time asked for were no longer kept; the oldest are missing.
    """

    now_s: float
    origin_s: float
    total_sms: int
    runs: Sequence[LaneRun]
    samples: Sequence[QueueSample]
    policies: Sequence[PolicyChange]
    truncated: bool

    @classmethod
    def of_pages(cls, pages: Sequence[TimelinePage], total_sms: int) -> TimelineWindow:
        """pages: one or more that follow each other. What came after the first was asked for is
        left out."""
        now_s = pages[0].now_s
        runs = [run for page in pages for run in page.runs if run.span.end_s <= now_s]
        samples = [sample for page in pages for sample in page.samples if sample.time_s <= now_s]
        starts = [run.span.start_s for run in runs] + [sample.time_s for sample in samples[:1]]
        return cls(
            now_s=now_s,
            origin_s=min(starts, default=now_s),
            total_sms=total_sms,
            runs=runs,
            samples=samples,
            policies=pages[0].policies,
            truncated=any(page.truncated for page in pages),
        )

    def policies_shown(self) -> list[PolicyChange]:
        """Changes inside the window; the policy that it began with, at its origin."""
        inside = [change for change in self.policies if change.time_s > self.origin_s]
        before = [change for change in self.policies if change.time_s <= self.origin_s]
        return [PolicyChange(self.origin_s, change.policy) for change in before[-1:]] + inside


def as_json(window: TimelineWindow) -> JsonObject:
    """Times in ms since the window's origin; slacks and forecasts are null where there is none."""

    def ms(time_s: float) -> float:
        return round((time_s - window.origin_s) * 1000, 4)

    return {
        "window_ms": ms(window.now_s),
        "total_sms": window.total_sms,
        "truncated": window.truncated,
        "policies": [
            {"from_ms": ms(change.time_s), "policy": change.policy}
            for change in window.policies_shown()
        ],
        "runs": [
            {
                "phase": run.phase,
                "mode": run.mode,
                "partition": str(run.partition),
                "prefill_sms": run.partition.prefill_sms,
                "decode_sms": run.partition.decode_sms,
                "start_ms": ms(run.span.start_s),
                "end_ms": ms(run.span.end_s),
                **details(run),
            }
            for run in window.runs
        ],
        "samples": [
            {
                "time_ms": ms(sample.time_s),
                "waiting_prompts": sample.waiting_prompts,
                "waiting_tokens": sample.waiting_tokens,
                "running_requests": sample.running,
                "token_slack_ms": _ms(sample.token_slack_s),
                "first_token_slack_ms": _ms(sample.first_token_slack_s),
                "partition": str(sample.partition),
                "repartitions_since_start": sample.repartitions,
                "sm_clock_mhz": sample.sm_clock_mhz,
            }
            for sample in window.samples
        ],
    }


def details(run: LaneRun) -> JsonObject:
    """What a run was, and what it was expected to take."""
    decode, prefill, forecast = run.decode, run.prefill, run.forecast
    return {
        "requests": run.requests,
        "tokens": run.tokens,
        "fused_tokens": run.fused_tokens,
        "layers": run.layers,
        "decode_requests": decode.requests if decode else None,
        "decode_context_tokens": decode.context if decode else None,
        "prefill_requests": prefill.requests if prefill else None,
        "prefill_tokens": prefill.tokens if prefill else None,
        "prefill_squares": prefill.squares if prefill else None,
        "prefill_cross": prefill.cross if prefill else None,
        "actual_ms": _ms(run.span.duration_s),
        "expected_ms": _ms(forecast.expected_s) if forecast else None,
        "worst_ms": _ms(forecast.worst_s) if forecast else None,
        "unnoticed_ms": None if run.settled_s is None else _ms(run.settled_s - run.span.end_s),
        "reason": run.reason,
    }


def _ms(seconds: float) -> float | None:
    return round(seconds * 1000, 4) if math.isfinite(seconds) else None
