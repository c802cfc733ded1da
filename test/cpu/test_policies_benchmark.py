"""The comparison of policies: its plan, its run against a fake server, its rows and its table."""

from __future__ import annotations

import dataclasses
import gzip
import itertools
import json
from pathlib import Path

import pytest

from benchmark.host_pauses import Pauses
from benchmark.policies import main, parse
from benchmark.policy_plan import START_S, WINDOW_OVERHEAD_S, Comparison, Point, Workload
from benchmark.policy_run import Run, clock_mhz, judged, measured, noticed_late_ms
from benchmark.policy_table import margin, render
from benchmark.server_process import ServerError
from benchmark.trace_load import LaneUse, LoadError, TraceLoad, run_bench
from sglang.bench.datasets.mooncake import read_trace
from sglang.bench.errors import BenchError
from sglang.bench.goodput import Objectives, evaluate, request_gap_p99_ms
from sglang.bench.records import Answer, RequestRecord

POLICIES = ("adaptive", "table", "chunked:512")
LANES = {
    "prefill_busy_s": 1.0,
    "decode_busy_s": 2.0,
    "both_busy_s": 0.5,
    "fused_busy_s": 0.25,
    "host_allowance_s": 0.002,
    "partitions": [
        {"exclusive": True, "prefill_sms": 132, "decode_sms": 132, "launches": 5},
        {"exclusive": False, "prefill_sms": 84, "decode_sms": 48, "launches": 7},
    ],
}
THREAD = {"cpu_s": 1.0, "waited_s": 0.5}


def write_trace(path, rows, input_length=10):
    lines = [json.dumps({"input_length": input_length, "output_length": 3}) for _ in range(rows)]
    path.write_bytes(gzip.compress("\n".join(lines).encode()))
    return path


@pytest.fixture
def trace(tmp_path):
    return write_trace(tmp_path / "lengths.jsonl.gz", 200)


@pytest.fixture
def comparison(trace):
    return Comparison(
        workloads=(Workload.parse(f"sharegpt_lengths:{trace}"),),
        policies=POLICIES,
        rates=(1.0, 2.0),
        tbts_ms=(50.0, 25.0),
        seconds=60.0,
        warm_up_seconds=10.0,
        drain_seconds=30.0,
        max_input_len=1000,
        ttft_ms=1000.0,
        ttft_ms_per_token=0.5,
        seed=3,
    )


def bench_result(**changes):
    """Ten requests in ten seconds: eight answers, six of them in time, gaps from 10 to 80 ms."""
    return {
        "completed": 8,
        "failed": 2,
        "interrupted": False,
        "duration": 10.0,
        "median_ttft_ms": 300.0,
        "p99_ttft_ms": 900.0,
        "median_itl_ms": 20.0,
        "p99_itl_ms": 40.0,
        "client_max_start_lag_ms": 1.0,
        "output_throughput": 100.0,
        "cache_report": {"total_prompt_tokens": 1000, "total_cached_tokens": 400},
        "input_lens": [4000] * 10,
        "cached_tokens": [0] * 5 + [2000, 2000, None, 0, 0],
        "ttfts": [2.0] * 5 + [0.9, 1.1, 2.1, 0.0, 0.0],
        "itl_p99s_ms": [10.0, 20.0, 30.0, 40.0, 50.0, 60.0, 70.0, 80.0, 0.0, 0.0],
        "errors": [""] * 8 + ["refused", "broken off"],
    } | changes


