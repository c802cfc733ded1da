"""The scheduler's loop with scripted messages and a fake runner, in virtual time."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest

from drift_scheduler.attainment import Attainment
from drift_scheduler.dispatcher import Admission, Forecast, Plan
from drift_scheduler.gang import Gang
from drift_scheduler.host_delay import START_S
from drift_scheduler.lane import Phase
from drift_scheduler.lane_virtual import VirtualClock, VirtualLanes
from drift_scheduler.partition import Partition, PartitionTable
from drift_scheduler.policies.by_batch_size import SplitByBatchSize
from drift_scheduler.policies.factory import PolicyFactory
from drift_scheduler.slo import Slo
from drift_scheduler.timeline import Timeline
from sglang.srt.errors import ConfigError
from sglang.srt.managers.admission import EngineLimits
from sglang.srt.managers.cycle_collector import IDLE_S, CycleCollector
from sglang.srt.managers.outbox import Outbox
from sglang.srt.managers.scheduler import (
    BUSY_POLL_S,
    LONGEST_WAIT_S,
    Scheduler,
    count_finished,
    fixed_policy,
)
from sglang.srt.managers.serving_engine import ServingEngine
from sglang.srt.mem_cache.radix_cache import RadixCache
from sglang.srt.mem_cache.sequence_cache import SequenceCache
from sglang.srt.mem_cache.slot_allocator import SlotAllocator
from sglang.srt.mem_cache.slot_table import RowPool
from sglang.srt.messages import (
    AbortRequest,
    ContinueGeneration,
    FlushCache,
    GenerateRequest,
    GetState,
    GetTimeline,
    GetWeights,
    Message,
    PauseGeneration,
    ReleaseMemory,
    ResumeMemory,
    SetInternalState,
    SetPolicy,
    Shutdown,
    StopMatched,
    TokenBatch,
    UpdateWeights,
    token_ids,
)
from sglang.srt.model_executor.fake_runner import FakeRunner, choose_by_hash, cost_by_tokens
from sglang.srt.observability.scheduler_log import SchedulerLog
from sglang.srt.observability.watchdog import Watchdog
from sglang.srt.sampling_params import SamplingParams

NUM_SLOTS = 129
NUM_ROWS = 5
CONTEXT = 100
TABLE = PartitionTable(4, (Partition(1, 3, 1), Partition(2, 2, 2)))
WATCHDOG_S = 60.0


class Hung(Exception):
    """The watchdog fired."""


class Lanes(VirtualLanes):
    """waking: with a descriptor, so that the loop waits in the inbox; else it sleeps and looks."""

    def __init__(self, table: PartitionTable, clock: VirtualClock, waking: bool) -> None:
        super().__init__(table, clock)
        self._fd = os.eventfd(0, os.EFD_NONBLOCK) if waking else None

    def completion_fd(self) -> int | None:
        return self._fd

    def close(self) -> None:
        if self._fd is not None:
            os.close(self._fd)


class Inbox:
    """Messages at their times. Waiting moves the clock to whatever comes next."""

    def __init__(
        self,
        script: list[tuple[float, Message]],
        clock: VirtualClock,
        lanes: Lanes,
        watchdog: Watchdog,
        turn_s: float,
    ) -> None:
        self._script = sorted(script, key=lambda entry: entry[0])
        self._clock = clock
        self._lanes = lanes
        self._watchdog = watchdog
        self._turn_s = turn_s

    def drain(self) -> list[Message]:
        self._clock.advance_to(self._clock.now_s + self._turn_s)
        self._watchdog.check()
        due = list(itertools.takewhile(lambda entry: entry[0] <= self._clock.now_s, self._script))
        del self._script[: len(due)]
        return [message for _, message in due]

    def has_messages(self) -> bool:
        return bool(self._script) and self._script[0][0] <= self._clock.now_s

    def wait(self, timeout_ms: int, other_fd: int | None = None) -> None:
        wake_s = self._clock.now_s + timeout_ms / 1000
        if self._script:
            wake_s = min(wake_s, self._script[0][0])
        completion_s = self._lanes.next_completion_s()
        if other_fd is not None and completion_s is not None:
            wake_s = min(wake_s, completion_s)
        self._clock.advance_to(max(wake_s, self._clock.now_s))
        self._watchdog.check()


class Outlet:
    """Keeps what is sent, with its time."""

    def __init__(self, clock: VirtualClock) -> None:
        self._clock = clock
        self.sent: list[tuple[float, Message]] = []

    def send(self, message: Message) -> None:
        self.sent.append((self._clock.now_s, message))


class House:
    """A scheduler and what it has sent."""

    def __init__(
        self,
        script: list[tuple[float, Message]],
        *,
        cost: Callable = cost_by_tokens,
        dispatcher=None,
        turn_s: float = 0.0,
        max_queued: int | None = None,
        make_policy: Callable = fixed_policy,
        device=None,
        waking: bool = True,
    ) -> None:
        self.device = device
        self.clock = VirtualClock()
        self.lanes = Lanes(TABLE, self.clock, waking)
        self.watchdog = Watchdog(WATCHDOG_S, self._hung, self.clock)
        allocator = SlotAllocator(NUM_SLOTS, 1)
        self.cache = SequenceCache(RadixCache(1, allocator.free), allocator)
        outbox = Outbox()
        attainment = Attainment(self.clock.now_s)
        self.engine = ServingEngine(
            FakeRunner(
                num_layers=4,
                num_slots=NUM_SLOTS,
                num_rows=NUM_ROWS,
                context_length=CONTEXT,
                choose=choose_by_hash(50),
                cost=cost,
            ),
            self.cache,
            RowPool(NUM_ROWS),
            EngineLimits(
                context_length=CONTEXT, prefill_tokens=32, chunked=True, max_queued=max_queued
            ),
            eos_token_ids=frozenset(),
            outbox=outbox,
            random_seed=0,
            on_finish=lambda request: count_finished(attainment, request),
            clock=self.clock,
        )
        self.timeline = timeline = Timeline()
        self.gang = gang = Gang(
            self.engine,
            self.lanes,
            dispatcher or SplitByBatchSize(TABLE, (1, 3)),
            timeline,
            self.clock,
        )
        self.tokenizer, self.detokenizer = Outlet(self.clock), Outlet(self.clock)
        self.scheduler = Scheduler(
            engine=self.engine,
            gang=gang,
            timeline=timeline,
            cache=self.cache,
            outbox=outbox,
            lanes=self.lanes,
            inbox=Inbox(script, self.clock, self.lanes, self.watchdog, turn_s),
            to_tokenizer=self.tokenizer,
            to_detokenizer=self.detokenizer,
            watchdog=self.watchdog,
            log=SchedulerLog(40, self.clock),
            attainment=attainment,
            collector=CycleCollector(collect=lambda: None, clock=self.clock),
            make_policy=make_policy,
            device=device,
            clock=self.clock,
            sleep=lambda seconds: self.clock.advance_to(self.clock.now_s + seconds),
        )

    def _hung(self, silent_s: float) -> None:
        raise Hung(f"silent for {silent_s:.1f} s")

    def run(self) -> House:
        try:
            self.scheduler.run()
        finally:
            self.lanes.close()
        return self

    def ids(self, rid: str) -> list[int]:
        return [
            token
            for _, batch in self.detokenizer.sent
            if isinstance(batch, TokenBatch) and rid in batch.rids
            for token in batch.new_ids[batch.rids.index(rid)]
        ]

    def ends(self) -> dict[str, str]:
        """rid -> type of its finish."""
        ends: dict[str, str] = {}
        for _, batch in self.detokenizer.sent:
            if isinstance(batch, TokenBatch):
                for rid, finish in zip(batch.rids, batch.finish, strict=True):
                    if finish is not None:
                        assert rid not in ends, f"{rid} ends twice"
                        ends[rid] = finish.type
        return ends

    def replies(self) -> list[tuple[float, int, bool]]:
        return [(time_s, reply.call_id, reply.ok) for time_s, reply in self.tokenizer.sent]


def ask(
    rid: str, tokens: int = 5, max_new_tokens: int = 4, arrival_s: float = 0.0, **slo
) -> GenerateRequest:
    return GenerateRequest(
        rid=rid,
        input_ids=token_ids(range(tokens)),
        sampling=SamplingParams(temperature=0.0, max_new_tokens=max_new_tokens),
        arrival_s=arrival_s,
        **slo,
    )


def one_second_a_launch(batch, layers, lane) -> float:
    return 1.0


def test_requests_are_answered_and_shutdown_is_passed_on():
    house = House([(0.0, ask("a")), (0.1, ask("b", tokens=40)), (1.0, Shutdown())]).run()
    assert house.ends() == {"a": "length", "b": "length"}
    assert len(house.ids("a")) == len(house.ids("b")) == 4
    assert house.detokenizer.sent[-1] == (1.0, Shutdown())


def test_accounts_are_checked_when_it_is_quiet_and_at_the_end_but_not_between_two_requests():
    script = [(0.0, ask("a")), (5.0, ask("b")), (20.0, ask("c")), (24.5, Shutdown())]
    house = House(script, cost=one_second_a_launch)
    checks_s: list[float] = []
    check = house.engine.check

    def timed_check():
        checks_s.append(house.clock.now_s)
        check()

    house.engine.check = timed_check
    house.run()
    assert house.ends() == {"a": "length", "b": "length", "c": "length"}
    # a ends at 4 s, b at 9 s, c at 24 s.
    assert checks_s == pytest.approx([9.0 + IDLE_S, 24.5], abs=LONGEST_WAIT_S)


class CountingPolicy:
    """By batch size. again_s: from each look to the next."""

    def __init__(self, again_s: float | None = None) -> None:
        self.looked_s: list[float] = []
        self._policy = SplitByBatchSize(TABLE, (1, 3))
        self._again_s = again_s

    def admit(self, view, now_s):
        return self._policy.admit(view, now_s)

    def dispatch(self, view, now_s):
        self.looked_s.append(now_s)
        look_again_s = None if self._again_s is None else now_s + self._again_s
        return replace(self._policy.dispatch(view, now_s), look_again_s=look_again_s)


def test_lanes_that_wake_nobody_are_looked_at_often_and_planned_for_seldom():
    policy = CountingPolicy()
    script = [(0.0, ask("a", max_new_tokens=2)), (1.31, ask("b", max_new_tokens=1))]
    house = House(
        [*script, (9.0, Shutdown())], cost=one_second_a_launch, dispatcher=policy, waking=False
    ).run()
    batches = [
        (time_s, batch.rids)
        for time_s, batch in house.detokenizer.sent
        if isinstance(batch, TokenBatch)
    ]
    assert [rids for _, rids in batches] == [["a"], ["a"], ["b"]]
    ends_s = [1.0, 2.0, 3.0]  # b's prompt takes its turn on the whole device behind a's step
    assert [time_s for time_s, _ in batches] == pytest.approx(ends_s, abs=3 * BUSY_POLL_S)
    assert any(time_s == pytest.approx(1.31, abs=3 * BUSY_POLL_S) for time_s in policy.looked_s)
    # Every LONGEST_WAIT_S at least, and a few times at each of what happened.
    busy = [time_s for time_s in policy.looked_s if time_s < ends_s[-1]]
    assert len(busy) < ends_s[-1] / LONGEST_WAIT_S + 15


def test_polled_lanes_are_planned_for_when_the_dispatcher_wants_to_look_again():
    policy = CountingPolicy(again_s=0.05)
    House(
        [(0.0, ask("a", max_new_tokens=1)), (2.0, Shutdown())],
        cost=one_second_a_launch,
        dispatcher=policy,
        waking=False,
    ).run()
    busy = [time_s for time_s in policy.looked_s if 0.01 < time_s < 0.99]
    gaps = [later - earlier for earlier, later in itertools.pairwise(busy)]
    assert len(gaps) > 15
    assert all(0.05 <= gap < 0.05 + 3 * BUSY_POLL_S for gap in gaps)


def test_tokens_are_sent_as_they_come():
    house = House([(0.0, ask("a")), (30.0, Shutdown())], cost=one_second_a_launch).run()
    times = [time_s for time_s, batch in house.detokenizer.sent if isinstance(batch, TokenBatch)]
    assert times == [1.0, 2.0, 3.0, 4.0]


def test_tokens_do_not_wait_for_the_next_launch(monkeypatch):
    house = House([(0.0, ask("a", max_new_tokens=6)), (30.0, Shutdown())], cost=one_second_a_launch)
    begin = house.engine.begin_decode

    def begin_slowly(*args):
        house.clock.advance_to(house.clock.now_s + 0.25)
        return begin(*args)

    monkeypatch.setattr(house.engine, "begin_decode", begin_slowly)
    house.run()
    sent = [time_s for time_s, batch in house.detokenizer.sent if isinstance(batch, TokenBatch)]
    ended = [run.span.end_s for phase in Phase for run in house.timeline.runs(phase)]
    assert len(sent) == 6
    assert sent == sorted(ended)


def test_shutdown_ends_the_loop_while_requests_run():
    house = House(
        [(0.0, ask("a", max_new_tokens=90)), (3.5, Shutdown())], cost=one_second_a_launch
    ).run()
    assert any(message == Shutdown() for _, message in house.detokenizer.sent)
    assert house.clock.now_s < 5.0


def test_an_abort_and_a_stop_string_end_their_requests():
    house = House(
        [
            (0.0, ask("a", max_new_tokens=80)),
            (0.0, ask("b", max_new_tokens=80)),
            (0.0, ask("c", max_new_tokens=8)),
            (5.5, AbortRequest(rid="a")),
            (6.5, StopMatched(rid="b")),
            (99.0, Shutdown()),
        ],
        cost=one_second_a_launch,
    ).run()
    assert house.ends() == {"a": "abort", "b": "stop", "c": "length"}
    assert house.engine.idle


def test_abort_all_ends_everything():
    script = [(0.0, ask(f"r{i}", max_new_tokens=20)) for i in range(6)]
    house = House(
        [*script, (5.0, AbortRequest(abort_all=True)), (50.0, Shutdown())],
        cost=one_second_a_launch,
    ).run()
    assert set(house.ends().values()) == {"abort"}
    assert len(house.ends()) == 6


def test_an_idle_server_flushes_at_once():
    house = House([(0.0, ask("a")), (5.0, FlushCache(call_id=7)), (6.0, Shutdown())]).run()
    assert house.replies() == [(5.0, 7, True)]
    assert house.cache.allocator.available == NUM_SLOTS - 1


def test_a_busy_server_refuses_a_flush_that_will_not_wait_and_says_why():
    house = House(
        [(0.0, ask("a", max_new_tokens=20)), (5.0, FlushCache(call_id=7)), (50.0, Shutdown())],
        cost=one_second_a_launch,
    ).run()
    assert house.replies() == [(5.0, 7, False)]
    assert "1 requests are running" in house.tokenizer.sent[0][1].message
    assert house.ends() == {"a": "length"}


def test_a_flush_waits_for_idleness_until_its_deadline():
    house = House(
        [
            (0.0, ask("a", max_new_tokens=10)),
            (2.0, FlushCache(call_id=1, timeout_s=3.0)),
            (2.0, FlushCache(call_id=2, timeout_s=30.0)),
            (50.0, Shutdown()),
        ],
        cost=one_second_a_launch,
    ).run()
    (late_s, *refused), (idle_s, *flushed) = house.replies()
    assert refused == [1, False]
    assert 5.0 <= late_s <= 5.2 + 1e-6
    assert flushed == [2, True]
    assert idle_s == pytest.approx(10.0)
    assert house.cache.allocator.available == NUM_SLOTS - 1


def test_state_is_told_at_once_while_work_is_in_flight():
    house = House(
        [
            (0.0, ask("a", max_new_tokens=30)),
            (3.0, ask("b", tokens=60, max_new_tokens=1)),
            (8.0, GetState(call_id=3)),
            (90.0, Shutdown()),
        ],
        cost=one_second_a_launch,
    ).run()
    ((time_s, call_id, ok),) = house.replies()
    assert (time_s, call_id, ok) == (8.0, 3, True)
    state = house.tokenizer.sent[0][1].data
    assert state["running_requests"] == 2  # one decodes, one is in prefill
    assert state["waiting_requests"] == 0
    assert 0 < state["used_tokens"] < NUM_SLOTS
    assert state["token_usage"] == pytest.approx(state["used_tokens"] / (NUM_SLOTS - 1))
    multiplex = state["pd_multiplex"]
    assert multiplex["enabled"]
    assert multiplex["both_busy_s"] > 0
    assert [p["decode_sms"] for p in multiplex["partitions"]] == [4, 1, 2]
    assert sum(p["launches"] for p in multiplex["partitions"]) > 5


def test_state_tells_who_had_tokens_in_time():
    """Of four tokens a launch each, one a second."""
    house = House(
        [
            (0.0, ask("quick", slo=Slo(ttft_s=1.0, tbt_s=1.0), slo_class="chat")),
            (10.0, ask("slow", slo=Slo(ttft_s=0.5, tbt_s=1.0), arrival_s=10.0, slo_class="chat")),
            (20.0, ask("silent", arrival_s=20.0)),
            (30.0, ask("probe", arrival_s=30.0, slo_class="")),
            (40.0, ask("gone", arrival_s=40.0)),
            (40.5, AbortRequest(rid="gone")),
            (50.0, GetState(call_id=1)),
            (51.0, Shutdown()),
        ],
        cost=one_second_a_launch,
    ).run()
    slo = house.tokenizer.sent[0][1].data["slo"]
    assert (slo["finished"], slo["shed"]) == (3, 0)
    assert (slo["met_ttft"], slo["met_tbt"], slo["met"]) == (2, 3, 2)
    assert slo["goodput_rps"] == pytest.approx(2 / 50)
    assert slo["window"]["attainment"] == pytest.approx(2 / 3)
    assert {name: counts["met"] for name, counts in slo["classes"].items()} == {
        "chat": 1,
        "default": 1,
    }


def test_a_request_that_finds_no_room_is_counted_as_shed():
    house = House([(0.0, ask("a")), (1.0, GetState(call_id=1)), (2.0, Shutdown())], max_queued=0)
    slo = house.run().tokenizer.sent[0][1].data["slo"]
    assert house.ends() == {"a": "abort"}
    assert (slo["finished"], slo["shed"], slo["classes"]["default"]["shed"]) == (0, 1, 1)


def test_a_lost_slot_ends_the_server():
    house = House([(0.0, ask("a")), (5.0, ask("b")), (9.0, Shutdown())])
    house.cache.allocator.alloc_extend(None, 0, 1)  # lost
    with pytest.raises(AssertionError, match="in flight"):
        house.run()


def test_an_idle_server_is_not_hung():
    house = House([(10 * WATCHDOG_S, ask("a")), (20 * WATCHDOG_S, Shutdown())]).run()
    assert house.ends() == {"a": "length"}


def test_a_server_busy_for_long_is_not_hung():
    house = House(
        [(0.0, ask("a", max_new_tokens=90)), (20 * WATCHDOG_S, Shutdown())],
        cost=lambda batch, layers, lane: 0.9 * WATCHDOG_S,
    ).run()
    assert house.ends() == {}  # still at it
    assert len(house.ids("a")) > 10


def test_a_server_that_never_waits_for_its_device_is_not_hung():
    """Every turn finds something finished, so the loop never rests."""
    script = [(0.0, ask(f"r{i}", tokens=5 + i, max_new_tokens=60)) for i in range(8)]
    house = House(
        [*script, (2000.0, Shutdown())], cost=lambda batch, layers, lane: 0.0, turn_s=1.0
    ).run()
    assert len(house.ends()) == 8


def test_work_that_never_ends_is_a_hang():
    house = House(
        [(5.0, ask("a")), (10 * WATCHDOG_S, Shutdown())], cost=lambda batch, layers, lane: 1e9
    )
    with pytest.raises(Hung):
        house.run()
    assert house.clock.now_s == pytest.approx(5.0 + WATCHDOG_S, abs=1.0)


class NeverAdmits(SplitByBatchSize):
    def admit(self, view, now_s) -> None:
        return None


def test_requests_that_wait_for_ever_are_a_hang():
    house = House(
        [(5.0, ask("a")), (10 * WATCHDOG_S, Shutdown())], dispatcher=NeverAdmits(TABLE, (1, 3))
    )
    with pytest.raises(Hung):
        house.run()
    assert house.clock.now_s == pytest.approx(5.0 + WATCHDOG_S, abs=1.0)


class ByTokens:
    """A latency model for cost_by_tokens, roughly."""

    def decode(self, shape, partition, beside) -> Forecast:
        return Forecast(0.01, 0.012)

    def prefill(self, shape, partition, beside) -> Forecast:
        return Forecast(0.001 * shape.tokens, 0.0012 * shape.tokens)

    def fused(self, decode, prefill) -> Forecast:
        return Forecast(0.01 + 0.001 * prefill.tokens, 0.012 + 0.0012 * prefill.tokens)


POLICIES = (
    "turns",
    "table",
    "chunked:16",
    "static:2/2",
    "adaptive",
    "adaptive:fused-only",
    "temporal",
)


def crowd() -> list[tuple[float, Message]]:
    return [
        (0.3 * i, ask(f"r{i}", tokens=5 + 17 * i % 60, max_new_tokens=3 + i % 9)) for i in range(40)
    ]


def make_policy(text: str):
    return PolicyFactory(TABLE, ByTokens(), num_layers=4, max_batch_tokens=32).make(text)


@pytest.mark.parametrize("stride", [1, 2, 3])
def test_a_policy_may_change_at_any_time_and_no_token_does(stride):
    """Each policy takes over what another has in flight: batches, parked ones, fused steps."""
    order = [POLICIES[stride * i % len(POLICIES)] for i in range(100)]
    switches = [
        (0.37 * i, SetPolicy(call_id=i, policy=policy)) for i, policy in enumerate(order, start=1)
    ]
    end = (600.0, Shutdown())

    def slow(batch, layers, lane) -> float:
        return 20 * cost_by_tokens(batch, layers, lane)

    switched = House([*crowd(), *switches, end], cost=slow, make_policy=make_policy).run()
    steady = House([*crowd(), end], cost=slow).run()
    assert all(reply.ok for _, reply in switched.tokenizer.sent)
    assert len(switched.tokenizer.sent) == 100
    assert set(switched.ends().values()) == {"length"}
    assert len(switched.ends()) == 40
    assert all(switched.ids(f"r{i}") == steady.ids(f"r{i}") for i in range(40))


@pytest.mark.parametrize("last", POLICIES)
@pytest.mark.parametrize("first", POLICIES)
def test_a_policy_ends_what_another_has_begun(first, last):
    """At a moment when a prompt is half filled and another request decodes."""
    house = House(
        [
            (0.0, SetPolicy(call_id=1, policy=first)),
            (0.0, ask("a", max_new_tokens=60)),
            (8.0, ask("b", tokens=70)),
            (8.0, ask("c", tokens=60)),
            (9.5, SetPolicy(call_id=2, policy=last)),
            (300.0, Shutdown()),
        ],
        cost=one_second_a_launch,
        make_policy=make_policy,
    ).run()
    assert house.ends() == {"a": "length", "b": "length", "c": "length"}


def test_a_policy_that_does_not_exist_leaves_the_one_there_is():
    house = House(
        [
            (0.0, SetPolicy(call_id=1, policy="turns")),
            (1.0, SetPolicy(call_id=2, policy="best")),
            (2.0, GetState(call_id=3)),
            (3.0, Shutdown()),
        ],
        make_policy=make_policy,
    ).run()
    replies = [reply for _, reply in house.tokenizer.sent]
    assert [reply.ok for reply in replies] == [True, False, True]
    assert "'best'" in replies[1].message
    assert replies[2].data["pd_multiplex"]["policy"] == "turns"


def test_another_policy_learns_anew_what_the_host_adds():
    house = House(
        [
            (0.0, ask("a", max_new_tokens=60)),
            (30.25, GetState(call_id=1)),
            (30.5, SetPolicy(call_id=2, policy="turns")),
            (30.75, GetState(call_id=3)),
            (300.0, Shutdown()),
        ],
        cost=one_second_a_launch,
        make_policy=make_policy,
    ).run()
    before, _, after = (reply for _, reply in house.tokenizer.sent)
    assert before.data["pd_multiplex"]["host_allowance_s"] < START_S
    assert after.data["pd_multiplex"]["host_allowance_s"] == START_S


def test_the_timeline_is_told_page_by_page_while_work_is_in_flight():
    house = House(
        [
            (0.0, ask("a", tokens=30, max_new_tokens=20)),
            (8.5, GetTimeline(call_id=1, seconds=5.0)),
            (8.6, GetTimeline(call_id=2, seconds=5.0, next_run=0, next_sample=0)),
            (60.0, Shutdown()),
        ],
        cost=one_second_a_launch,
    ).run()
    last_seconds, from_the_start = [reply.data["page"] for _, reply in house.tokenizer.sent]
    assert [run.span.end_s for run in last_seconds.runs] == [4.0, 5.0, 6.0, 7.0, 8.0]
    assert len(from_the_start.runs) == 8
    assert from_the_start.runs[-1].decode.requests == 1
    assert last_seconds.samples[-1].running == 1
    assert house.tokenizer.sent[0][1].data["total_sms"] == 4


@dataclass(frozen=True, slots=True)
class Patient(SplitByBatchSize):
    """Admits nobody before `ready_s`, and says so."""

    ready_s: float = 0.0

    def admit(self, view, now_s) -> Admission | None:
        return SplitByBatchSize.admit(self, view, now_s) if now_s >= self.ready_s else None

    def dispatch(self, view, now_s) -> Plan:
        plan = SplitByBatchSize.dispatch(self, view, now_s)
        return replace(plan, look_again_s=self.ready_s) if now_s < self.ready_s else plan


def test_the_loop_wakes_when_the_dispatcher_wants_to_look_again():
    ready_s = 1.0723
    house = House(
        [(1.0, ask("a")), (2.0, Shutdown())],
        dispatcher=Patient(TABLE, (1, 3), ready_s=ready_s),
    ).run()
    [first_s, *_] = [time_s for time_s, sent in house.detokenizer.sent]
    assert ready_s < first_s < ready_s + 2e-3


class FakeDevice:
    """Notes what is done to it; `engine` must have nothing in flight then."""

    def __init__(self) -> None:
        self.done: list[tuple] = []
        self.released = frozenset()
        self.fails = False
        self.house: House | None = None

    def _note(self, *what) -> None:
        assert self.house is not None
        assert self.house.gang.idle, f"{what} with work in flight"
        if self.fails:
            raise ConfigError("the new weights do not fit")
        self.done.append((self.house.clock.now_s, *what))

    def update_weights(self, model_path, load_format, beat) -> None:
        self._note("update", model_path, load_format)

    def rows(self, name, count):
        return [name] * count

    def release(self, tags) -> None:
        self._note("release", *tags)
        self.released |= frozenset(tags)

    def resume(self, tags, beat) -> None:
        self._note("resume", *tags)
        self.released -= frozenset(tags)

    def usage(self):
        return {}


def operating(script, **options) -> House:
    """A house whose launches take a second, on a fake device."""
    device = FakeDevice()
    house = House(script, cost=one_second_a_launch, device=device, **options)
    device.house = house
    return house


def plain_answers(*requests) -> dict[str, list[int]]:
    house = House([*((0.0, request) for request in requests), (900.0, Shutdown())]).run()
    return {request.rid: house.ids(request.rid) for request in requests}


def token_times(house: House, rid: str) -> list[float]:
    return [
        time_s
        for time_s, batch in house.detokenizer.sent
        if isinstance(batch, TokenBatch) and rid in batch.rids
        for _ in batch.new_ids[batch.rids.index(rid)]
    ]


@pytest.mark.parametrize("mode", ["in_place", "retract"])
def test_a_pause_changes_no_answer_and_nothing_runs_meanwhile(mode):
    long, late = ask("a", tokens=9, max_new_tokens=8), ask("b", tokens=7)
    house = operating(
        [
            (0.0, long),
            (3.5, PauseGeneration(call_id=1, mode=mode)),
            (10.0, late),
            (WATCHDOG_S * 3, ContinueGeneration(call_id=2)),
            (400.0, Shutdown()),
        ]
    ).run()
    assert house.ends() == {"a": "length", "b": "length"}
    assert {rid: house.ids(rid) for rid in "ab"} == plain_answers(long, late)
    [(paused_s, *paused), (continued_s, *continued)] = house.replies()
    assert (paused, continued) == ([1, True], [2, True])
    assert 3.5 < paused_s < 7.0
    times = token_times(house, "a") + token_times(house, "b")
    assert not [time_s for time_s in times if paused_s < time_s <= continued_s]
    assert house.engine.retractions == (mode == "retract")


def test_a_pause_that_retracts_lets_the_cache_be_flushed_and_one_in_place_does_not():
    for mode, flushed in (("retract", True), ("in_place", False)):
        script = [
            (0.0, ask("a", tokens=9, max_new_tokens=8)),
            (3.5, PauseGeneration(call_id=1, mode=mode)),
            (10.0, FlushCache(call_id=2, timeout_s=1.0)),
            (20.0, ContinueGeneration(call_id=3)),
            (100.0, Shutdown()),
        ]
        house = operating(script).run()
        assert [(call, ok) for _, call, ok in house.replies()] == [
            (1, True),
            (2, flushed),
            (3, True),
        ]
        assert house.ids("a") == plain_answers(ask("a", tokens=9, max_new_tokens=8))["a"]


@pytest.mark.parametrize("mode", ["in_place", "retract"])
def test_a_half_filled_prompt_survives_a_pause(mode):
    long = ask("a", tokens=80)
    house = operating(
        [
            (0.0, long),
            (1.5, PauseGeneration(call_id=1, mode=mode)),
            (50.0, ContinueGeneration(call_id=2)),
            (200.0, Shutdown()),
        ]
    ).run()
    assert token_times(house, "a")[0] > 50.0
    assert house.ids("a") == plain_answers(long)["a"]


def test_a_pause_that_aborts_ends_all_and_keeps_later_requests_waiting():
    house = operating(
        [
            (0.0, ask("a", max_new_tokens=50)),
            (2.5, PauseGeneration(call_id=1, mode="abort")),
            (5.0, ask("b")),
            (60.0, ContinueGeneration(call_id=2)),
            (200.0, Shutdown()),
        ]
    ).run()
    assert house.ends() == {"a": "abort", "b": "length"}
    assert token_times(house, "b")[0] > 60.0


def test_new_weights_wait_for_those_who_run_and_others_wait_for_the_weights():
    house = operating(
        [
            (0.0, ask("a", max_new_tokens=6)),
            (1.5, UpdateWeights(call_id=1, model_path="new", load_format="auto")),
            (1.6, ask("b")),
            (100.0, Shutdown()),
        ]
    ).run()
    [(updated_s, *what)] = house.device.done
    assert what == ["update", "new", "auto"]
    assert token_times(house, "a")[-1] <= updated_s < token_times(house, "b")[0]
    assert house.ends() == {"a": "length", "b": "length"}


def test_new_weights_may_end_those_who_run():
    house = operating(
        [
            (0.0, ask("a", max_new_tokens=50)),
            (1.5, UpdateWeights(call_id=1, model_path="new", load_format="auto", abort_all=True)),
            (100.0, Shutdown()),
        ]
    ).run()
    assert house.ends() == {"a": "abort"}
    assert house.device.done[0][0] < 5.0


def test_new_weights_come_at_once_under_a_pause_but_not_with_a_flush_under_requests_in_place():
    update = UpdateWeights(call_id=2, model_path="new", load_format="auto")
    unflushed = UpdateWeights(call_id=3, model_path="new", load_format="auto", flush_cache=False)
    house = operating(
        [
            (0.0, ask("a", max_new_tokens=8)),
            (2.5, PauseGeneration(call_id=1, mode="in_place")),
            (9.0, update),
            (10.0, unflushed),
            (20.0, ContinueGeneration(call_id=4)),
            (100.0, Shutdown()),
        ]
    ).run()
    assert [(call, ok) for _, call, ok in house.replies()] == [
        (1, True),
        (2, False),
        (3, True),
        (4, True),
    ]
    assert "retract" in house.tokenizer.sent[1][1].message
    assert house.ends() == {"a": "length"}


def test_weights_that_fail_leave_the_server_as_it_was():
    house = operating(
        [
            (0.0, UpdateWeights(call_id=1, model_path="new", load_format="auto")),
            (5.0, ask("a")),
            (100.0, Shutdown()),
        ]
    )
    house.device.fails = True
    house.run()
    assert house.replies()[0][1:] == (1, False)
    assert "do not fit" in house.tokenizer.sent[0][1].message
    assert house.ids("a") == plain_answers(ask("a"))["a"]


def test_an_operation_gives_up_on_requests_that_do_not_end():
    house = House(
        [
            (0.0, ask("a", max_new_tokens=90)),
            (5.0, UpdateWeights(call_id=1, model_path="new", load_format="auto")),
            (2000.0, Shutdown()),
        ],
        cost=lambda batch, layers, lane: 20.0,
        device=FakeDevice(),
    )
    house.device.house = house
    house.run()
    [(gave_up_s, call_id, ok)] = house.replies()
    assert (call_id, ok) == (1, False)
    assert 605.0 <= gave_up_s < 650.0
    assert house.ends() == {"a": "length"}


def test_released_memory_keeps_requests_waiting_until_all_of_it_is_back():
    house = operating(
        [
            (0.0, ask("a")),
            (1.0, ReleaseMemory(call_id=1, tags=["kv_cache", "weights"])),
            (20.0, ask("b")),
            (25.0, ContinueGeneration(call_id=2)),
            (30.0, ResumeMemory(call_id=3, tags=["weights"])),
            (40.0, ResumeMemory(call_id=4, tags=["kv_cache"])),
            (100.0, Shutdown()),
        ]
    ).run()
    assert [what for _, what, *_ in house.device.done] == ["release", "resume", "resume"]
    assert house.device.done[0][0] >= token_times(house, "a")[-1]
    assert [(call, ok) for _, call, ok in house.replies()] == [
        (1, True),
        (2, False),
        (3, True),
        (4, True),
    ]
    assert token_times(house, "b")[0] > 40.0
    assert house.ids("b") == house.ids("a")


def test_a_policy_set_under_a_pause_decides_after_it():
    policies = PolicyFactory(TABLE, None, 4, 32)
    house = operating(
        [
            (0.0, PauseGeneration(call_id=1, mode="in_place")),
            (1.0, SetPolicy(call_id=2, policy="turns")),
            (2.0, ask("a")),
            (9.0, ContinueGeneration(call_id=3)),
            (50.0, Shutdown()),
        ],
        make_policy=policies.make,
    ).run()
    assert token_times(house, "a")[0] > 9.0
    assert {run.partition for run in house.timeline.runs(Phase.PREFILL)} == {TABLE.whole}


def test_limits_can_change_while_it_runs():
    house = operating(
        [
            (0.0, PauseGeneration(call_id=1, mode="in_place")),
            (1.0, SetInternalState(call_id=2, values={"max_queued_requests": 1})),
            (2.0, ask("a")),
            (3.0, ask("b")),
            (9.0, ContinueGeneration(call_id=3)),
            (50.0, Shutdown()),
        ]
    ).run()
    assert house.ends() == {"a": "length", "b": "abort"}


def test_parameters_can_be_read_while_requests_run():
    house = operating(
        [
            (0.0, ask("a", max_new_tokens=8)),
            (2.5, GetWeights(call_id=1, name="w", rows=2)),
            (50.0, Shutdown()),
        ]
    ).run()
    [(time_s, reply)] = house.tokenizer.sent
    assert reply.data == {"values": ["w", "w"]}
    assert time_s < token_times(house, "a")[-1]
