"""The report: its numbers are exact, its picture is a picture, bad input is named."""

from __future__ import annotations

import http.server
import json
import math
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sglang.drift_report.__main__ import main
from sglang.drift_report.source import last_seconds
from sglang.drift_report.summary import render, summarise


def run(phase: str, mode: str, start_ms: float, end_ms: float, **fields: Any) -> dict[str, Any]:
    split = mode == "split"
    return {
        "phase": phase,
        "mode": mode,
        "partition": "p100/d32" if split else "whole",
        "prefill_sms": 100 if split else 132,
        "decode_sms": 32 if split else 132,
        "start_ms": start_ms,
        "end_ms": end_ms,
        "actual_ms": end_ms - start_ms,
        "expected_ms": None,
        "worst_ms": None,
        **fields,
    }


def sample(time_ms: float, **fields: Any) -> dict[str, Any]:
    return {
        "time_ms": time_ms,
        "waiting_prompts": 2,
        "waiting_tokens": 800,
        "running_requests": 4,
        "token_slack_ms": 12.0,
        "first_token_slack_ms": None,
        "partition": "whole",
        "repartitions_since_start": 0,
        "sm_clock_mhz": None,
        **fields,
    }


def timeline(runs=(), samples=(), policies=("turns",), window_ms=100.0) -> dict[str, Any]:
    return {
        "window_ms": window_ms,
        "total_sms": 132,
        "truncated": False,
        "policies": [
            {"from_ms": 10.0 * place, "policy": name} for place, name in enumerate(policies)
        ],
        "runs": list(runs),
        "samples": list(samples),
    }


MIXED = timeline(
    runs=[
        run("decode", "decode", 0, 20, expected_ms=16.0, worst_ms=19.0),
        run("decode", "split", 20, 35, expected_ms=15.0, worst_ms=20.0),
        run("prefill", "split", 25, 45, expected_ms=16.0, worst_ms=20.0),
        run("decode", "fused", 50, 60),
        run("prefill", "prefill", 70, 90),
    ],
    samples=[
        sample(1, repartitions_since_start=3),
        sample(80, repartitions_since_start=8, first_token_slack_ms=-250.0),
    ],
    policies=("turns", "adaptive"),
)


def test_shares_of_time_are_those_of_the_intervals():
    summary = summarise(MIXED)
    assert summary.window_ms == 100
    assert dict(summary.mode_shares) == pytest.approx(
        {"decode": 0.20, "split": 0.25, "fused": 0.10, "prefill": 0.20, "idle": 0.25}
    )
    assert summary.runs_by_mode == {"decode": 1, "split": 2, "fused": 1, "prefill": 1}


def test_where_modes_overlap_a_moment_counts_once():
    overlap = timeline([run("decode", "decode", 0, 60), run("prefill", "split", 40, 100)])
    shares = summarise(overlap).mode_shares
    assert shares["split"] == pytest.approx(0.6)
    assert shares["decode"] == pytest.approx(0.4)
    assert math.fsum(shares.values()) == pytest.approx(1.0)


def test_forecast_errors_and_overruns_by_phase():
    forecasts = summarise(MIXED).forecasts
    decode, prefill = forecasts["decode"], forecasts["prefill"]
    # |20/16 - 1| = 0.25 and |15/15 - 1| = 0
    assert (decode.runs, decode.overruns) == (2, 1)
    assert decode.median == pytest.approx(0.125)
    assert decode.p99 == pytest.approx(0.2475)
    # 20 ms is its worst case, and no overrun
    assert (prefill.runs, prefill.overruns) == (1, 0)
    assert prefill.median == prefill.p99 == pytest.approx(0.25)


def test_repartitions_and_policies_are_those_of_the_window():
    summary = summarise(MIXED)
    assert summary.repartitions == 5
    assert summary.policies == ["turns", "adaptive"]


def test_an_empty_timeline_has_a_summary():
    summary = summarise(timeline(window_ms=0.0))
    assert set(summary.mode_shares.values()) == {0.0}
    assert summary.repartitions is None
    assert "not known" in render(summary)


def test_the_table_shows_the_numbers():
    text = render(summarise(MIXED))
    lines = {line.split()[0]: line.split()[1:] for line in text.splitlines() if line}
    assert lines["split"] == ["25.0%", "2"]
    assert lines["idle"] == ["25.0%"]
    assert lines["policy"] == ["turns", "->", "adaptive"]
    assert lines["re-partitions"] == ["5"]
    assert "decode           2         1         12.5%      24.8%" in text