class FakeTarget:
    """Notes what it is asked. fails: (policy, call) -> exception."""

    def __init__(self, log, fails=None):
        self.log = log
        self.fails = fails or {}
        self.ready_s = 30.0
        self.running = True
        self.policy = None

    def choose(self, policy):
        self.policy = policy
        self.log.append(("choose", policy))
        self._fail("choose")

    def state(self):
        return {
            "pd_multiplex": LANES,
            "engine_thread": THREAD,
            "driver_allocations": None,
            "slo": {"finished": len(self.log)},
        }

    def bench(self, load, limit_s):
        self.log.append(("bench", load.seconds, load.seed))
        self._fail("bench")
        return bench_result()

    def timeline(self, seconds):
        samples = [{"sm_clock_mhz": mhz} for mhz in (1980.0, None, 1410.0, 1500.0)]
        runs = [{"unnoticed_ms": 0.1}] * 98 + [{"unnoticed_ms": late} for late in (9.0, 17.0)]
        return {"seconds": seconds, "policy": self.policy, "samples": samples, "runs": runs}

    def last_words(self):
        return "out of memory"

    def _fail(self, call):
        error = self.fails.get((self.policy, call))
        if error == "dies":
            self.running = False
            raise LoadError("connection refused")
        if error is not None:
            raise error


class FakeHost:
    """Answers in turn as before a window and after it."""

    def __init__(self, answers=None):
        self.answers = itertools.cycle([Pauses([1.0]), Pauses([0.006, 0.02])])
        if answers is not None:
            self.answers = iter(answers)

    def take(self):
        return next(self.answers)


class TestPlan:
    def test_points_are_all_loads_in_the_order_given(self, comparison):
        other = Workload.parse("tool_agent")
        comparison = dataclasses.replace(comparison, workloads=(*comparison.workloads, other))
        places = [(point.workload.kind, point.rate) for point in comparison.points]
        assert places == [(w, r) for w in ("sharegpt_lengths", "tool_agent") for r in (1, 2)]

    def test_only_who_heeds_the_tbt_runs_for_each(self, comparison):
        comparison = dataclasses.replace(
            comparison, policies=("adaptive:split-only", "temporal", "static:84/48", "chunked:512")
        )
        assert [(window.policy, window.tbts_ms) for window in comparison.windows] == [
            ("adaptive:split-only", (50.0,)),
            ("adaptive:split-only", (25.0,)),
            ("temporal", (50.0,)),
            ("temporal", (25.0,)),
            ("static:84/48", (50.0, 25.0)),
            ("chunked:512", (50.0, 25.0)),
        ]

    def test_every_point_has_all_windows_in_its_own_order(self, comparison):
        orders = [comparison.order(point) for point in comparison.points]
        assert all(
            sorted(order, key=str) == sorted(comparison.windows, key=str) for order in orders
        )
        many = [
            dataclasses.replace(comparison, seed=seed).order(comparison.points[0])
            for seed in range(20)
        ]
        assert len({tuple(order) for order in many}) > 1
        assert orders == [comparison.order(point) for point in comparison.points]

    def test_all_policies_get_the_same_load_and_the_warm_up_another(self, comparison, tmp_path):
        point = comparison.points[1]
        load, warm_up = (
            make(point, 25.0, tmp_path) for make in (comparison.load, comparison.warm_up)
        )
        assert load == comparison.load(point, 25.0, tmp_path)
        assert (load.requests, load.seed, load.tbt_ms) == (120, 3, 25)
        assert (warm_up.requests, warm_up.seed) == (20, 4)
        without = dataclasses.replace(comparison, warm_up_seconds=0)
        assert without.warm_up(point, 25.0, tmp_path) is None

    def test_a_tool_agent_trace_is_made_once_for_its_rate(self, comparison, tmp_path):
        comparison = dataclasses.replace(comparison, max_input_len=32768)
        point = Point(Workload.parse("tool_agent"), 2.0)
        load = comparison.load(point, 50.0, tmp_path)
        assert len(read_trace(str(load.trace))) == load.requests == 120
        written_ns = load.trace.stat().st_mtime_ns
        assert comparison.load(point, 25.0, tmp_path).trace.stat().st_mtime_ns == written_ns

    def test_a_budget_keeps_whole_points(self, comparison):
        assert comparison.point_s == 4 * (60.0 + 10.0 + WINDOW_OVERHEAD_S)
        assert comparison.fitting(START_S + 1.5 * comparison.point_s) == 1
        assert comparison.fitting(1e9) == 2
        assert comparison.fitting(START_S) == 0
        assert comparison.fitting(comparison.point_s, started=True) == 1
        first, *dropped = comparison.budget_lines(START_S + 1.5 * comparison.point_s)
        assert "room for 4 of 8 windows" in first
        assert [line.strip() for line in dropped] == [
            "not measured: sharegpt_lengths:lengths.jsonl.gz, 2 requests/s",
        ]

    def test_a_trace_that_is_too_short_is_refused(self, comparison, tmp_path):
        comparison.check()
        with pytest.raises(BenchError, match=r"200 requests are no longer .* ask for 600"):
            dataclasses.replace(comparison, rates=(10.0,)).check()
        with pytest.raises(BenchError, match="0 requests are no longer"):
            dataclasses.replace(comparison, max_input_len=5).check()
        with pytest.raises(BenchError, match="tool_agent needs at least"):
            dataclasses.replace(comparison, workloads=(Workload("tool_agent"),)).check()

    def test_a_policy_that_does_not_exist_is_refused(self, comparison):
        with pytest.raises(BenchError, match="--policy: expected one of adaptive"):
            dataclasses.replace(comparison, policies=("adaptive", "best")).check()

    @pytest.mark.parametrize("text", ["mooncake", "mooncake:", "tool_agent:x", "nothing:file"])
    def test_unknown_workloads(self, text):
        with pytest.raises(ValueError, match="expected mooncake:FILE"):
            Workload.parse(text)


