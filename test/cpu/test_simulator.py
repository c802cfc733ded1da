"""The simulator: exact times of small scenarios, and what holds whatever is simulated."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drift_scheduler.dispatcher import Admission, Forecast, Plan
from drift_scheduler.lane import Phase, Span
from drift_scheduler.lane_virtual import VirtualClock, VirtualLanes
from drift_scheduler.partition import Partition, PartitionTable
from drift_scheduler.policies.factory import PolicyFactory
from drift_scheduler.policies.order import LATE_TURN, PATIENCE_S, SLOT_S
from drift_scheduler.shapes import DecodeShape, PrefillShape
from drift_scheduler.simulation.cluster import Cluster, ClusterSpec, SimulationStuckError
from drift_scheduler.simulation.engine import EngineLimits
from drift_scheduler.simulation.goodput import find_goodput
from drift_scheduler.simulation.kv_pool import BLOCK_TOKENS, KvPool
from drift_scheduler.simulation.replica import Driver, Replica
from drift_scheduler.simulation.request import SimRequest
from drift_scheduler.simulation.routing import Router
from drift_scheduler.simulation.times import STEP_ALONE, LaunchTimes, Noise
from drift_scheduler.simulation.trace import TraceRequest, TraceRow, at_own_times, at_poisson_times
from drift_scheduler.slo import Slo
from drift_scheduler.timeline import LaneRun

LAYERS = 4
TABLE = PartitionTable(8, (Partition(1, 6, 2), Partition(2, 4, 4)))
BESIDE = 1.5


class Model:
    """Round numbers. A token of a prompt takes 1 ms, a decode step 10 ms and 1 ms a request; on a
    part of the device all takes longer in proportion, and BESIDE the other phase once more."""

    def decode(self, shape, partition, beside):
        solo_s = (0.010 + 0.001 * shape.requests) * TABLE.total_sms / partition.decode_sms
        return _forecast(solo_s * (BESIDE if beside else 1))

    def prefill(self, shape, partition, beside):
        solo_s = (0.001 * shape.tokens + 1e-9 * shape.cross) * TABLE.total_sms
        return _forecast(solo_s / partition.prefill_sms * (BESIDE if beside else 1))

    def fused(self, decode, prefill):
        return _forecast(0.010 + 0.001 * (decode.requests + prefill.tokens))


def _forecast(seconds: float) -> Forecast:
    return Forecast(seconds, seconds * 1.1)


class TestNoise:
    """Times over expected ones, of launches alone and of those that share the device."""

    times = LaunchTimes(Model(), LAYERS, Noise(0.2, 3))
    decode = DecodeShape(4, 4000)
    prefill = PrefillShape(100, 10_000, 0)

    def scatter(self, take, expected_s: float) -> float:
        return statistics.pstdev(math.log(take() / expected_s) for _ in range(2000))

    def test_what_shares_the_device_scatters_as_asked(self):
        lane = VirtualLanes(TABLE, VirtualClock()).lane(Phase.DECODE, TABLE[1])
        shared_s = Model().decode(self.decode, TABLE[1], self.prefill).expected_s
        beside = self.scatter(lambda: self.times.step_s(self.decode, lane, self.prefill), shared_s)
        fused_s = Model().fused(self.decode, self.prefill).expected_s
        fused = self.scatter(lambda: self.times.fused_s(self.decode, self.prefill), fused_s)
        assert beside == pytest.approx(0.2, rel=0.1)
        assert fused == pytest.approx(0.2, rel=0.1)

    def test_a_decode_step_alone_scatters_little(self):
        lanes = VirtualLanes(TABLE, VirtualClock())
        whole, split = (lanes.lane(Phase.DECODE, TABLE[index]) for index in (0, 1))
        for lane, beside in ((whole, self.prefill), (split, None)):
            alone_s = Model().decode(self.decode, lane.partition, None).expected_s
            scatter = self.scatter(
                lambda: self.times.step_s(self.decode, lane, beside),  # noqa: B023
                alone_s,
            )
            assert scatter == pytest.approx(0.2 * STEP_ALONE, rel=0.1)

    def test_layers_scatter_alone_too(self):
        lane = VirtualLanes(TABLE, VirtualClock()).lane(Phase.PREFILL, TABLE[0])
        alone_s = Model().prefill(self.prefill, TABLE[0], None).expected_s
        scatter = self.scatter(
            lambda: self.times.layers_s(self.prefill, 0, LAYERS, lane, None), alone_s
        )
        assert scatter == pytest.approx(0.2, rel=0.1)


def test_the_head_comes_behind_the_last_layer():
    lane = VirtualLanes(TABLE, VirtualClock()).lane(Phase.PREFILL, TABLE[0])
    shape = PrefillShape(100, 10_000, 0)  # 100 ms
    times = LaunchTimes(Model(), LAYERS, head_s=0.020)
    slices = [times.layers_s(shape, layer, layer + 1, lane, None) for layer in range(LAYERS)]
    assert slices == pytest.approx([0.020, 0.020, 0.020, 0.040])
    assert times.layers_s(shape, 0, LAYERS, lane, None) == pytest.approx(0.100)
    # A short batch is not all head.
    short = PrefillShape(10, 100, 0)
    assert times.layers_s(short, 3, 4, lane, None) == pytest.approx(0.005 / 4 + 0.005)


class Recorder:
    """What became of requests, by key."""

    def __init__(self) -> None:
        self.gaps_s: list[float] = []
        self.token_gap = self.gaps_s.append
        self.done: dict[str, SimRequest] = {}
        self.ended: list[str] = []
        self.were_shed: list[str] = []
        self.were_refused: list[str] = []

    def finished(self, request):
        self.done[request.key] = request
        self.ended.append(request.key)

    def shed(self, request):
        self.were_shed.append(request.key)

    def refused(self, request):
        self.were_refused.append(request.key)


def policy(text: str, **options):
    return PolicyFactory(TABLE, Model(), LAYERS, max_batch_tokens=1 << 14, **options).make(text)


class Bench:
    """One replica; requests are given names."""

    def __init__(
        self,
        dispatcher,
        *,
        slo: Slo = Slo(),  # noqa: B008
        noise: Noise | None = None,
        host_pauses=(),
        **limits,
    ):
        self.heard = Recorder()
        self.cached: list[int] = []
        self.evicted: list[int] = []
        self.slo = slo
        self.runs: list[LaneRun] = []
        self.replica = Replica(
            Driver(dispatcher, self.runs.append),
            TABLE,
            EngineLimits(**{"kv_tokens": 100_000, **limits}),
            LaunchTimes(Model(), LAYERS, noise),
            self.heard,
            cached=self.cached.append,
            evicted=self.evicted.append,
            host_pauses=host_pauses,
        )

    @property
    def engine(self):
        return self.replica.engine

    def ask(self, name: str, input_tokens: int, output_tokens: int, blocks=(), at_s: float = 0.0):
        self.run_until(at_s)
        request = TraceRequest(at_s, input_tokens, output_tokens, tuple(blocks))
        self.replica.add(SimRequest(name, request, self.slo), at_s)
        self.engine.check()

    def run_until(self, time_s: float) -> None:
        while self.replica.next_s <= time_s:
            self.replica.wake(self.replica.next_s)
            self.engine.check()

    def finish(self) -> Recorder:
        for _ in range(100_000):
            if self.replica.next_s == float("inf"):
                break
            self.run_until(self.replica.next_s)
        assert self.engine.unfinished == 0
        self.replica.pool.check(own=0)
        return self.heard


def test_a_lone_request_has_the_times_of_the_model():
    bench = Bench(policy("turns"))
    bench.ask("a", 100, 4, at_s=5.0)
    heard = bench.finish()
    assert heard.done["a"].pace.ttft_s == pytest.approx(0.100)
    assert heard.gaps_s == pytest.approx([0.011] * 3)
    assert bench.replica.now_s == pytest.approx(5.0 + 0.100 + 3 * 0.011)


def test_a_request_of_one_token_takes_no_decode_step():
    bench = Bench(policy("turns"))
    bench.ask("a", 100, 1)
    assert bench.finish().gaps_s == []
    assert bench.replica.now_s == pytest.approx(0.100)


def test_the_host_takes_its_time_for_each_launch():
    bench = Bench(policy("turns"), launch_s=0.002)
    bench.ask("a", 100, 2)
    heard = bench.finish()
    assert heard.done["a"].pace.ttft_s == pytest.approx(0.102)
    # The first token is sent when the step behind it is launched, and the second at once.
    assert heard.done["a"].seen.ttft_s == pytest.approx(0.104)
    assert heard.gaps_s == pytest.approx([0.011])


def test_in_a_pause_the_host_does_nothing_and_the_device_goes_on():
    pauses = Span(0.050, 0.090), Span(0.105, 0.130), Span(0.200, 0.300)
    bench = Bench(policy("turns"), host_pauses=pauses)
    bench.ask("a", 100, 4)
    heard = bench.finish()
    # The prompt ends at 100 ms, behind the first pause; steps of 11 ms follow, of which two are in
    # flight. The first of them ends within the second pause, and so does the next one.
    assert heard.done["a"].pace.ttft_s == pytest.approx(0.100)
    assert heard.gaps_s == pytest.approx([0.030, 0.0, 0.011])
    steps = [run.span for run in bench.runs if run.phase is Phase.DECODE]
    assert [span.start_s for span in steps] == pytest.approx([0.100, 0.111, 0.130])


def test_who_comes_in_a_pause_waits_for_its_end():
    bench = Bench(policy("turns"), host_pauses=(Span(0.010, 0.025),))
    bench.ask("a", 100, 1, at_s=0.010)
    assert bench.finish().done["a"].pace.first_s == pytest.approx(0.125)


def test_layers_without_a_graph_take_as_long_as_their_launches():
    bench = Bench(policy("turns"), layer_launch_s=0.030)
    bench.ask("a", 100, 1)
    bench.ask("b", 10, 1, at_s=0.01)
    heard = bench.finish()
    # a's four layers would end at 100 ms, but are launched until 120 ms; then come b's.
    assert heard.done["a"].pace.first_s == pytest.approx(0.120)
    assert heard.done["b"].pace.first_s == pytest.approx(0.240)


def test_launches_of_prefill_hold_up_neither_decode_nor_each_other():
    bench = Bench(policy("static:4/4"), layer_launch_s=0.1)
    bench.ask("a", 10, 40)
    bench.ask("b", 100, 1, at_s=0.1)
    heard = bench.finish()
    assert max(heard.gaps_s) == pytest.approx((0.010 + 0.001) * 2 * BESIDE)
    *_, last = slices = [run for run in bench.runs if run.phase is Phase.PREFILL and run.decode]
    assert sum(run.layers for run in slices) == LAYERS
    # A layer takes 75 ms on half of the device beside decode.
    assert all(run.span.duration_s == pytest.approx(0.1 * run.layers) for run in slices)
    assert last.span.end_s - slices[0].span.start_s == pytest.approx(0.1 * LAYERS)


def test_a_batch_is_planned_before_its_first_slice():
    bench = Bench(Impatient(), launch_s=0.001, batch_launch_s=0.010)
    bench.ask("a", 100, 1)
    bench.finish()
    # Each slice takes 25 ms, and is launched when the one before it has ended.
    starts_s = [run.span.start_s for run in bench.runs]
    assert starts_s == pytest.approx([0.011, 0.037, 0.063, 0.089])


def test_a_graph_is_one_launch_and_not_sliced():
    limits = {"layer_launch_s": 0.030, "graph_tokens": 100}
    bench = Bench(Impatient(), **limits)
    bench.ask("long", 100, 1)
    bench.finish()
    assert [run.layers for run in bench.runs] == [LAYERS]
    assert bench.heard.done["long"].seen.first_s == pytest.approx(0.100)
    bench = Bench(Impatient(), **limits)
    bench.ask("longer", 101, 1)
    bench.finish()
    assert [run.layers for run in bench.runs] == [1] * LAYERS


def test_a_fused_step_larger_than_a_graph_keeps_the_host():
    def first_gap(graph_tokens):
        bench = Bench(policy("chunked:41"), layer_launch_s=0.030, graph_tokens=graph_tokens)
        bench.ask("a", 41, 2)
        return bench.finish().done["a"].seen.ttft_s

    assert first_gap(41) == pytest.approx(0.051)
    assert first_gap(40) == pytest.approx(LAYERS * 0.030)


def test_prefixes_may_be_known_more_closely():
    bench = Bench(policy("turns"), block_tokens=32)

    def ask(name, tokens, blocks, at_s):
        bench.run_until(at_s)
        request = TraceRequest(at_s, tokens, 1, blocks, 32)
        bench.replica.add(SimRequest(name, request, Slo()), at_s)

    ask("a", 100, (1, 2, 3), 0.0)
    ask("b", 100, (1, 2, 9), 10.0)
    heard = bench.finish()
    assert heard.done["b"].cached_tokens == 64
    assert bench.replica.pool.free_tokens == 100_000 - 4 * 32


def test_a_simulation_may_end_before_its_requests():
    requests = [TraceRequest(0.0, 100, 1), TraceRequest(0.0, 400, 1), TraceRequest(0.0, 900, 1)]
    cluster = _cluster(1, limits=EngineLimits(5000, prefill_tokens=400))
    summary = cluster.run(requests, Slo(1.0), until_s=1.2)
    assert (summary.offered, summary.finished, summary.unfinished) == (3, 2, 1)
    assert summary.duration_s == 1.2
    assert summary.attainment == pytest.approx(2 / 3)
    assert summary.goodput_rps == pytest.approx(2 / 1.2)


def test_a_cached_prefix_is_not_computed_again():
    bench = Bench(policy("turns"))
    bench.ask("a", 1200, 1, blocks=[1, 2])
    bench.ask("b", 1600, 1, blocks=[1, 2, 3], at_s=10.0)
    heard = bench.finish()
    new, cached = 1600 - 1024, 1024
    assert heard.done["b"].cached_tokens == cached
    assert heard.done["b"].uncached_tokens == new
    assert heard.done["b"].pace.ttft_s == pytest.approx(0.001 * new + 1e-9 * new * cached)
    assert bench.cached == [1, 2, 3]
    assert bench.replica.pool.free_tokens == 100_000 - 3 * BLOCK_TOKENS


def test_of_a_prompt_that_is_cached_whole_the_last_block_is_computed():
    bench = Bench(policy("turns"))
    bench.ask("a", 1024, 1, blocks=[1, 2])
    bench.ask("b", 1024, 1, blocks=[1, 2], at_s=10.0)
    assert bench.finish().done["b"].cached_tokens == BLOCK_TOKENS
    assert bench.cached == [1, 2]


def test_what_was_used_least_recently_is_evicted_ends_first():
    bench = Bench(policy("turns"), kv_tokens=6 * BLOCK_TOKENS)
    bench.ask("a", 2 * BLOCK_TOKENS, 1, blocks=[1, 2])
    bench.ask("b", 2 * BLOCK_TOKENS, 1, blocks=[3, 4], at_s=10.0)
    bench.ask("c", BLOCK_TOKENS + 1, 1, blocks=[1], at_s=20.0)  # reads block 1 once more
    bench.ask("d", 4 * BLOCK_TOKENS, 1, blocks=[5, 6, 7, 8], at_s=30.0)
    bench.finish()
    # Room for d's four blocks and one token more of its answer's reserve.
    assert bench.evicted == [2, 4]
    bench.ask("e", 3 * BLOCK_TOKENS, 1, blocks=[9, 10, 11], at_s=40.0)
    bench.finish()
    assert bench.evicted == [2, 4, 3, 1, 8]


def test_prompts_ride_in_decode_steps():
    bench = Bench(policy("chunked:41"))
    bench.ask("a", 41, 6)  # a chunk of its own
    bench.ask("b", 100, 2, at_s=0.0001)
    heard = bench.finish()
    assert heard.done["a"].pace.ttft_s == pytest.approx(0.010 + 0.041)
    # Two steps were launched before b came; then 40, 40 and 20 of its tokens ride, then it is a
    # plain step of both.
    fused_s = [0.010 + 0.041, 0.010 + 0.041, 0.010 + 0.021]
    assert heard.gaps_s[:1] == pytest.approx([0.011])
    assert heard.gaps_s[1:4] == pytest.approx(fused_s)
    assert heard.gaps_s[4:] == pytest.approx([0.012, 0.012])
    assert bench.replica.timeline.fused_busy_s == pytest.approx(0.051 + sum(fused_s))


def test_beside_each_other_both_phases_are_slower():
    bench = Bench(policy("static:4/4"))
    bench.ask("a", 10, 60)
    bench.ask("b", 400, 1, at_s=0.1)
    heard = bench.finish()
    decode_s, split_s = 0.011, 0.011 * 8 / 4 * BESIDE
    seen = [gap for gap in heard.gaps_s if gap == pytest.approx(split_s)]
    assert len(seen) > 20
    assert len(heard.gaps_s) == 59
    rest = [gap for gap in heard.gaps_s if gap != pytest.approx(split_s)]
    assert rest == pytest.approx([decode_s] * len(rest))
    # The layers of b: at half the device, each beside a decode step.
    assert bench.replica.timeline.both_busy_s == pytest.approx(0.400 * 2 * BESIDE)


class Impatient:
    """One layer at a time; a prompt that comes while a batch is in flight pre-empts it."""

    def admit(self, view, now_s):
        if view.prefill is None:
            return Admission()
        fresh = [prompt for prompt in view.backlog.oldest(9) if not prompt.begun]
        return Admission((fresh[0].key,), fresh[0].new, preempts=True) if fresh else None

    def dispatch(self, view, now_s):
        idle = view.prefill is not None and view.prefill.slices_in_flight == 0
        decode = view.running > 0 and view.decode_in_flight == 0
        return Plan(TABLE.whole, decode=decode, prefill_layers=1 if idle else 0)


def test_a_batch_that_is_pre_empted_goes_on_behind_the_one_in_front():
    bench = Bench(Impatient())
    bench.ask("long", 4000, 1)
    bench.ask("short", 40, 1, at_s=0.5)
    heard = bench.finish()
    assert bench.engine.preemptions == 1
    assert heard.ended == ["short", "long"]
    # The layer in flight ends at 1.0 s.
    assert heard.done["short"].pace.first_s == pytest.approx(1.0 + 0.040)
    assert heard.done["long"].pace.first_s == pytest.approx(4.0 + 0.040)


def test_a_half_filled_prompt_stays_as_it_is_while_its_batch_is_pre_empted():
    bench = Bench(Impatient(), prefill_tokens=4000)
    bench.ask("long", 6000, 1)
    bench.ask("short", 40, 1, at_s=0.5)
    heard = bench.finish()
    assert heard.ended == ["short", "long"]
    assert heard.done["long"].pace.first_s == pytest.approx(6.0 + 0.040 + 1e-9 * 2000 * 4000)


class OnDemand:
    """Admissions as told, whole batches, steps one at a time."""

    def __init__(self, *admissions):
        self.admissions = list(admissions)

    def admit(self, view, now_s):
        if view.prefill is not None:
            return None
        return self.admissions.pop(0) if self.admissions else Admission()

    def dispatch(self, view, now_s):
        layers = view.prefill.layers_left if view.prefill else 0
        decode = view.running > 0 and view.decode_in_flight == 0
        return Plan(TABLE.whole, decode=decode, prefill_layers=layers)


def test_an_admission_says_who_goes_first_and_how_far():
    nobody = Admission(order=())
    bench = Bench(OnDemand(nobody, nobody, Admission(("c", "a"), tokens=150)))
    bench.ask("a", 100, 1)
    bench.ask("b", 100, 1)
    bench.ask("c", 100, 1)
    heard = bench.finish()
    # c whole and half of a, 150 ms; then the rest of a, and b.
    assert heard.done["c"].pace.first_s == pytest.approx(0.150)
    assert heard.ended == ["c", "a", "b"]


def test_prompts_that_are_shed_are_gone():
    bench = Bench(OnDemand(Admission(order=()), Admission(order=("b",), shed=("a", "nobody"))))
    bench.ask("a", 100, 1)
    bench.ask("b", 100, 1)
    heard = bench.finish()
    assert heard.were_shed == ["a"]
    assert heard.ended == ["b"]


def test_a_prompt_whose_prefix_is_being_computed_is_marked():
    bench = Bench(policy("turns"))
    bench.ask("a", 4 * BLOCK_TOKENS, 1, blocks=[1, 2, 3, 4])
    bench.ask("same", 4 * BLOCK_TOKENS, 1, blocks=[1, 2, 3, 9], at_s=0.1)
    bench.ask("other", 4 * BLOCK_TOKENS, 1, blocks=[5, 6, 7, 8], at_s=0.1)
    backlog = bench.engine.backlog
    assert [backlog[key].deferred for key in ("same", "other")] == [True, False]
    seen = []
    bench.replica.engine.begin_prefill = _spy(bench.replica.engine.begin_prefill, backlog, seen)
    heard = bench.finish()
    assert ("same", 3 * BLOCK_TOKENS, False) in seen
    assert heard.done["same"].cached_tokens == 3 * BLOCK_TOKENS


def test_prompts_of_one_prefix_that_wait_are_marked_when_the_first_begins():
    nobody = Admission(order=())
    bench = Bench(OnDemand(nobody, nobody, Admission(("a",)), *[nobody] * 9))
    bench.ask("a", 1025, 1, blocks=[1, 2])
    bench.ask("b", 1025, 1, blocks=[1, 2])
    assert not bench.engine.backlog["b"].deferred  # nobody computes it yet
    bench.ask("c", 10, 1)
    assert bench.engine.backlog["b"].deferred
    bench.run_until(1.025)
    assert not bench.engine.backlog["b"].deferred
    assert (bench.engine.backlog["b"].new, bench.engine.backlog["b"].cached) == (1, 1024)


def _spy(call, backlog, seen):
    def watched(admission):
        seen.extend((p.key, p.cached, p.deferred) for p in backlog.oldest(9))
        return call(admission)

    return watched


def test_no_more_requests_hold_memory_than_may():
    bench = Bench(policy("turns"), max_running=2)
    for name in "abcd":
        bench.ask(name, 10, 9)
    bench.run_until(0.055)
    assert bench.engine.decode_load().shape.requests == 2
    assert bench.engine.waiting == 0  # none of the other two could start
    assert len(bench.engine.backlog) == 2
    assert sorted(bench.finish().ended) == list("abcd")


def test_a_request_that_can_never_fit_is_refused():
    bench = Bench(policy("turns"), kv_tokens=100)
    bench.ask("a", 90, 11)
    bench.ask("b", 90, 10)
    heard = bench.finish()
    assert heard.were_refused == ["a"]
    assert heard.ended == ["b"]


def test_a_prompt_waits_for_room_that_others_are_expected_to_need():
    bench = Bench(policy("turns"), kv_tokens=300)
    bench.ask("a", 100, 100)
    bench.ask("b", 100, 60)  # 200 are free; 70 % of both answers are kept
    heard = bench.finish()
    assert bench.engine.retractions == 0
    # Each of a's steps takes a token and frees but 0.7 of one, so there is no room before its end.
    assert heard.done["b"].pace.first_s == pytest.approx(0.100 + 99 * 0.011 + 0.100)
    assert heard.ended == ["a", "b"]


def test_when_memory_runs_short_the_last_to_come_is_filled_again():
    bench = Bench(policy("turns"), kv_tokens=345)
    bench.ask("a", 100, 100)
    bench.ask("b", 100, 100)
    heard = bench.finish()
    assert bench.engine.retractions == 1
    assert {key: request.pace.tokens for key, request in heard.done.items()} == {"a": 100, "b": 100}
    assert heard.ended == ["a", "b"]
    assert len(heard.gaps_s) == 99 + 99


def test_the_next_step_is_described_as_it_will_be():
    bench = Bench(OnDemand(), slo=Slo(tbt_s=0.5))
    bench.ask("a", 100, 3)
    bench.run_until(0.1)
    # a's first step is launched; the second one attends to one token more.
    load = bench.engine.decode_load()
    assert (load.shape.requests, load.shape.context, load.tbt_s) == (1, 102, 0.5)
    assert load.joined_due_s == float("inf")
    bench.run_until(0.111)
    assert bench.runs[-1].decode.context == 101


class Watching(OnDemand):
    """Notes when the first of those that have joined is due, at every turn."""

    def __init__(self):
        super().__init__()
        self.due_s: set[float] = set()

    def dispatch(self, view, now_s):
        self.due_s.add(view.joined_due_s)
        return super().dispatch(view, now_s)


def test_who_has_joined_is_due_its_next_token():
    watching = Watching()
    # Too little time is left to keep a first token back until its request's first step.
    bench = Bench(watching, slo=Slo(ttft_s=0.9, tbt_s=0.5))
    bench.ask("a", 100, 30)
    bench.ask("b", 50, 3, at_s=0.15)
    joined_s = bench.finish().done["b"].pace.first_s
    assert sorted(watching.due_s) == pytest.approx([0.6, joined_s + 0.5, float("inf")])


def test_a_first_token_is_sent_when_its_first_step_starts():
    bench = Bench(OnDemand(), slo=Slo(tbt_s=0.5))
    bench.ask("a", 100, 30)
    bench.ask("b", 50, 3, at_s=0.15)
    done = bench.finish().done
    first = next(run for run in bench.runs if run.decode and run.decode.requests == 2)
    assert done["b"].pace.first_s == pytest.approx(first.span.start_s)


@pytest.mark.parametrize("name", ["turns", "chunked:64", "table", "static:4/4", "temporal"])
def test_runs_with_one_seed_are_alike_and_with_another_are_not(name):
    requests = [TraceRequest(0.05 * i, 30 + 7 * i, 1 + i % 9) for i in range(20)]

    def summary(seed: int, noise_sigma: float):
        spec = ClusterSpec(
            3,
            TABLE,
            Model(),
            LAYERS,
            EngineLimits(1000),
            noise_sigma=noise_sigma,
            seed=seed,
        )
        return Cluster(spec, lambda: Driver(policy(name))).run(requests, Slo(0.2, 0.0, 0.05))

    assert summary(1, 0.2) == summary(1, 0.2)
    assert summary(1, 0.2) != summary(2, 0.2)
    assert summary(1, 0.0) == summary(2, 0.0)


POLICIES = (
    "turns",
    "chunked:64",
    "table",
    "static:6/2",
    "temporal",
    "adaptive",
    "adaptive:split-only",
    "adaptive:fused-only",
    "adaptive:turns-only",
    "adaptive:no-slices,no-polling",
)
KV_TOKENS = 6 * BLOCK_TOKENS


class Lawful:
    """A dispatcher of which every plan is looked at: it owns the SMs it launches on, launches no
    more than there is, and pre-empts neither nobody nor what has pre-empted another."""

    def __init__(self, inner):
        self._inner = inner

    def admit(self, view, now_s):
        admission = self._inner.admit(view, now_s)
        if admission is not None:
            assert admission.preempts == (view.prefill is not None)
            assert not (admission.preempts and view.parked)
            assert not admission.preempts or view.prefill.layers_left
            assert all(key in view.backlog for key in (*(admission.order or ()), *admission.shed))
        return admission

    def dispatch(self, view, now_s):
        plan = self._inner.dispatch(view, now_s)
        assert plan.partition in (TABLE.whole, *TABLE.splits)
        assert plan.prefill_layers <= (view.prefill.layers_left if view.prefill else 0)
        assert not plan.fused_tokens or view.prefill is None
        assert not plan.decode or view.decode_in_flight < 2
        if not plan.partition.exclusive:
            assert view.running
            assert view.prefill
        return plan


requests_strategy = st.lists(
    st.tuples(
        st.sampled_from([0.0, 0.0, 0.01, 0.3, 2.0]),  # after the one before
        st.integers(1, 4 * BLOCK_TOKENS),
        st.integers(1, 600),
        st.integers(0, 2),  # which path of blocks it follows
    ),
    min_size=1,
    max_size=12,
)


@settings(max_examples=60)
@given(
    requests_strategy,
    st.sampled_from(POLICIES),
    st.booleans(),
    st.sampled_from([0.0, 0.3]),
    st.sampled_from([200, 1024, 4096]),
)
def test_every_request_ends_once_and_memory_is_never_exceeded(
    asked, name, sheds, noise_sigma, prefill_tokens
):
    bench = Bench(
        Lawful(policy(name, sheds=sheds)),
        slo=Slo(1.0, 0.002, 0.06),
        noise=Noise(noise_sigma, 7),
        kv_tokens=KV_TOKENS,
        max_running=5,
        prefill_tokens=prefill_tokens,
    )
    now_s = 0.0
    for number, (after_s, input_tokens, output_tokens, path) in enumerate(asked):
        now_s += after_s
        blocks = range(100 * path, 100 * path + input_tokens // BLOCK_TOKENS)
        bench.ask(f"{number:02}", input_tokens, output_tokens, blocks, at_s=now_s)
    heard = bench.finish()  # which checks the pool after every event
    everyone = [*heard.ended, *heard.were_shed, *heard.were_refused]
    assert sorted(everyone) == [f"{number:02}" for number in range(len(asked))]
    for key, request in heard.done.items():
        assert request.pace.tokens == asked[int(key)][2]
    assert len(heard.gaps_s) == sum(r.pace.tokens - 1 for r in heard.done.values())
    held = set(bench.cached)
    assert len(bench.cached) - len(bench.evicted) <= KV_TOKENS // BLOCK_TOKENS
    assert held >= set(bench.evicted)


def test_a_late_prompt_is_served_within_its_bound_however_many_fresh_ones_come():
    """Fresh prompts alone are more than the device can do, and all of them could be in time."""
    bench = Bench(Lawful(policy("adaptive")), slo=Slo(0.5, 0.0, 0.2), prefill_tokens=220)
    bench.ask("large", 2000, 1)  # 2 s: late from the start
    for number in range(400):
        bench.ask(f"small{number:03}", 110, 1, at_s=0.1 * (number + 1))
    bench.run_until(45.0)
    waited_s = bench.heard.done["large"].pace.first_s
    assert waited_s < 2 * PATIENCE_S + LATE_TURN * SLOT_S + 4.0


@settings(max_examples=100)
@given(st.data())
def test_the_pool_agrees_with_a_plain_account(data):
    """Paths of blocks are read, let go, published; tokens are taken and given back."""
    cached: set[int] = set()
    pool = KvPool(8 * BLOCK_TOKENS, cached.add, cached.discard)
    own, held = 0, []
    for _ in range(data.draw(st.integers(1, 30))):
        path = [10 * data.draw(st.integers(0, 2)) + i for i in range(data.draw(st.integers(0, 4)))]
        match data.draw(st.sampled_from(["open", "close", "take", "give"])):
            case "open":
                found = pool.match(path)
                assert found == len(list(itertools.takewhile(cached.__contains__, path)))
                need = BLOCK_TOKENS * (len(path) - found)
                if need <= pool.available_beside(path[:found]):
                    pool.read(path[:found])
                    assert pool.take(need)
                    pool.publish(path[found:])
                    held.append(path)
            case "close" if held:
                pool.let_go(held.pop(data.draw(st.integers(0, len(held) - 1))))
            case "take":
                count = data.draw(st.integers(0, 3000))
                fits = count <= pool.available_tokens
                assert pool.take(count) == fits
                own += count if fits else 0
            case "give" if own:
                count = data.draw(st.integers(1, own))
                pool.give_back(count)
                own -= count
        pool.check(own)
        assert pool.free_tokens + own + BLOCK_TOKENS * len(cached) == pool.capacity
        assert all(set(path) <= cached for path in held)


def test_a_request_goes_to_the_longest_prefix_unless_too_much_waits_there():
    router = Router(3, slack_tokens=1000)
    for block in (1, 2):
        router.cached(1, block)
    router.cached(2, 1)
    router.load(0, tokens=0, requests=0)
    router.load(1, tokens=1000, requests=9)
    router.load(2, tokens=500, requests=9)
    assert router.choose([1, 2, 3]) == 1
    assert router.choose([1, 9]) == 2  # both have block 1, less waits at 2
    assert router.choose([7, 8]) == 0
    assert router.choose([]) == 0
    router.load(1, tokens=1001, requests=9)
    assert router.choose([1, 2, 3]) == 0
    router.evicted(1, 2)
    assert router.choose([1, 2, 3]) == 2
    router.load(0, tokens=500, requests=10)
    assert router.choose([7]) == 2  # as many tokens, fewer requests


def _cluster(replicas: int, dispatcher=None, **options) -> Cluster:
    limits = options.pop("limits", EngineLimits(100_000))
    spec = ClusterSpec(replicas, TABLE, Model(), LAYERS, limits, **options)
    make = dispatcher or (lambda: policy("turns"))
    return Cluster(spec, lambda: Driver(make()))


def test_requests_of_one_prefix_share_a_replica_and_others_spread():
    requests = [
        TraceRequest(10.0 * turn, 1024, 2, (100 * chat, 100 * chat + 1))
        for turn in range(3)
        for chat in range(4)
    ]
    cluster = _cluster(4)
    summary = cluster.run(requests, Slo())
    used = [100_000 - replica.pool.free_tokens for replica in cluster.replicas]
    assert used == [2 * BLOCK_TOKENS] * 4
    assert summary.cached_share == pytest.approx(2 / 3 * 1 / 2)  # the last block is computed anew


def test_a_summary_counts_what_happened():
    requests = [
        TraceRequest(0.0, 100, 3),
        TraceRequest(10.0, 300, 3),  # its first token is late
        TraceRequest(20.0, 100, 1),
        TraceRequest(30.0, 100, 500),  # refused
    ]
    cluster = _cluster(1, limits=EngineLimits(400))
    summary = cluster.run(requests, Slo(ttft_s=0.2, tbt_s=0.02))
    assert (summary.offered, summary.finished, summary.refused, summary.shed) == (4, 3, 1, 0)
    assert summary.attainment == pytest.approx(2 / 4)
    assert summary.met_ttft == pytest.approx(2 / 4)
    assert summary.met_tbt == pytest.approx(3 / 4)
    assert summary.duration_s == pytest.approx(20.1)
    assert summary.goodput_rps == pytest.approx(2 / 20.1)
    assert summary.ttft_p50_ms == pytest.approx(100.0)
    assert summary.ttft_p99_ms == pytest.approx(100 + 0.98 * 200)
    assert summary.tbt_p99_ms == pytest.approx(11.0)
    assert summary.output_tokens == 7
    assert summary.prefill_busy == pytest.approx(0.5 / 20.1)
    assert summary.decode_busy == pytest.approx(4 * 0.011 / 20.1)


def test_a_first_token_may_take_longer_for_a_longer_prompt():
    requests = [TraceRequest(0.0, 300, 1)]
    assert _cluster(1).run(requests, Slo(0.2, 0.0009)).attainment == 0.0
    assert _cluster(1).run(requests, Slo(0.2, 0.0011)).attainment == 1.0


def test_nothing_simulated_is_no_error():
    summary = _cluster(2).run([], Slo())
    assert (summary.offered, summary.attainment, summary.goodput_rps) == (0, 0.0, 0.0)


class Idle:
    """Never launches; looks again at every second, or not."""

    def __init__(self, again_s: float | None) -> None:
        self.again_s = again_s

    def admit(self, view, now_s):
        return None

    def dispatch(self, view, now_s):
        again_s = None if self.again_s is None else now_s + self.again_s
        return Plan(TABLE.whole, look_again_s=again_s)


@pytest.mark.parametrize("again_s", [None, 1.0])
def test_a_policy_that_never_serves_is_found_out(again_s):
    with pytest.raises(SimulationStuckError, match="1 of 1 requests will never end"):
        _cluster(1, lambda: Idle(again_s)).run([TraceRequest(0.0, 10, 1)], Slo())


def test_a_policy_is_woken_when_it_wants_to_look_again():
    class Later(OnDemand):
        def dispatch(self, view, now_s):
            if now_s < 1.5:
                return Plan(TABLE.whole, look_again_s=1.5)
            return super().dispatch(view, now_s)

    bench = Bench(Later())
    bench.ask("a", 100, 1)
    assert bench.finish().done["a"].pace.first_s == pytest.approx(1.6)


def test_sixty_four_gpus_are_simulated_within_seconds():
    draw = random.Random(3)
    requests = [
        TraceRequest(draw.uniform(0, 20), draw.randint(10, 400), draw.randint(1, 40))
        for _ in range(1500)
    ]
    cluster = _cluster(64)
    summary = cluster.run(requests, Slo(2.0, 0.0, 0.5))
    assert summary.finished == 1500
    assert summary.attainment > 0.9
    assert summary.output_tokens == sum(request.output_tokens for request in requests)
    for replica in cluster.replicas:
        replica.engine.check()


ROWS = [
    TraceRow(1.0, 600, 5, (7,)),
    TraceRow(2.0, 1200, 6, (7, 8)),
    TraceRow(5.0, 10, 7, ()),
]


def test_a_trace_is_replayed_at_its_own_times_or_faster():
    assert [request.arrival_s for request in at_own_times(ROWS)] == [0.0, 1.0, 4.0]
    assert [request.arrival_s for request in at_own_times(ROWS, speed=2.0)] == [0.0, 0.5, 2.0]
    assert len(at_own_times(ROWS, speed=2.0, seconds=2.0)) == 2


def test_poisson_arrivals_come_closer_together_with_the_rate_and_repeat_the_trace():
    slow = at_poisson_times(ROWS, 2.0, 100.0, seed=5)
    fast = at_poisson_times(ROWS, 4.0, 100.0, seed=5)
    assert len(slow) == pytest.approx(200, abs=50)
    assert [r.arrival_s for r in fast[:50]] == pytest.approx([r.arrival_s / 2 for r in slow[:50]])
    assert slow != at_poisson_times(ROWS, 2.0, 100.0, seed=6)
    assert [r.output_tokens for r in slow[:7]] == [5, 6, 7, 5, 6, 7, 5]
    # The second round shares blocks within itself and none with the first.
    assert slow[3].blocks[0] == slow[4].blocks[0]
    assert not {7, 8} & {*slow[3].blocks, *slow[4].blocks}


@pytest.mark.parametrize("first", [0.1, 1.0, 7.0, 100.0])
def test_goodput_is_the_highest_rate_that_meets_the_target(first):
    search = find_goodput(lambda rate: 1.0 if rate <= 6.3 else 0.5, 0.9, first, tolerance=0.01)
    assert 6.3 / 1.01 <= search.rate_per_s <= 6.3
    assert not search.unbounded
    assert search.rate_per_s in {p.rate_per_s for p in search.probes if p.attainment >= 0.9}


def test_a_goodput_search_ends_where_every_or_no_rate_will_do():
    assert find_goodput(lambda rate: 1.0, 0.9, 1.0).unbounded
    none = find_goodput(lambda rate: 0.1, 0.9, 1.0)
    assert (none.rate_per_s, none.unbounded) == (0.0, False)


def test_limits_and_requests_are_checked():
    with pytest.raises(ValueError, match="positive"):
        EngineLimits(kv_tokens=0)
    with pytest.raises(ValueError, match="a prompt and an answer"):
        TraceRequest(0.0, 5, 0)
    with pytest.raises(ValueError, match="full blocks"):
        TraceRequest(0.0, 511, 1, (1,))
    with pytest.raises(ValueError, match="replicas=0"):
        Router(0, 1)
    assert dataclasses.asdict(EngineLimits(5))["max_running"] == 256
