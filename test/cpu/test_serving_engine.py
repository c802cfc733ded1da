"""The engine, the gang and the memory accounts together, over a fake runner in virtual time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from drift_scheduler.dispatcher import SplitByBatchSize, TakeTurns
from drift_scheduler.gang import Gang
from drift_scheduler.lane_virtual import VirtualClock, VirtualLanes
from drift_scheduler.partition import Partition, PartitionTable
from drift_scheduler.timeline import Timeline
from sglang.srt.managers.outbox import Outbox
from sglang.srt.managers.serving_engine import EngineLimits, ServingEngine
from sglang.srt.mem_cache.radix_cache import RadixCache
from sglang.srt.mem_cache.sequence_cache import SequenceCache
from sglang.srt.mem_cache.slot_allocator import SlotAllocator
from sglang.srt.mem_cache.slot_table import RowPool
from sglang.srt.messages import FinishReason, GenerateRequest
from sglang.srt.model_executor.fake_runner import FakeRunner, choose_by_hash, prefix_hash
from sglang.srt.model_executor.host_batch import SampleRow
from sglang.srt.sampling_params import SamplingParams

VOCAB_SIZE = 19
EOS = 7
TURN_LIMIT = 20_000
TABLE = PartitionTable(4, (Partition(1, 3, 1), Partition(2, 2, 2), Partition(3, 1, 3)))


@dataclass(frozen=True)
class Setup:
    """Sizes of a small server. pool_pages does not count the scratch page."""

    pool_pages: int = 256
    page_size: int = 1
    max_running: int = 8
    context_length: int = 64
    prefill_tokens: int = 16
    chunked: bool = True
    split: bool = True
    cache: bool = True
    policy: str = "fcfs"
    decode_depth: int = 2
    prefill_max_requests: int | None = None
    max_queued: int | None = None
    conservativeness: float = 1.0
    stream_interval: int = 1

    @property
    def pool_tokens(self) -> int:
        return self.pool_pages * self.page_size

    @property
    def room(self) -> int:
        return min(self.pool_tokens, self.context_length)


@dataclass
class Answer:
    """What a client has seen of one request."""

    ids: list[int] = field(default_factory=list)
    finish: FinishReason | None = None
    cached_tokens: int = 0
    retractions: int = 0


class Server:
    """The real engine and gang, with a client that checks the order of what it hears."""

    def __init__(self, setup: Setup, num_layers: int = 4) -> None:
        num_slots = setup.pool_tokens + setup.page_size
        allocator = SlotAllocator(num_slots, setup.page_size)
        radix = RadixCache(setup.page_size, allocator.free, enabled=setup.cache)
        self.cache = SequenceCache(radix, allocator)
        self.runner = FakeRunner(
            num_layers=num_layers,
            num_slots=num_slots,
            num_rows=setup.max_running + 1,
            context_length=setup.context_length,
            choose=choose_by_hash(VOCAB_SIZE),
        )
        self.outbox = Outbox(setup.stream_interval)
        self.engine = ServingEngine(
            self.runner,
            self.cache,
            RowPool(setup.max_running + 1),
            EngineLimits(
                context_length=setup.context_length,
                prefill_tokens=setup.prefill_tokens,
                chunked=setup.chunked,
                prefill_max_requests=setup.prefill_max_requests,
                max_queued=setup.max_queued,
                conservativeness=setup.conservativeness,
                schedule_policy=setup.policy,
            ),
            eos_token_ids=frozenset({EOS}),
            outbox=self.outbox,
            random_seed=1,
        )
        self.clock = VirtualClock()
        self.lanes = VirtualLanes(TABLE, self.clock)
        self.timeline = Timeline()
        depth = setup.decode_depth
        dispatcher = (
            SplitByBatchSize(TABLE, (1, 3, 5), decode_depth=depth)
            if setup.split
            else TakeTurns(TABLE, decode_depth=depth)
        )
        self.gang = Gang(self.engine, self.lanes, dispatcher, self.timeline, self.clock)
        self.answers: dict[str, Answer] = {}
        self._arrivals = 0

    def ask(self, rid: str, prompt: Sequence[int], namespace: str = "", **sampling) -> None:
        self._arrivals += 1
        self.engine.add(
            GenerateRequest(
                rid=rid,
                input_ids=list(prompt),
                sampling=SamplingParams(**{"temperature": 0.0, **sampling}),
                arrival_s=self.clock.now_s + self._arrivals * 1e-9,
                namespace=namespace,
            )
        )

    def turn(self) -> bool:
        progressed = self.gang.turn()
        self.engine.check()
        self._read()
        return progressed

    def settle(self, until_s: float = math.inf) -> None:
        """Turns until nothing is left to do before `until_s`."""
        for _ in range(TURN_LIMIT):
            if self.turn():
                continue
            next_s = self.lanes.next_completion_s()
            if next_s is None or next_s > until_s:
                break
            self.clock.advance_to(next_s)
        else:
            pytest.fail(f"not settled after {TURN_LIMIT} turns")
        if until_s != math.inf:
            self.clock.advance_to(max(until_s, self.clock.now_s))

    def finish(self) -> None:
        """Runs until every request is gone."""
        self.settle()
        assert self.engine.idle and self.gang.idle, (
            f"stuck: {self.engine.queued} queued, {self.engine.num_running} running"
        )
        self.engine.check()
        assert self.cache.num_open == 0
        assert self.cache.available_tokens == self.cache.allocator.total

    def answer(self, rid: str, prompt: Sequence[int], **options) -> Answer:
        """One request from its arrival to its end."""
        self.ask(rid, prompt, **options)
        self.finish()
        return self.answers[rid]

    def _read(self) -> None:
        batch = self.outbox.flush()
        if batch is None:
            return
        for options in batch.opened:
            assert options.rid not in self.answers, f"{options.rid} is opened twice"
            self.answers[options.rid] = Answer()
        for i, rid in enumerate(batch.rids):
            answer = self.answers[rid]
            assert answer.finish is None, f"{rid} is heard of after its end"
            answer.ids += batch.new_ids[i]
            answer.finish = batch.finish[i]
            answer.cached_tokens = batch.cached_tokens[i]
            answer.retractions = batch.retractions[i]
            assert batch.completion_tokens[i] == len(answer.ids)


def reference(
    prompt: Sequence[int], sampling: SamplingParams, room: int
) -> tuple[list[int], FinishReason]:
    """The answer of a server with endless memory that serves nobody else."""
    choose = choose_by_hash(VOCAB_SIZE)
    limit = room - len(prompt) if sampling.max_new_tokens is None else sampling.max_new_tokens
    stops = {*sampling.stop_token_ids} | (set() if sampling.ignore_eos else {EOS})
    ids: list[int] = []
    while len(ids) < limit:
        position = len(prompt) + len(ids)
        row = SampleRow(
            sampling=sampling,
            seed=0,
            position=position,
            withheld_ids=tuple(stops),
            withheld_until=len(prompt) + sampling.min_new_tokens,
        )
        ids.append(choose(prefix_hash([*prompt, *ids]), row))
        if ids[-1] in stops:
            return ids, FinishReason(type="stop", matched=ids[-1])
    return ids, FinishReason(type="length", length=len(ids))


def answer_of(prompt: Sequence[int], room: int = 64, **sampling) -> list[int]:
    return reference(prompt, SamplingParams(temperature=0.0, **sampling), room)[0]


# Random traffic.


@dataclass(frozen=True)
class Wish:
    """One request and what its client does to it. Times are microseconds; None means never."""

    arrival_us: int
    prompt: tuple[int, ...]
    namespace: str
    sampling: SamplingParams
    abort_after_us: int | None
    stop_after_us: int | None


_SHARED = [[(17 * i + 5 * j) % VOCAB_SIZE for i in range(40)] for j in range(2)]


@st.composite
def wishes(draw: st.DrawFn) -> Wish:
    shared = draw(st.sampled_from(_SHARED))[: draw(st.integers(0, 36))]
    own = draw(st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=10))
    limit = draw(st.sampled_from([0, 1, 2, 5, 12, 20, None]))
    minimum = draw(st.integers(0, 4)) if limit is None else draw(st.integers(0, min(limit, 4)))
    # 1 time in 4 the client leaves early, 1 time in 6 the detokenizer finds a stop string.
    leaves = draw(st.integers(0, 3)) == 0
    matches = draw(st.integers(0, 5)) == 0
    return Wish(
        arrival_us=draw(st.integers(0, 1500)),
        prompt=(*shared, *own),
        namespace=draw(st.sampled_from(["", "", "other"])),
        sampling=SamplingParams(
            temperature=0.0,
            max_new_tokens=limit,
            min_new_tokens=minimum,
            ignore_eos=draw(st.booleans()),
            stop_token_ids=draw(st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=2)),
        ),
        abort_after_us=draw(st.integers(0, 900)) if leaves else None,
        stop_after_us=draw(st.integers(0, 900)) if matches else None,
    )


@st.composite
def setups(draw: st.DrawFn) -> Setup:
    page_size = draw(st.sampled_from([1, 4, 16]))
    tokens = draw(st.sampled_from([32, 48, 64, 96, 160, 512]))
    return Setup(
        pool_pages=tokens // page_size,
        page_size=page_size,
        max_running=draw(st.integers(1, 6)),
        prefill_tokens=draw(st.sampled_from([16, 32, 64])),
        chunked=draw(st.booleans()),
        split=draw(st.booleans()),
        cache=draw(st.integers(0, 3)) > 0,
        policy=draw(st.sampled_from(["fcfs", "lpm"])),
        decode_depth=draw(st.integers(1, 3)),
        prefill_max_requests=draw(st.sampled_from([None, None, 1, 2])),
        conservativeness=draw(st.sampled_from([0.0, 0.3, 1.0])),
        stream_interval=draw(st.sampled_from([1, 1, 3])),
    )


@settings(
    max_examples=250,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(setup=setups(), traffic=st.lists(wishes(), min_size=1, max_size=14))
def test_any_traffic_gets_the_answers_of_an_unbatched_server(setup, traffic):
    server = Server(setup)
    events = []
    for index, wish in enumerate(traffic):
        rid = f"r{index:02d}"
        events.append((wish.arrival_us, 0, rid, wish))
        if wish.stop_after_us is not None:
            events.append((wish.arrival_us + wish.stop_after_us, 1, rid, wish))
        if wish.abort_after_us is not None:
            events.append((wish.arrival_us + wish.abort_after_us, 2, rid, wish))
    for time_us, kind, rid, wish in sorted(events, key=lambda event: event[:3]):
        server.settle(until_s=time_us * 1e-6)
        if kind == 0:
            server.engine.add(
                GenerateRequest(
                    rid=rid,
                    input_ids=list(wish.prompt),
                    sampling=wish.sampling,
                    arrival_s=server.clock.now_s,
                    namespace=wish.namespace,
                )
            )
        elif kind == 1:
            server.engine.stop_matched(rid)
        else:
            server.engine.abort(rid)
        server.engine.check()
    server.finish()

    assert len(server.answers) == len(traffic)
    for index, wish in enumerate(traffic):
        answer = server.answers[f"r{index:02d}"]
        assert answer.finish is not None
        limit = wish.sampling.max_new_tokens
        if len(wish.prompt) + (limit or 0) > setup.room:
            assert answer.finish.status_code == 400
            assert not answer.ids
            continue
        ids, finish = reference(wish.prompt, wish.sampling, setup.room)
        assert answer.cached_tokens % setup.page_size == 0
        assert answer.cached_tokens < len(wish.prompt)
        assert setup.cache or answer.cached_tokens == 0
        if answer.finish == finish:
            assert answer.ids == ids
        else:
            assert answer.ids == ids[: len(answer.ids)]
            if answer.finish.type == "abort":
                assert wish.abort_after_us is not None
                assert answer.finish.status_code == 499
            else:
                assert wish.stop_after_us is not None
                assert answer.finish == FinishReason(type="stop")


def test_a_half_filled_prompt_and_a_growing_answer_do_not_block_each_other():
    server = Server(
        Setup(pool_pages=32, prefill_tokens=16, conservativeness=0.0, cache=False)
    )
    grows, waits = [1] * 8, [2] * 20
    server.ask("grows", grows, max_new_tokens=20, ignore_eos=True)
    server.settle(until_s=1e-4)
    server.ask("waits", waits, max_new_tokens=1)
    server.finish()
    assert server.answers["grows"].ids == answer_of(grows, max_new_tokens=20, ignore_eos=True)
    assert server.answers["waits"].ids == answer_of(waits, max_new_tokens=1)
    assert server.answers["grows"].retractions == 1