def rows_of(comparison, tmp_path, target, **options):
    log = target.log
    replacements = []

    def start():
        replacements.append(FakeTarget(log))
        return replacements[-1]

    host = options.pop("host", None) or FakeHost()
    run = Run(comparison, start, tmp_path, {"model": "m"}, host, **options)
    return list(run.rows(target)), replacements


class TestRun:
    def test_timelines_are_kept_if_wanted(self, comparison, tmp_path):
        folder = tmp_path / "timelines"
        folder.mkdir()
        rows, _ = rows_of(comparison, tmp_path, FakeTarget([]), timelines=folder)
        kept = {row["timeline"]: row["policy"] for row in rows}
        assert len(kept) == 8
        for name, policy in kept.items():
            timeline = json.loads((folder / name).read_text())
            assert timeline["policy"] == policy
            assert timeline["client"]["ttfts"] == bench_result()["ttfts"]

    def test_the_clock_of_a_window_is_the_middle_one(self, comparison, tmp_path):
        rows, _ = rows_of(comparison, tmp_path, FakeTarget([]))
        assert {row["sm_clock_mhz"] for row in rows} == {1500.0}
        assert clock_mhz({"samples": [{"sm_clock_mhz": None}]}) is None

    def test_what_held_the_server_up_is_told_apart(self, comparison, tmp_path):
        rows, _ = rows_of(comparison, tmp_path, FakeTarget([]))
        for row in rows:
            assert row["host_pauses"] == Pauses([0.006, 0.02]).to_json()
            late = row["noticed_late_ms"]
            assert (late["p50"], late["longest"]) == (0.1, 17.0)
            assert 9.0 < late["p99"] < 17.0
        assert noticed_late_ms({"runs": []}) is None

    def test_a_host_that_says_nothing_costs_no_window(self, comparison, tmp_path):
        host = FakeHost(itertools.repeat(None))
        rows, _ = rows_of(comparison, tmp_path, FakeTarget([]), host=host)
        assert len(rows) == 12
        assert all("error" not in row and row["host_pauses"] is None for row in rows)

    def test_windows_switch_warm_up_and_measure(self, comparison, tmp_path):
        log = []
        rows, replacements = rows_of(comparison, tmp_path, FakeTarget(log))
        assert not replacements
        windows = [window for point in comparison.points for window in comparison.order(point)]
        chosen = [entry[1] for entry in log if entry[0] == "choose"]
        assert chosen == [window.policy for window in windows]
        expected = [(window.policy, tbt_ms) for window in windows for tbt_ms in window.tbts_ms]
        assert [(row["policy"], row["slo_tbt_ms"]) for row in rows] == expected
        assert len(rows) == 12
        assert log[:3] == [("choose", chosen[0]), ("bench", 10.0, 4), ("bench", 60.0, 3)]
        assert all("error" not in row and row["server"] == 1 for row in rows)
        assert rows[0]["model"] == "m"
        assert rows[0]["drain_seconds"] == 30.0
        assert rows[0]["ready_s"] == 30.0

    def test_rows_of_one_window_differ_in_what_they_are_judged_by(self, comparison, tmp_path):
        rows, _ = rows_of(comparison, tmp_path, FakeTarget([]))
        first, second = [r for r in rows if (r["policy"], r["rate"]) == ("table", 1.0)]
        assert (first["slo_tbt_ms"], second["slo_tbt_ms"]) == (50.0, 25.0)
        assert (first["attainment"], second["attainment"]) == (0.5, 0.2)
        differing = {key for key in first if first[key] != second[key]}
        assert differing == {"slo_tbt_ms", "attainment", "attainment_tbt", "goodput"}
        assert first["server_slo"]["tbt_ms"] == 50.0

    def test_a_window_that_fails_is_a_row(self, comparison, tmp_path):
        fails = {
            ("table", "choose"): ServerError("HTTP 400: no table"),
            ("chunked:512", "bench"): LoadError("timed out"),
        }
        rows, replacements = rows_of(comparison, tmp_path, FakeTarget([], fails))
        errors = {row["policy"]: row.get("error") for row in rows}
        assert errors == {
            "adaptive": None,
            "table": "ServerError: HTTP 400: no table",
            "chunked:512": "LoadError: timed out",
        }
        assert len(rows) == 12
        assert not replacements

    def test_a_dead_server_is_replaced_and_its_last_words_are_kept(self, comparison, tmp_path):
        rows, replacements = rows_of(
            comparison, tmp_path, FakeTarget([], {("adaptive", "bench"): "dies"})
        )
        assert len(replacements) == 1
        (failed,) = [row for row in rows if "error" in row]
        assert failed["policy"] == "adaptive"
        assert "out of memory" in failed["error"]
        at = rows.index(failed)
        assert [row["server"] for row in rows] == [1] * (at + 1) + [2] * (11 - at)

    def test_a_budget_leaves_points_out(self, comparison, tmp_path, capsys):
        budget_s = START_S + 1.5 * comparison.point_s
        rows, _ = rows_of(comparison, tmp_path, FakeTarget([]), budget_s=budget_s)
        assert {row["rate"] for row in rows} == {1}
        budget_s = START_S + 2.5 * comparison.point_s
        slow_clock = iter([0.0, 0.0, 0.9 * budget_s])
        rows, _ = rows_of(
            comparison, tmp_path, FakeTarget([]), budget_s=budget_s, clock=lambda: next(slow_clock)
        )
        assert {row["rate"] for row in rows} == {1}
        assert "not measured: " in capsys.readouterr().out


