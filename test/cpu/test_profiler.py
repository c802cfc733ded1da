"""What a profile measures and in what time, against a meter whose times follow a formula."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drift_scheduler.partition import Partition, PartitionTable
from drift_scheduler.profile import Kind, Split
from drift_scheduler.profile_grid import Effort, Limits, grid, held_out
from drift_scheduler.profile_pace import KEPT_ALONE, PACES, Costs, Pacer, schedule
from drift_scheduler.profiler import (
    MAX_PREFILL_RUNS,
    DecodeBatch,
    Measured,
    Point,
    PrefillBatch,
    Repetitions,
    measure,
)
from drift_scheduler.shapes import DecodeShape, PrefillShape

TOTAL_SMS = 132
TABLE = PartitionTable(
    TOTAL_SMS,
    tuple(Partition(i + 1, TOTAL_SMS - sms, sms) for i, sms in enumerate((16, 32, 48, 64, 80, 96))),
)
WHOLE = TABLE.whole
SPLIT = TABLE.splits[2]
H100 = Limits(prefill_tokens=8192, requests=256, pool_tokens=420_000, context_length=131_072)
SMALL = Limits(prefill_tokens=2048, requests=64, pool_tokens=4096, context_length=512, page_size=16)
ONCE = Repetitions(2, 1)


class FormulaMeter:
    """Times of an 8B model on an H100, roughly. Every run lets a clock go on by what it takes,
    `slower` times as long as is reported."""

    def __init__(self, slower: float = 1.0) -> None:
        self.now_s = 0.0
        self.slower = slower
        self.asked: list[tuple[str, Repetitions | int]] = []

    def clock(self) -> float:
        return self.now_s

    def step_s(self, partition: Partition, batch: DecodeBatch) -> float:
        shape = batch.shape
        whole_s = 6e-3 + 1e-5 * shape.requests + 5e-8 * shape.context
        return whole_s * math.sqrt(TOTAL_SMS / partition.decode_sms)

    def run_s(self, partition: Partition, batch: PrefillBatch) -> float:
        shape = batch.shape
        whole_s = 3e-3 + shape.tokens / 36e3 + 1e-9 * shape.cross
        return whole_s * TOTAL_SMS / partition.prefill_sms

    def decode(self, partition: Partition, batch: DecodeBatch, times: int) -> Measured:
        self.asked.append(("decode", times))
        seconds = self.step_s(partition, batch)
        self._pass((1 + times) * seconds)
        return Measured(seconds, 1980.0)

    def prefill(self, partition: Partition, batch: PrefillBatch, times: int) -> Measured:
        self.asked.append(("prefill", times))
        seconds = self.run_s(partition, batch)
        self._pass((1 + times) * seconds)
        return Measured(seconds, 1400.0, layers=32)

    def fused(self, decode: DecodeBatch, prefill: PrefillBatch, times: int) -> Measured:
        self.asked.append(("fused", times))
        seconds = self.step_s(WHOLE, decode) + self.run_s(WHOLE, prefill)
        self._pass((1 + times) * seconds)
        return Measured(seconds)

    def side_by_side(
        self,
        partition: Partition,
        decode: DecodeBatch,
        prefill: PrefillBatch,
        repetitions: Repetitions,
    ) -> tuple[Measured, Measured]:
        self.asked.append(("side by side", repetitions))
        step_s = 1.3 * self.step_s(partition, decode)
        run_s = 1.2 * self.run_s(partition, prefill)
        steps, runs = 1 + repetitions.decode_steps, 1.5 + repetitions.prefill_runs
        self._pass(max(steps * step_s, runs * run_s))
        return Measured(step_s), Measured(run_s, layers=32)

    def _pass(self, seconds: float) -> None:
        self.now_s += self.slower * seconds


class SlowMeter(FormulaMeter):
    """A small CPU: all of the time goes with tokens. Keeps the longest measurement."""

    def __init__(self, pace: float = 1.0) -> None:
        super().__init__()
        self.pace = pace
        self.longest_s = 0.0

    def step_s(self, partition: Partition, batch: DecodeBatch) -> float:
        return self.pace * (0.03 * batch.requests + 1e-6 * batch.shape.context)

    def run_s(self, partition: Partition, batch: PrefillBatch) -> float:
        return self.pace * (batch.shape.tokens / 300 + 1e-7 * batch.shape.cross)

    def _pass(self, seconds: float) -> None:
        super()._pass(seconds)
        self.longest_s = max(self.longest_s, seconds)


def nothing(point: Point) -> None:
    return None


class TestPoints:
    def test_what_runs_together(self):
        decode, prefill = DecodeBatch(2, 10), PrefillBatch(5, 3)
        fused, paired = Point(WHOLE, decode, prefill), Point(SPLIT, decode, prefill)
        alone = Point(SPLIT, decode)
        assert (fused.fused, fused.side_by_side) == (True, False)
        assert (paired.fused, paired.side_by_side) == (False, True)
        assert (alone.fused, alone.side_by_side) == (False, False)
        assert str(fused) == "decode 2x10 with prefill 5+3 on whole"
        assert str(paired) == "decode 2x10 beside prefill 5+3 on p84/d48"

    def test_no_work(self):
        with pytest.raises(ValueError, match="at least one phase"):
            Point(WHOLE)

    def test_shapes(self):
        assert DecodeBatch(3, 10).shape == DecodeShape(3, 30)
        assert PrefillBatch(4, 5, prompts=2).shape == PrefillShape(8, 32, 40, 2)


class TestMeasure:
    decode, prefill = DecodeBatch(8, 1000), PrefillBatch(512, 2048)
    points = (
        Point(WHOLE, decode),
        Point(SPLIT, prefill=prefill),
        Point(WHOLE, decode, prefill),
        Point(SPLIT, decode, prefill),
    )

    def test_samples_say_what_ran(self):
        meter = FormulaMeter()
        samples = measure(meter, self.points, lambda point: ONCE, nothing)
        step, run = self.decode.shape, self.prefill.shape
        assert [(s.kind, s.partition, s.decode, s.prefill, s.beside) for s in samples] == [
            (Kind.DECODE, Split(132, 132, True), step, None, False),
            (Kind.PREFILL, Split(84, 48), None, run, False),
            (Kind.FUSED, Split(132, 132, True), step, run, False),
            (Kind.DECODE, Split(84, 48), step, run, True),
            (Kind.PREFILL, Split(84, 48), step, run, True),
        ]
        assert [sample.layers for sample in samples] == [0, 32, 0, 0, 32]
        assert [sample.clock_mhz for sample in samples] == [1980.0, 1400.0, None, None, None]
        assert samples[0].seconds == meter.step_s(WHOLE, self.decode)
        assert samples[3].seconds == 1.3 * meter.step_s(SPLIT, self.decode)
        assert samples[4].seconds == 1.2 * meter.run_s(SPLIT, self.prefill)

    def test_repetitions_are_by_phase(self):
        meter = FormulaMeter()
        measure(meter, self.points, lambda point: Repetitions(7, 3), nothing)
        assert meter.asked == [
            ("decode", 7),
            ("prefill", 3),
            ("fused", 3),
            ("side by side", Repetitions(7, 3)),
        ]

    def test_a_short_prefill_settles_first(self):
        short, long = PrefillBatch(64), PrefillBatch(8192)
        points = [Point(WHOLE, prefill=short), Point(WHOLE, prefill=long)]
        points += [Point(WHOLE, DecodeBatch(1, 100), short), Point(SPLIT, self.decode, short)]
        meter = FormulaMeter()
        repetitions = Repetitions(4, 3, settle_s=0.05)
        measure(meter, points, lambda point: repetitions, nothing)
        assert meter.asked == [
            ("prefill", 3),
            ("prefill", math.ceil(0.05 / meter.run_s(WHOLE, short))),
            ("prefill", 3),
            ("fused", 3),
            ("fused", math.ceil(0.05 / (meter.step_s(WHOLE, points[2].decode) + 3e-3 + 64 / 36e3))),
            ("side by side", repetitions),
        ]

    def test_settling_has_a_limit(self):
        assert Repetitions(4, 3, settle_s=0.05).settled_runs(1e-9) == MAX_PREFILL_RUNS

    def test_progress_comes_before_the_work(self):
        meter = FormulaMeter()
        seen = []
        measure(
            meter,
            self.points,
            lambda point: ONCE,
            lambda point: seen.append((point, len(meter.asked))),
        )
        assert seen == list(zip(self.points, range(4), strict=True))


class TestLimits:
    @pytest.mark.parametrize(
        ("point", "fits"),
        [
            (Point(WHOLE, DecodeBatch(64, 64)), True),
            (Point(WHOLE, DecodeBatch(64, 65)), False),  # 65 tokens are five pages
            (Point(WHOLE, DecodeBatch(65, 1)), False),
            (Point(WHOLE, DecodeBatch(1, 513)), False),
            (Point(WHOLE, prefill=PrefillBatch(512)), True),
            (Point(WHOLE, prefill=PrefillBatch(512, 1)), False),
            (Point(WHOLE, prefill=PrefillBatch(512, prompts=4)), True),
            (Point(WHOLE, prefill=PrefillBatch(1, prompts=5)), False),
            (Point(SPLIT, DecodeBatch(60, 16), PrefillBatch(512)), True),
            (Point(SPLIT, DecodeBatch(61, 16), PrefillBatch(512)), False),  # rows of prompts
            (Point(SPLIT, DecodeBatch(8, 512), PrefillBatch(16)), False),  # the pool is full
            # Tokens of running requests count where prompts ride with them, and only there.
            (Point(WHOLE, DecodeBatch(1, 16), PrefillBatch(512, prompts=4)), False),
            (Point(SPLIT, DecodeBatch(1, 16), PrefillBatch(512, prompts=4)), True),
        ],
        ids=str,
    )
    def test_what_fits(self, point, fits):
        assert SMALL.hold(point) is fits


class TestGrid:
    def test_full_has_the_sizes_that_matter_on_every_partition(self):
        points = set(grid(TABLE, H100, Effort.FULL))
        for index in range(len(TABLE)):
            partition = TABLE[index]
            for new in (64, 128, 256, 512, 1024, 2048, 4096, 8192):
                assert Point(partition, prefill=PrefillBatch(new)) in points
            for requests in (1, 4, 8, 16, 32, 64, 128, 256):
                assert Point(partition, DecodeBatch(requests, 512)) in points
            assert Point(partition, DecodeBatch(32, 8192)) in points
            assert Point(partition, DecodeBatch(64, 8192)) not in points  # 524,288 tokens
            pairs = [p for p in points if p.partition == partition and p.side_by_side]
            assert len(pairs) == (0 if partition.exclusive else 9)
        behind = {p.prefill.cached for p in points if p.prefill and not p.decode}
        assert behind == {0, 4096, 16_384, 32_768}
        fused = {(p.prefill.new, p.prefill.cached) for p in points if p.fused}
        assert fused == set(itertools.product((64, 128, 256, 512, 640, 768, 1024, 2048), (0, 8192)))
        assert len({p.decode for p in points if p.fused}) == 5

    def test_brief_is_much_less_but_has_every_kind(self):
        full, brief = (grid(TABLE, H100, effort) for effort in Effort)
        assert len(brief) < len(full) / 4
        for index in range(len(TABLE)):
            mine = [p for p in brief if p.partition.index == index]
            assert len({p.decode for p in mine if not p.prefill}) >= 4
            assert len({p.prefill for p in mine if not p.decode}) >= 4
            assert any(p.prefill and p.decode for p in mine)

    def test_held_out_points_are_not_fitted(self):
        points = held_out(TABLE, H100)
        assert not set(points) & set(grid(TABLE, H100, Effort.FULL))
        prefills = {(p.prefill.new, p.prefill.cached) for p in points if p.prefill}
        assert {(3000, 0), (700, 6000)} <= prefills
        assert {DecodeBatch(24, 5000), DecodeBatch(96, 1500)} <= {p.decode for p in points}
        assert any(p.fused for p in points)
        assert any(p.side_by_side for p in points)

    @given(
        prefill_tokens=st.integers(1, 20_000),
        requests=st.integers(1, 300),
        pages=st.integers(1, 30_000),
        context_length=st.integers(1, 200_000),
        page_size=st.sampled_from([1, 16, 64]),
        effort=st.sampled_from(Effort),
    )
    @settings(max_examples=150)
    def test_any_engine_has_points_that_fit_it(
        self, prefill_tokens, requests, pages, context_length, page_size, effort
    ):
        limits = Limits(prefill_tokens, requests, pages * page_size, context_length, page_size)
        table = PartitionTable(132, (SPLIT_1,))
        points = grid(table, limits, effort)
        assert all(map(limits.hold, points))
        assert len(points) == len(set(points))
        for index in range(len(table)):
            mine = [point for point in points if point.partition.index == index]
            assert any(point.prefill is None for point in mine)
            assert any(point.decode is None for point in mine)


SPLIT_1 = Partition(1, 84, 48)


class TestCosts:
    points = grid(TABLE, H100, Effort.FULL)

    def test_few_points_are_probed(self):
        meter = FormulaMeter()
        Costs.probe(meter, self.points, 270.0)
        assert len(meter.asked) <= 9
        assert meter.now_s < 3

    @pytest.mark.parametrize("repetitions", PACES, ids=str)
    def test_the_guess_is_close_where_times_follow_its_lines(self, repetitions):
        meter = FormulaMeter()
        costs = Costs.probe(meter, self.points, 270.0)
        started_s = meter.now_s
        measure(meter, self.points, lambda point: repetitions, nothing)
        guess_s = sum(costs.of(point, repetitions) for point in self.points)
        assert guess_s == pytest.approx(meter.now_s - started_s, rel=0.25)

    def test_an_h100_is_profiled_within_the_default_time(self):
        costs = Costs.probe(FormulaMeter(), self.points, 270.0)
        plan = schedule(self.points, costs, 0.88 * 4.5 * 60)
        assert plan.pace == 0
        assert plan.dropped == ()
        brief = grid(TABLE, H100, Effort.BRIEF)
        assert schedule(brief, costs, 13.0).dropped == ()

    def test_a_slow_machine_is_not_asked_for_large_batches(self):
        meter = SlowMeter()
        costs = Costs.probe(meter, self.points, 100.0)
        assert meter.now_s < 9 * 3.0
        assert meter.longest_s <= 3.0
        large = Point(WHOLE, prefill=PrefillBatch(8192))
        assert costs.of(large, ONCE) == pytest.approx(2 * 8192 / 300, rel=0.1)

    def test_what_was_not_timed_is_dear(self):
        meter = SlowMeter(pace=100)
        costs = Costs.probe(meter, self.points, 0.0)
        assert len(meter.asked) == 4  # each phase's smallest, twice
        for point in self.points:
            if point.partition == WHOLE and not (point.decode and point.prefill):
                started_s = meter.now_s
                measure(meter, [point], lambda point: ONCE, nothing)
                assert costs.of(point, ONCE) > 0.8 * (meter.now_s - started_s)

    def test_a_single_point_of_each_phase_is_enough(self):
        points = grid(PartitionTable(2), Limits(1, 1, 1, 1), Effort.BRIEF)
        costs = Costs.probe(FormulaMeter(), points, 270.0)
        assert all(costs.of(point, ONCE) > 0 for point in points)


class TestSchedule:
    points = grid(TABLE, H100, Effort.FULL)
    costs = Costs.probe(FormulaMeter(), points, 270.0)

    def test_repetitions_go_before_points(self):
        plan = schedule(self.points, self.costs, 120)
        assert plan.pace > 0
        assert plan.points == tuple(self.points)
        assert plan.expected_s <= 120
        assert any("Fewer repetitions" in line for line in plan.told())

    def test_then_the_costliest_points_go_and_are_named(self):
        plan = schedule(self.points, self.costs, 30)
        assert plan.repetitions == PACES[-1]
        assert plan.expected_s <= 30
        assert set(plan.points) | set(plan.dropped) == set(self.points)
        assert len(plan.points) + len(plan.dropped) == len(self.points)
        (line,) = [line for line in plan.told() if "No time" in line]
        assert f"{len(plan.dropped)} points" in line
        assert str(plan.dropped[0]) in line

    def test_no_phase_is_left_without_points(self):
        plan = schedule(self.points, self.costs, 0.001)
        assert plan.expected_s > 0.001
        for index in range(len(TABLE)):
            mine = [point for point in plan.points if point.partition.index == index]
            assert len([point for point in mine if not point.prefill]) == KEPT_ALONE
            assert len([point for point in mine if not point.decode]) == KEPT_ALONE
        assert not any(point.fused or point.side_by_side for point in plan.points)

    def test_points_keep_their_order(self):
        plan = schedule(self.points, self.costs, 30)
        kept = set(plan.points)
        assert list(plan.points) == [point for point in self.points if point in kept]


class TestPacer:
    points = grid(TABLE, H100, Effort.FULL)

    def run(self, slower: float, budget_s: float):
        """(seconds that measuring took, pacer, plan)"""
        meter = FormulaMeter()
        costs = Costs.probe(meter, self.points, 270.0)
        plan = schedule(self.points, costs, budget_s)
        meter.slower = slower
        started_s = meter.now_s
        pacer = Pacer(plan, costs, budget_s, meter.clock)
        samples = measure(meter, plan.points, pacer, nothing)
        assert len(samples) >= len(plan.points)
        return meter.now_s - started_s, pacer, plan

    def test_as_expected_nothing_changes(self):
        took_s, pacer, plan = self.run(1.0, 260)
        assert took_s <= 260
        assert pacer.slightest == plan.repetitions == PACES[0]

    def test_slower_than_expected_points_are_kept_and_repetitions_are_not(self):
        took_s, pacer, plan = self.run(1.6, 260)
        assert took_s <= 260
        assert plan.repetitions == PACES[0]
        assert pacer.slightest != PACES[0]

    def test_it_never_does_more_than_planned(self):
        took_s, pacer, plan = self.run(0.1, 120)
        assert plan.pace > 0
        assert pacer.slightest == plan.repetitions
        assert took_s <= 120
