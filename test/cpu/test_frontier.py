"""The frontier: what is measured on virtual lanes, and how a choice is judged."""

from __future__ import annotations

import pytest
import torch

from benchmark.frontier import Surveyor, choices, draw, fused_tokens, parse, report
from benchmark.frontier_baseline import Baseline
from benchmark.frontier_ways import Way, best_within, judge, turns
from drift_scheduler.dispatcher import Forecast
from drift_scheduler.lane_virtual import TimedWork, VirtualClock, VirtualLanes
from drift_scheduler.partition import Partition, PartitionTable
from drift_scheduler.policies.modes import Choice, Mode
from drift_scheduler.shapes import DecodeShape, PrefillShape
from sglang.srt.benchmarks.one_batch.batches import Placement
from sglang.srt.benchmarks.one_batch.cases import DecodeCase, PrefillCase
from sglang.srt.benchmarks.one_batch.measure import Bench, Distribution, Repetitions
from sglang.srt.errors import ConfigError

SPLIT = Partition(1, 100, 32)
TABLE = PartitionTable(132, (SPLIT,))
DECODE, PREFILL = DecodeCase(2, 8), PrefillCase(100, 4)
LAYERS = 4


class TimedRun:
    """Twice as slow on a split. A fused step takes 10 us more for each prompt token."""

    indivisible = False

    def __init__(self, batch):
        self.batch = batch

    def slice_work(self, lane, first, last):
        tokens = len(self.batch.input_ids)
        run_s = tokens * 1e-3 if self.batch.decode_reqs == 0 else 4e-3 + tokens * 1e-5
        slower = 1 if lane.partition.exclusive else 2
        return TimedWork((last - first) / LAYERS * run_s * slower)

    def tokens(self):
        return []


class TimedRunner:
    num_layers = LAYERS

    def start(self, batch):
        return TimedRun(batch)


@pytest.fixture
def clock():
    return VirtualClock()


@pytest.fixture
def lanes(clock):
    return VirtualLanes(TABLE, clock)


@pytest.fixture
def frontier(lanes, clock):
    def wait():
        end_s = lanes.next_completion_s()
        assert end_s is not None, "waiting for nothing"
        clock.advance_to(end_s)

    placement = Placement(
        torch.zeros(4, 128, dtype=torch.int32),
        num_slots=200,
        page_size=1,
        decode_rows=2,
        vocab_size=9,
        seed=0,
    )
    bench = Bench(TimedRunner(), Repetitions(4, 2, 1), wait)
    notes = []
    found = Surveyor(bench, lanes, placement, slice_layers=2).survey(DECODE, PREFILL, notes.append)
    assert notes[:2] == ["2x8: alone", "2x8: split p100/d32"]
    return found


def test_all_ways_are_measured(frontier):
    assert frontier.solo_ms == pytest.approx(4.0)
    assert frontier.prefill_ms == pytest.approx(100.0)
    by_name = {str(way): way for way in frontier.ways}
    split = by_name["split p100/d32"]
    assert (split.step_ms, split.rate) == (pytest.approx(8.0), pytest.approx(500.0))
    fused = by_name["fused 62"]
    assert fused.step_ms == pytest.approx(4.62)
    assert fused.rate == pytest.approx(62 / 4.62e-3)
    assert by_name["turns of 1 layers"].step_ms == pytest.approx(29.0)
    assert by_name["turns of 4 layers"].rate == pytest.approx(100 / 0.104)
    assert len(by_name) == len(frontier.ways) == 1 + 2 + LAYERS


def test_fused_sizes_are_those_the_dispatcher_chooses_among():
    assert fused_tokens(DecodeCase(2, 8), PrefillCase(300)) == [62, 126, 254, 300]
    assert fused_tokens(DecodeCase(128, 8), PrefillCase(300)) == [128, 256, 300]


def test_shapes_are_what_a_latency_model_is_asked_about(frontier):
    assert frontier.shapes == (DecodeShape(2, 16), PrefillShape(100, 10_000, 400))


def test_turns_add_up():
    step = Distribution(median=10.0, p10=10.0, p90=11.0, largest=12.0, count=9)
    prefill = Distribution(median=40.0, p10=40.0, p90=44.0, largest=44.0, count=3)
    ways = turns(step, prefill, 1000, 4)
    assert [way.step_ms for way in ways] == [20.0, 30.0, 40.0, 50.0]
    assert [way.slowest_ms for way in ways] == [23.0, 34.0, 45.0, 56.0]
    assert ways[1].rate == pytest.approx(500 / 0.03)


WAYS = [
    Way("split", "p100/d32", 12.0, 13.0, 900.0),
    Way("fused", "whole", 14.0, 15.0, 1000.0, fused_tokens=62),
    Way("turns", "whole", 30.0, 31.0, 1500.0, layers=3),
]
FUSED = Choice(Mode.FUSED, TABLE.whole, 1100.0, Forecast(0.014, 0.016), fused_tokens=62)