class TestMeasured:
    load = TraceLoad(Path("t"), 2.0, 10.0, 100)

    def test_shares_and_rates(self):
        after = json.loads(json.dumps(LANES))
        after["prefill_busy_s"] += 4.0
        after["both_busy_s"] += 3.0
        after["fused_busy_s"] += 1.0
        after["partitions"][1]["launches"] += 11
        row = measured(
            self.load,
            bench_result(),
            {
                "pd_multiplex": LANES,
                "engine_thread": THREAD,
                "driver_allocations": {"device": 40, "pinned": 7},
                "slo": 1,
            },
            {
                "pd_multiplex": after,
                "engine_thread": {"cpu_s": 3.0, "waited_s": 0.7},
                "driver_allocations": {"device": 43, "pinned": 7},
                "slo": 2,
            },
        )
        assert row["requests"] == 10
        assert row["prefill_tokens_per_s"] == pytest.approx(60.0)
        assert row["cached_share"] == pytest.approx(0.4)
        assert row["prefill_busy_share"] == pytest.approx(0.4)
        assert row["both_busy_share"] == pytest.approx(0.3)
        assert row["fused_share"] == pytest.approx(0.1)
        assert row["host_allowance_ms"] == 2.0
        assert row["engine_cpu_share"] == pytest.approx(2.0 / row["duration_s"])
        assert row["engine_waited_share"] == pytest.approx(0.2 / row["duration_s"])
        assert row["driver_allocations"] == {"device": 3, "pinned": 0}
        assert row["launches"] == {"whole": 0, "p84/d48": 11}
        assert row["server_slo"] == {"tbt_ms": 50.0, "before": 1, "after": 2}

    def test_a_request_is_good_if_it_came_in_time_and_smoothly(self):
        row = judged(self.load, bench_result())
        assert row == {
            "attainment": 0.5,
            "attainment_ttft": 0.6,
            "attainment_tbt": 0.5,
            "goodput": 0.5,
        }
        stricter = judged(dataclasses.replace(self.load, tbt_ms=25.0), bench_result())
        assert (stricter["attainment"], stricter["attainment_ttft"]) == (0.2, 0.6)

    def test_verdicts_are_those_of_the_client(self, tmp_path):
        """On records which the client evaluates itself, with the limits that it is given."""
        answers = [
            Answer(
                0.0, ttft, 9.0, chunk_gaps_s=[gap] * 5, chunk_tokens=[1] * 5, cached_tokens=cached
            )
            for ttft, gap, cached in itertools.product(
                (0.5, 1.0, 1.2, 2.0, 2.1), (0.02, 0.05, 0.06), (0, 1700, 4000, None)
            )
        ]
        answers.append(Answer(0.0, error="refused"))
        records = [RequestRecord(i, 0, 0.0, 4000, answer) for i, answer in enumerate(answers)]
        limits = Objectives(ttft_ms=1000.0, ttft_per_token_ms=0.5, itl_p99_ms=50.0)
        expected = evaluate(records, limits, 10.0)
        result = {
            "completed": len(answers) - 1,
            "failed": 1,
            "interrupted": False,
            "duration": 10.0,
            "input_lens": [record.prompt_tokens for record in records],
            "cached_tokens": [record.answer.cached_tokens for record in records],
            "ttfts": [record.answer.ttft_s for record in records],
            "itl_p99s_ms": [request_gap_p99_ms(record) for record in records],
            "errors": [record.answer.error for record in records],
        }
        row = judged(self.load, result)
        assert row["attainment"] == expected.attainment
        assert row["attainment_ttft"] == expected.attainment_by_metric["ttft"]
        assert row["attainment_tbt"] == expected.attainment_by_metric["itl_p99"]
        assert row["goodput"] == expected.request_goodput
        assert 0 < row["attainment"] < min(row["attainment_ttft"], row["attainment_tbt"])

    def test_what_was_not_finished_is_a_miss(self):
        state = {
            "pd_multiplex": LANES,
            "engine_thread": {"cpu_s": 1.0, "waited_s": None},
            "driver_allocations": None,
        }
        result = bench_result(interrupted=True)
        row = measured(self.load, result, state, state) | judged(self.load, result)
        assert (row["requests"], row["unfinished"]) == (20, 10)
        assert row["attainment"] == pytest.approx(0.25)
        assert row["attainment_ttft"] == pytest.approx(0.3)
        assert "server_slo" not in row

    def test_no_answer_at_all_is_an_error(self):
        state = {
            "pd_multiplex": LANES,
            "engine_thread": {"cpu_s": 1.0, "waited_s": None},
            "driver_allocations": None,
        }
        result = bench_result(completed=0, failed=10, cache_report=None, errors=["refused"] * 10)
        row = measured(self.load, result, state, state) | judged(self.load, result)
        assert row["error"] == "no request completed"
        assert row["attainment"] == 0

    def test_lane_use_counts_what_was_added(self):
        use = LaneUse.between(LANES, LANES | {"decode_busy_s": 3.5})
        assert use.decode_busy_s == 1.5
        assert use.prefill_busy_s == 0