def png_size(path: Path) -> tuple[int, int]:
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", head[16:24])
    return width, height


@pytest.mark.parametrize(
    "shown",
    [
        MIXED,
        timeline(),
        timeline(samples=[sample(0, token_slack_ms=None)]),
        timeline(samples=[sample(0, sm_clock_mhz=1980.0), sample(50, sm_clock_mhz=1410.0)]),
    ],
    ids=["mixed", "empty", "idle", "clock"],
)
def test_the_picture_has_its_size(tmp_path, capsys, shown):
    pytest.importorskip("matplotlib")
    source, out = tmp_path / "timeline.json", tmp_path / "picture.png"
    source.write_text(json.dumps(shown))
    assert main(["trace", str(source), "--out", str(out)]) == 0
    assert png_size(out) == (1600, 1000)
    assert "share of time" in capsys.readouterr().out


def test_the_end_of_a_timeline_keeps_the_policy_it_begins_with():
    policies = ["turns", "adaptive", "table"]  # from 0, 10 and 20 ms
    shown = timeline(policies=policies, window_ms=30.0)
    for seconds, left in (
        (0.03, policies),
        (0.025, policies),
        (0.015, policies[1:]),
        (0.001, ["table"]),
    ):
        assert [change["policy"] for change in last_seconds(shown, seconds)["policies"]] == left


def test_only_the_last_seconds_of_a_file(tmp_path, capsys):
    source = tmp_path / "timeline.json"
    source.write_text(json.dumps(MIXED))
    assert main(["trace", str(source), "--seconds", "0.04"]) == 0
    out = capsys.readouterr().out
    assert "window          0.05 s" in out  # from the start of the run at 50 ms
    assert out.splitlines()[3].split()[0] == "mode"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "No such file"),
        ("{", "not JSON"),
        ("[]", "not an answer of"),
        ("{}", "not an answer"),
    ],
)
def test_a_bad_file_is_named(tmp_path, capsys, content, said):
    source = tmp_path / "timeline.json"
    if content is not None:
        source.write_text(content)
    assert main(["trace", str(source)]) == 2
    error = capsys.readouterr().err
    assert str(source) in error
    assert said in error


def test_an_unknown_kind_of_picture_is_named(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    source = tmp_path / "timeline.json"
    source.write_text(json.dumps(MIXED))
    assert main(["trace", str(source), "--out", str(tmp_path / "picture.odd")]) == 2
    assert "--out" in capsys.readouterr().err


def test_without_a_command_they_are_listed(capsys):
    assert main([]) == 0
    out = capsys.readouterr().out
    assert "trace" in out
    assert "perfetto" in out


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "soon"])
def test_bad_seconds_are_refused(seconds, capsys):
    with pytest.raises(SystemExit) as left:
        main(["trace", "timeline.json", "--seconds", seconds])
    assert left.value.code == 2
    assert "--seconds" in capsys.readouterr().err


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers with MIXED whoever has the key."""

    asked: list[str] = []  # noqa: RUF012, emptied by the fixture

    def do_GET(self) -> None:
        self.asked.append(self.path)
        allowed = self.headers.get("Authorization") == "Bearer hush"
        body = json.dumps(MIXED if allowed else {"error": "Unauthorized"}).encode()
        self.send_response(200 if allowed else 401)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def server_url() -> Iterator[str]:
    Handler.asked.clear()
    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join(10)


def test_a_server_is_asked_for_its_timeline(server_url, capsys):
    assert main(["trace", server_url + "/", "--seconds", "2.5", "--api-key", "hush"]) == 0
    assert Handler.asked == ["/pd_multiplex/timeline?seconds=2.5"]
    assert "turns -> adaptive" in capsys.readouterr().out


def test_a_refusal_of_the_server_is_shown(server_url, capsys):
    assert main(["trace", server_url]) == 2
    error = capsys.readouterr().err
    assert "HTTP 401" in error
    assert "Unauthorized" in error


def test_the_trace_is_saved_as_it_came(server_url, tmp_path, capsys):
    out = tmp_path / "trace.json"
    assert main(["perfetto", server_url, "--out", str(out), "--api-key", "hush"]) == 0
    assert Handler.asked == ["/pd_multiplex/trace"]
    assert json.loads(out.read_text()) == MIXED
    assert "ui.perfetto.dev" in capsys.readouterr().out


def test_a_trace_comes_from_a_server_only(tmp_path, capsys):
    assert main(["perfetto", "timeline.json", "--out", str(tmp_path / "trace.json")]) == 2
    assert "timeline.json" in capsys.readouterr().err
