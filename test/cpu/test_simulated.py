"""Measured windows simulated: the client's requests, the lines, the table, and what is refused."""

from __future__ import annotations

import dataclasses
import gzip
import itertools
import json

import numpy as np
import pytest

from benchmark.policy_plan import Workload
from benchmark.simulated import main, parse
from benchmark.simulated_load import (
    BLOCK_TOKENS,
    PromptBlocks,
    comparison_of,
    requests_of,
)
from benchmark.simulated_table import render, swapped
from benchmark.simulated_times import host_pauses, runs_of
from benchmark.simulated_window import server_count
from benchmark.trace_load import TraceLoad
from drift_scheduler.lane import Phase, Span
from drift_scheduler.profile import Kind, PaddedSizes, Profile, ProfileKey, Sample, Split
from drift_scheduler.shapes import DecodeShape, PrefillShape
from drift_scheduler.simulation.machine import load_machine
from drift_scheduler.timeline import LaneRun, Timeline
from drift_scheduler.window import TimelineWindow, as_json
from sglang.bench.arrivals import poisson_arrivals_s
from sglang.bench.cli import parse_options
from sglang.bench.datasets import mooncake
from sglang.bench.prompts import PromptMaker

SMS = 8
SPLITS = ((6, 2), (4, 4))
PARTITIONS = ("whole", "p6/d2", "p4/d4")