def table_row(policy, rate, attainment, **more):
    return {
        "policy": policy,
        "workload": "w",
        "slo_tbt_ms": 50.0,
        "rate": rate,
        "attainment": attainment,
        "goodput": attainment * rate,
    } | more


class TestTable:
    def test_the_best_of_a_column_is_marked_and_the_margin_told(self):
        rows = [
            table_row("table", 1.0, 0.9),
            table_row("adaptive", 1.0, 0.8),
            table_row("adaptive", 2.0, 0.75),
            table_row("table", 2.0, 0.5),
        ]
        title, header, adaptive, other, ahead = render(rows).splitlines()
        assert title.startswith("w, TBT 50 ms")
        assert header.split() == ["requests/s", "1", "2"]
        assert adaptive.split() == ["adaptive", "0.80", "(0.80)", "0.75", "(1.50)*"]
        assert other.split() == ["table", "0.90", "(0.90)*", "0.50", "(1.00)"]
        assert ahead.split()[-2:] == ["-0.10", "+0.25"]

    def test_a_failed_window_takes_no_part(self):
        failed = table_row("table", 1.0, 0.0, error="x")
        del failed["attainment"], failed["goodput"]
        rows = [failed, table_row("adaptive", 1.0, 0.8)]
        lines = render(rows).splitlines()
        assert lines[2].split() == ["adaptive", "0.80", "(0.80)*"]
        assert lines[3].split() == ["table", "error"]
        assert margin(rows) is None

    def test_each_service_level_has_its_own_table(self):
        rows = [table_row("a", 1.0, 1.0), table_row("a", 1.0, 0.5) | {"slo_tbt_ms": 25.0}]
        assert render(rows).count("TBT") == 2