class TestJudge:
    def test_the_best_is_the_fastest_in_time(self):
        assert best_within(WAYS, 14.0) is WAYS[0]
        assert best_within(WAYS, 15.0) is WAYS[1]
        assert best_within(WAYS, 12.9) is None  # in time at the median only

    def test_a_choice_is_worth_its_measured_rate(self):
        row = judge(WAYS, FUSED, 31.0)
        assert row["ratio"] == pytest.approx(1000 / 1500)
        assert (row["choice"], row["best"]) == ("fused 62", "turns of 3 layers")
        assert (row["forecast_rate"], row["in_time"]) == (1100.0, True)

    def test_a_choice_that_is_late_says_so(self):
        row = judge(WAYS, FUSED, 14.0)
        assert not row["in_time"]
        assert row["ratio"] > 1

    def test_no_choice(self):
        assert judge(WAYS, None, 14.0)["ratio"] == 0
        assert judge(WAYS, None, 5.0)["ratio"] is None

    def test_splits_and_turns_are_found_too(self):
        split = Choice(Mode.SPLIT, SPLIT, 1.0, FUSED.step)
        assert judge(WAYS, split, 20.0)["choice"] == "split p100/d32"
        taking_turns = FUSED._replace(mode=Mode.TURNS, fused_tokens=0, layers=3)
        assert judge(WAYS, taking_turns, 40.0)["ratio"] == 1


class PerfectModel:
    """Knows the times of TimedRun."""

    def decode(self, shape, partition, beside):
        took_s = 4e-3 * (1 if partition.exclusive else 2)
        return Forecast(took_s, took_s)

    def prefill(self, shape, partition, beside):
        took_s = shape.tokens * 1e-3 * (1 if partition.exclusive else 2)
        return Forecast(took_s, took_s)

    def fused(self, decode, prefill):
        took_s = 4e-3 + prefill.tokens * 1e-5
        return Forecast(took_s, took_s)


def test_a_perfect_model_chooses_the_best(frontier, lanes):
    rows = list(choices(frontier, PerfectModel(), lanes, LAYERS))
    assert [row["deadline_steps"] for row in rows] == [1.3, 1.6, 2.0, 3.0, 5.0]
    assert all(row["ratio"] == pytest.approx(1.0) and row["in_time"] for row in rows)
    assert rows[0]["choice"] == "fused 100"
    text = report([frontier], rows)
    assert "split p100/d32" in text
    assert "fused 100 for fused 100, 1.00 of the best rate in time" in text


def test_without_a_way_in_time_the_gentlest_split_is_judged(frontier, lanes):
    class Pessimist(PerfectModel):
        def decode(self, shape, partition, beside):
            return Forecast(4e-3, 1.0)

        def fused(self, decode, prefill):
            return Forecast(4e-3, 1.0)

    row = next(choices(frontier, Pessimist(), lanes, LAYERS))
    assert (row["hopeless"], row["choice"]) == (True, "split p100/d32")
    assert not row["in_time"]
    assert "late, expected to be late" in report([frontier], [row])


def test_the_picture_is_drawn(frontier, tmp_path):
    path = tmp_path / "pictures" / "frontier.png"
    draw([frontier, frontier], path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_the_default_cases_are_the_reference_ones():
    given = parse(["--model", "m", "--out", "o"])
    assert DecodeCase(128, 2048) in given.decode
    assert given.prefill == PrefillCase(4096, 4096)
    with pytest.raises(SystemExit):
        parse(["--model", "m", "--out", "o", "--decode", "8"])


class TestBaseline:
    TEXT = '{"what": "theirs", "prefill": "100+4", "frontiers": {"2x8": [[10, 100], [20, 300]]}}'

    def load(self, tmp_path, text=TEXT):
        path = tmp_path / "baseline.json"
        path.write_text(text)
        return Baseline.load(path)

    def test_rates_lie_on_the_line(self, tmp_path):
        baseline = self.load(tmp_path)
        steps = (9.9, 10.0, 15.0, 20.0, 99.0)
        assert [baseline.rate("2x8", step) for step in steps] == [None, 100, 200, 300, 300]
        assert baseline.rate("3x8", 15.0) is None

    def test_the_report_compares_splits(self, tmp_path, frontier):
        text = report([frontier], [], self.load(tmp_path))
        split = next(way for way in frontier.ways if way.mode == "split")
        rate = self.load(tmp_path).rate("2x8", split.step_ms)
        gain = "a shorter step" if rate is None else f"{split.rate / rate - 1:+.0%}"
        assert "theirs" in text.splitlines()[0]
        assert [gain in line for line in text.splitlines() if "split" in line] == [True]
        assert all("%" not in line for line in text.splitlines() if "fused" in line)

    @pytest.mark.parametrize(
        ("text", "why"),
        [
            ("{", "truncated"),
            ('{"what": "x"}', "prefill"),
            (TEXT.replace("[10,", "[30,"), "2x8: steps must rise"),
        ],
    )
    def test_what_is_wrong_is_named(self, tmp_path, text, why):
        with pytest.raises(ConfigError, match=why):
            self.load(tmp_path, text)

    def test_a_missing_file_is_named(self, tmp_path):
        with pytest.raises(ConfigError, match=r"nothing\.json"):
            Baseline.load(tmp_path / "nothing.json")