@pytest.fixture
def trace(tmp_path):
    """Prompts of 700 to 1,500 tokens; each fourth continues the one before, within its last block
    too. Every ninth is too long."""
    rows = []
    for i in range(90):
        length = 40_000 if i % 9 == 8 else 700 + 200 * (i % 5)
        start = 1000 * (i - i % 4)
        ids = [start + block for block in range(-(-length // 512))]
        rows.append(
            {
                "timestamp": 1000 * i,
                "input_length": length,
                "output_length": 20 * (i % 7),
                "hash_ids": ids,
            }
        )
    path = tmp_path / "chat.jsonl.gz"
    path.write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    return path


@pytest.fixture
def profile(tmp_path):
    """Decode takes 8 ms and a little, prefill 50 us a token; on a part of 8 SMs in proportion."""
    samples = []
    for prefill_sms, decode_sms in (*SPLITS, (SMS, SMS)):
        split = Split(prefill_sms, decode_sms, exclusive=prefill_sms == SMS)
        for requests, each in itertools.product((1, 8, 64), (128, 1024, 4096)):
            shape = DecodeShape(requests, requests * each)
            seconds = (0.008 + 1e-4 * requests + 1e-7 * shape.context) * SMS / decode_sms
            samples.append(Sample(Kind.DECODE, split, seconds, shape))
        for tokens, cached in itertools.product((64, 512, 2048, 8192), (0, 4096)):
            prompts = PrefillShape.of([(tokens, cached)])
            seconds = (0.002 + 5e-5 * tokens + 1e-9 * prompts.cross) * SMS / prefill_sms
            samples.append(Sample(Kind.PREFILL, split, seconds, prefill=prompts, layers=4))
    key = ProfileKey("a device", SMS, "4 layers of 64", 1, "bfloat16")
    path = tmp_path / "profile.json"
    Profile(key, samples, sizes=PaddedSizes(prefill=(128, 512))).save(path)
    return path


@pytest.fixture
def row(trace):
    return {
        "benchmark": "policies",
        "policy": "adaptive",
        "workload": f"mooncake:{trace.name}",
        "rate": 4.0,
        "slo_tbt_ms": 50.0,
        "slo_ttft_ms": 500.0,
        "slo_ttft_ms_per_token": 0.5,
        "seconds": 6.0,
        "warm_up_seconds": 2.0,
        "max_input_len": 8192,
        "seed": 5,
        "server": 1,
        "model": "some-model",
        "server_flags": ["--load-format=dummy", "--enable-pd-multiplex"],
        "environment": {"commit": "abc"},
        "requests": 24,
        "completed": 24,
        "unfinished": 0,
        "duration_s": 6.5,
        "attainment": 0.9,
        "attainment_ttft": 0.95,
        "attainment_tbt": 0.95,
        "goodput": 3.3,
        "ttft_p50_ms": 80.0,
        "ttft_p99_ms": 300.0,
        "tbt_p50_ms": 10.0,
        "tbt_p99_ms": 40.0,
        "cached_share": 0.3,
        "prefill_busy_share": 0.2,
        "decode_busy_share": 0.6,
        "both_busy_share": 0.1,
        "fused_share": 0.2,
        "launches": dict.fromkeys(PARTITIONS, 3),
    }


@pytest.fixture
def simulate(tmp_path, profile, trace):
    """Runs the command on rows; (exit code, the lines written)."""
    out = tmp_path / "out.jsonl"

    def run(rows, *flags):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        files = ["--rows", str(path), "--profile", str(profile), "--out", str(out)]
        code = main([*files, "--workload", f"mooncake:{trace}", "tool_agent", *flags])
        text = out.read_text() if out.exists() else ""
        return code, [json.loads(line) for line in text.splitlines()]

    return run


def client_side(load: TraceLoad):
    """Prompts, answer lengths and times, as the client makes them with a vocabulary of its own."""
    options = parse_options(["--backend=sglang", *load.bench_flags()])
    maker = PromptMaker(np.arange(128_000, dtype=np.int32), None, send_ids=True)
    conversations, _ = mooncake.load(options, maker)
    turns = [turn for conversation in conversations for turn in conversation.turns]
    assert len(turns) == len(conversations)
    return turns, poisson_arrivals_s(len(conversations), options.request_rate, options.seed)


def common(a, b) -> int:
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(a, b)))  # noqa: B905


def only_load(comparison, folder):
    (point,), (tbt_ms,) = comparison.points, comparison.tbts_ms
    return comparison.load(point, tbt_ms, folder)


def test_requests_are_those_of_the_client_at_the_same_times(row, trace, tmp_path):
    comparison = comparison_of(row, Workload.parse(f"mooncake:{trace}"), 60.0)
    load = only_load(comparison, tmp_path)
    requests = requests_of(load)
    turns, arrivals_s = client_side(load)
    assert len(requests) == 24
    assert [request.arrival_s for request in requests] == arrivals_s
    assert [request.input_tokens for request in requests] == [t.prompt_tokens for t in turns]
    assert [request.output_tokens for request in requests] == [t.max_tokens for t in turns]
    assert max(request.input_tokens for request in requests) <= 8192
    shared = 0
    for (a, turn_a), (b, turn_b) in itertools.combinations(zip(requests, turns, strict=True), 2):
        tokens = common(turn_a.prompt.tolist(), turn_b.prompt.tolist())
        assert common(a.blocks, b.blocks) == tokens // BLOCK_TOKENS
        shared += tokens
    assert shared > 0


def test_the_seed_and_the_rate_are_the_rows(row, trace, tmp_path):
    def arrivals(**changes):
        workload = Workload.parse(f"mooncake:{trace}")
        comparison = comparison_of(row | changes, workload, 60.0)
        return [r.arrival_s for r in requests_of(only_load(comparison, tmp_path))]

    assert arrivals() != arrivals(seed=6)
    assert arrivals(rate=2.0)[:12] == pytest.approx([2 * when for when in arrivals()[:12]])


def test_a_trace_that_is_made_is_the_clients(row, tmp_path):
    comparison = comparison_of(row, Workload.parse("tool_agent"), 60.0)
    load = only_load(comparison, tmp_path)
    turns, _ = client_side(dataclasses.replace(load))
    assert [r.input_tokens for r in requests_of(load)] == [t.prompt_tokens for t in turns]


def test_blocks_are_equal_only_behind_equal_ones():
    blocks = PromptBlocks()
    a = np.arange(3 * BLOCK_TOKENS + 5, dtype=np.int32)
    b = a.copy()
    b[0] = 7
    assert len(blocks.of(a)) == 3
    assert blocks.of(a) == blocks.of(a[: 3 * BLOCK_TOKENS])
    assert not set(blocks.of(a)) & set(blocks.of(b))


def test_every_row_gets_a_line_and_every_point_a_table(row, simulate, capsys):
    rows = [row, row | {"policy": "turns", "goodput": 3.0}, row | {"error": "no server"}]
    code, lines = simulate(rows)
    assert code == 0
    assert [line["policy"] for line in lines] == ["adaptive", "turns"]
    for line, measured in zip(lines, rows, strict=False):
        assert (line["workload"], line["rate"], line["slo_tbt_ms"]) == (row["workload"], 4.0, 50.0)
        assert line["measured"]["goodput"] == measured["goodput"]
        assert line["window"]["environment"] == {"commit": "abc"}
        simulated = line["simulated"]
        assert simulated["requests"] == simulated["completed"] == 24
        assert simulated["cached_share"] > 0.2
        assert line["goodput_error"] == pytest.approx(
            simulated["goodput"] / measured["goodput"] - 1
        )
        assert line["attainment_error"] == pytest.approx(simulated["attainment"] / 0.9 - 1)
    printed = capsys.readouterr().out
    assert "TBT 50 ms, 4 requests/s" in printed
    assert "over 2 windows" in printed
    assert "points with several policies" in printed
    assert "1 rows have no result" in printed


def test_the_same_rows_give_the_same_lines(row, simulate):
    simulate([row])
    _, lines = simulate([row])
    assert lines[0] == lines[1]


def test_what_a_server_learnt_in_one_window_is_known_in_the_next(row, simulate):
    _, lines = simulate([row, row, row | {"server": 2}], "--noise", "0.2")
    assert lines[0]["simulated"] == lines[2]["simulated"]
    assert lines[0]["simulated"] != lines[1]["simulated"]


def slow_decode(machine, factor):
    """A timeline of steps alone, each of which took `factor` times what the profile says."""
    whole = machine.table.whole
    timeline = Timeline()
    for place in range(300):
        shape = DecodeShape(1 + place % 8, 1000 * (1 + place % 8))
        took_s = factor * machine.model.decode(shape, whole, None).expected_s
        timeline.add(LaneRun(Phase.DECODE, whole, Span(place, place + took_s), 1, 1, decode=shape))
    return as_json(TimelineWindow.of_pages([timeline.page(300.0, 400.0, 1000)], SMS))


def test_launches_take_as_long_as_they_did_in_the_windows(row, simulate, profile, tmp_path):
    folder = tmp_path / "timelines"
    folder.mkdir()
    machine = load_machine(profile)
    (folder / "slow.json").write_text(json.dumps(slow_decode(machine, 2.0)))
    row = row | {"policy": "turns", "timeline": "slow.json"}
    _, plain = simulate([row], "--noise", "0")
    _, (_, slow) = simulate([row], "--noise", "0", "--timelines", str(folder))
    assert (plain[0]["times"], slow["times"]) == ("profile", "timelines")
    ratio = slow["simulated"]["tbt_p50_ms"] / plain[0]["simulated"]["tbt_p50_ms"]
    assert ratio == pytest.approx(2.0, rel=0.1)


def test_the_host_pauses_when_it_did(row, simulate, profile, tmp_path):
    machine = load_machine(profile)
    calm = slow_decode(machine, 1.0)
    paused = json.loads(json.dumps(calm))
    for place, run in enumerate(paused["runs"]):
        run["end_ms"], run["unnoticed_ms"] = 100.0 * place, 60.0
    for name, timeline in (("calm.json", calm), ("paused.json", paused)):
        (tmp_path / name).write_text(json.dumps(timeline))
    rows = [row | {"policy": "turns", "timeline": name} for name in ("calm.json", "paused.json")]
    _, lines = simulate(rows, "--noise", "0", "--timelines", str(tmp_path))
    quiet, busy = (line["simulated"]["tbt_p99_ms"] for line in lines)
    assert busy > 60.0 > quiet


def test_pauses_are_where_ends_went_unnoticed_for_long():
    late = [(10.0, 3.0), (20.0, 15.0), (50.0, 5.0), (30.0, 9.0)]
    runs = [{"end_ms": end_ms, "unnoticed_ms": late_ms} for end_ms, late_ms in late]
    pauses = host_pauses({"runs": runs})
    assert [(pause.start_s, pause.end_s) for pause in pauses] == [(0.020, 0.039), (0.050, 0.055)]


def test_a_timeline_is_read_as_it_was_lived(profile):
    table = load_machine(profile).table
    split = table[1]
    lived = [
        LaneRun(
            Phase.PREFILL,
            split,
            Span(1.0, 1.25),
            2,
            700,
            layers=3,
            decode=DecodeShape(4, 900),
            prefill=PrefillShape(700, 250_000, 10),
        ),
        LaneRun(
            Phase.DECODE,
            table.whole,
            Span(1.5, 1.75),
            5,
            69,
            fused_tokens=64,
            decode=DecodeShape(5, 40),
            prefill=PrefillShape(64, 4096, 0),
        ),
    ]
    timeline = Timeline()
    for run in lived:
        timeline.add(run)
    shown = as_json(TimelineWindow.of_pages([timeline.page(2.0, 10.0, 10)], SMS))
    read = [dataclasses.replace(run, span=Span(0, 0)) for run in runs_of(shown, table)]
    assert read == [dataclasses.replace(run, span=Span(0, 0)) for run in lived]
    assert [run.span.duration_s for run in runs_of(shown, table)] == pytest.approx([0.25, 0.25])


@pytest.mark.parametrize(
    ("timeline", "content", "message"),
    [
        ("gone.json", None, "gone.json"),
        (None, None, "names none"),
        ("bad.json", "{", "bad.json"),
        ("foreign.json", '{"runs": [{"partition": "p7/d1"}]}', "no partition p7/d1"),
    ],
)
def test_a_timeline_that_cannot_be_used_is_named(
    row, simulate, tmp_path, capsys, timeline, content, message
):
    if content is not None:
        (tmp_path / timeline).write_text(content)
    code, lines = simulate([row | {"timeline": timeline}], "--timelines", str(tmp_path))
    assert (code, lines) == (1, [])
    assert message in capsys.readouterr().err


def test_the_servers_flags_count(row, simulate):
    flags = [*row["server_flags"], "--max-running-requests", "1"]
    _, lines = simulate(
        [row | {"policy": "turns"}, row | {"policy": "turns", "server_flags": flags}]
    )
    free, narrow = (line["simulated"] for line in lines)
    assert narrow["ttft_p99_ms"] > free["ttft_p99_ms"]


def test_what_has_not_ended_when_the_client_stops_is_a_miss(row, simulate):
    busy = row | {"policy": "turns", "rate": 12.0}
    _, (line,) = simulate([busy], "--drain-seconds", "0")
    _, (_, said) = simulate([busy | {"drain_seconds": 0.0}])
    assert said == line
    simulated = line["simulated"]
    assert simulated["requests"] == 72
    assert simulated["unfinished"] > 0
    assert simulated["completed"] + simulated["unfinished"] == 72
    assert simulated["attainment"] <= simulated["completed"] / 72


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"workload": "mooncake:other.jsonl.gz"}, "the rows have mooncake:other.jsonl.gz"),
        ({"launches": {"whole": 1, "p5/d3": 2}}, "p5/d3"),
        ({"policy": "static:5/3"}, "no partition 5/3"),
        ({"server_flags": ["--no-such-flag"]}, "server_flags"),
        ({"benchmark": "serve_trace"}, "rows.jsonl:1: not a row of benchmark.policies"),
        ({"error": "the server had left"}, "no row has a result"),
        ({"seconds": 60.0}, "ask for 240"),
    ],
)
def test_a_row_that_cannot_be_simulated_is_named(row, simulate, capsys, changes, message):
    code, lines = simulate([row | changes])
    assert (code, lines) == (1, [])
    assert message in capsys.readouterr().err