class TestCommandLine:
    required = ("--model", "m", "--out", "o", "--workload", "tool_agent")

    @pytest.mark.parametrize(
        ("flags", "complaint"),
        [
            ("--policy a a", "--policy names one twice"),
            ("--policy a --rate 0", "--rate: must be above 0"),
            ("--policy a --seconds nan", "--seconds: must be a number"),
            ("--policy a --workload x", "--workload: expected mooncake:FILE"),
            ("--policy a --seed -1", "--seed must not be negative"),
        ],
    )
    def test_refusals_name_the_flag(self, flags, complaint, capsys):
        with pytest.raises(SystemExit):
            parse([*self.required, *flags.split()])
        assert complaint in capsys.readouterr().err

    def test_server_flags_follow_the_dashes(self):
        given = parse([*self.required, "--policy", "a", "--", "--context-length", "99"])
        assert given.server_flags == ["--context-length", "99"]

    def test_a_budget_in_which_nothing_fits_starts_no_server(self, capsys):
        assert main([*self.required, "--policy", "table", "--budget-minutes", "0.1"]) == 1
        captured = capsys.readouterr()
        assert "room for 0 of 1 windows" in captured.out
        assert "not one point fits" in captured.err


def test_a_client_that_ends_without_a_result_says_why():
    with pytest.raises(LoadError, match="--nonsense"):
        run_bench(["--nonsense"], 60.0, quiet=True)


def test_a_load_states_its_service_level_to_client_and_server():
    load = TraceLoad(Path("t"), 2.0, 10.0, 100, tbt_ms=25.0)
    assert load.slo == {"ttft_ms": 1000.0, "ttft_ms_per_token": 0.5, "tbt_ms": 25.0}
    flags = load.bench_flags()
    assert flags[flags.index("--goodput") + 1 :] == [
        "ttft:1000.0",
        "ttft_per_token:0.5",
        "itl_p99:25.0",
    ]
