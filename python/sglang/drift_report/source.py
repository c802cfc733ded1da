"""Where a timeline comes from: a JSON file, or a server that is asked for one."""

from __future__ import annotations

import json
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

from sglang.drift_report.errors import ReportError

Timeline = dict[str, Any]

CALL_LIMIT_S = 30.0
TIMELINE_PATH = "/pd_multiplex/timeline"
TRACE_PATH = "/pd_multiplex/trace"
_LISTS = ("policies", "runs", "samples")


def load_timeline(source: str, seconds: float | None, api_key: str | None) -> Timeline:
    """source: a file that holds an answer of /pd_multiplex/timeline, or http://host:port.

    seconds: only the last ones; None for all of a file, or what a server gives unasked. Raises
    ReportError.
    """
    if is_server(source):
        return _checked(_parse(fetch(source, TIMELINE_PATH, seconds, api_key), source), source)
    try:
        raw = Path(source).read_bytes()
    except OSError as error:
        raise ReportError(f"{source}: {error.strerror}") from None
    timeline = _checked(_parse(raw, source), source)
    return timeline if seconds is None else last_seconds(timeline, seconds)


def is_server(source: str) -> bool:
    return source.startswith(("http://", "https://"))


def fetch(base_url: str, path: str, seconds: float | None, api_key: str | None) -> bytes:
    """The body of a GET. Raises ReportError."""
    query = "" if seconds is None else "?" + urllib.parse.urlencode({"seconds": f"{seconds:g}"})
    url = base_url.rstrip("/") + path + query
    headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
    try:
        request = urllib.request.Request(url, headers=headers)
        with urllib.request.urlopen(request, timeout=CALL_LIMIT_S) as response:
            body: bytes = response.read()
            return body
    except urllib.error.HTTPError as error:
        text = error.read().decode("utf-8", errors="replace").strip()
        raise ReportError(f"{url}: HTTP {error.code}: {text}") from None
    except (OSError, ValueError) as error:
        raise ReportError(f"{url}: {error}") from None


def last_seconds(timeline: Timeline, seconds: float) -> Timeline:
    """The end of a timeline, with the policy that it begins with. Times keep their origin."""
    start_ms = timeline["window_ms"] - seconds * 1000
    before = [change for change in timeline["policies"] if change["from_ms"] <= start_ms]
    return {
        **timeline,
        "policies": timeline["policies"][max(len(before) - 1, 0) :],
        "runs": [run for run in timeline["runs"] if run["end_ms"] >= start_ms],
        "samples": [sample for sample in timeline["samples"] if sample["time_ms"] >= start_ms],
    }


def _parse(raw: bytes, source: str) -> Any:
    try:
        return json.loads(raw)
    except ValueError as error:
        raise ReportError(f"{source}: not JSON: {error}") from None


def _checked(timeline: Any, source: str) -> Timeline:
    if not isinstance(timeline, dict) or not all(
        isinstance(timeline.get(name), list) for name in _LISTS
    ):
        raise ReportError(f"{source}: not an answer of {TIMELINE_PATH}")
    return timeline