def test_flags_are_checked(capsys):
    given = ["--rows", "r", "--profile", "p", "--out", "o", "--workload", "tool_agent"]
    for flag, value in (("--noise", "-1"), ("--kv-tokens", "0"), ("--workload", "other")):
        with pytest.raises(SystemExit):
            parse([*given, flag, value])
        assert flag in capsys.readouterr().err


def _line(policy, measured, simulated, rate=1.0, commit="c"):
    return {
        "window": {"environment": {"commit": commit}},
        "policy": policy,
        "workload": "w",
        "slo_tbt_ms": 50.0,
        "rate": rate,
        "measured": {"goodput": measured, "attainment": 1.0},
        "simulated": {"goodput": simulated, "attainment": 1.0},
        "goodput_error": simulated / measured - 1 if measured else None,
    }


def test_a_tie_may_be_ranked_either_way_and_nothing_else():
    assert swapped([_line("a", 2.0, 1.0), _line("b", 1.95, 1.5)]) == []
    assert swapped([_line("a", 1.9, 1.5), _line("b", 2.0, 1.0)]) == [("b", "a")]
    assert swapped([_line("a", 2.0, 1.0), _line("b", 1.0, 1.0)]) == [("a", "b")]
    assert swapped([_line("a", 0.0, 1.0), _line("b", 0.0, 2.0)]) == []


def test_the_table_says_how_far_apart_and_where_the_ranking_differs():
    lines = [
        _line("a", 2.0, 2.2),
        _line("b", 1.0, 0.7),
        _line("a", 1.0, 1.0, rate=2.0),
        _line("b", 2.0, 0.9, rate=2.0),
        _line("c", 0.0, 0.1, rate=3.0),
    ]
    text = render(lines)
    assert "median error 20.0%, largest 55.0%, over 4 windows" in text
    assert "1 windows had a measured goodput of 0" in text
    assert "same ranking at 1 of 2 points" in text
    assert "ranking differs: b is not above a" in text
    assert "b       2.000     0.900      1 -> 2  -55.0%" in text


def test_windows_of_different_commits_are_not_ranked_among_each_other():
    text = render([_line("a", 2.0, 1.0), _line("b", 1.0, 2.0, commit="d"), _line("c", 0.5, 0.5)])
    assert "1 requests/s, commit d: goodput" in text
    assert "same ranking at 1 of 1 points" in text


def test_the_servers_own_count_is_of_this_window():
    before = {"finished": 10, "met": 5, "met_ttft": 6, "met_tbt": 7}
    after = {"finished": 20, "met": 14, "met_ttft": 16, "met_tbt": 16}
    row = {"slo_tbt_ms": 50.0, "server_slo": {"before": before, "after": after}}
    shares = {
        "server_attainment": 0.9,
        "server_attainment_ttft": 1.0,
        "server_attainment_tbt": 0.9,
    }
    assert server_count(row) == shares
    row["server_slo"]["tbt_ms"] = 50.0
    assert server_count(row) == shares
    assert server_count(row | {"slo_tbt_ms": 25.0}) == {}
    assert server_count({"server_slo": {"before": None, "after": after}}) == {}
    assert server_count({}) == {}
