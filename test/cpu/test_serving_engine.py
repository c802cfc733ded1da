"""The engine, the gang and the memory accounts together, over a fake runner in virtual time."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from drift_scheduler.dispatcher import Admission, Dispatcher, Plan
from drift_scheduler.gang import DecodeLoad, Gang
from drift_scheduler.lane import Phase
from drift_scheduler.lane_virtual import VirtualClock, VirtualLanes
from drift_scheduler.partition import Partition, PartitionTable
from drift_scheduler.policies.by_batch_size import SplitByBatchSize
from drift_scheduler.policies.chunked import Chunked
from drift_scheduler.policies.take_turns import TakeTurns
from drift_scheduler.shapes import DecodeShape, PrefillShape
from drift_scheduler.slo import Slo
from drift_scheduler.timeline import Timeline
from drift_scheduler.view import LoadView
from sglang.srt.logprobs import LogprobWish
from sglang.srt.managers.admission import EngineLimits
from sglang.srt.managers.answer_logprobs import AnswerLogprobs
from sglang.srt.managers.jobs import Fill, PrefillBatch
from sglang.srt.managers.outbox import Outbox
from sglang.srt.managers.serving_engine import ServingEngine
from sglang.srt.mem_cache.radix_cache import RadixCache
from sglang.srt.mem_cache.sequence_cache import SequenceCache
from sglang.srt.mem_cache.slot_allocator import SlotAllocator
from sglang.srt.mem_cache.slot_table import RowPool
from sglang.srt.messages import FinishReason, GenerateRequest, token_ids
from sglang.srt.model_executor.fake_runner import (
    FakeRunner,
    choose_by_hash,
    logprob_by_hash,
    prefix_hash,
)
from sglang.srt.model_executor.host_batch import SampleWish
from sglang.srt.queue import WaitingQueue
from sglang.srt.requests import Request
from sglang.srt.sampling_params import SamplingParams

VOCAB_SIZE = 19
EOS = 7
TURN_LIMIT = 20_000
NO_SLO = Slo()
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
    mode: str = "split"
    step_tokens: int = 16
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


class AnyMode:
    """A mode at random at every turn; never an empty turn where something could be launched and
    nothing is in flight."""

    def __init__(self, seed: int, decode_depth: int) -> None:
        self._random = random.Random(seed)
        self._decode_depth = decode_depth

    def admit(self, view: LoadView, now_s: float) -> Admission | None:
        return Admission() if view.prefill is None and self._random.random() < 0.5 else None

    def dispatch(self, view: LoadView, now_s: float) -> Plan:
        plans = self._plans(view)
        in_flight = view.decode_in_flight + (view.prefill.slices_in_flight if view.prefill else 0)
        if in_flight or not plans:
            plans.append(Plan(TABLE.whole))
        return self._random.choice(plans)

    def _plans(self, view: LoadView) -> list[Plan]:
        layers = view.prefill.layers_left if view.prefill else 0
        layers = self._random.randint(1, layers) if layers else 0
        split = self._random.choice(TABLE.splits)
        tokens = self._random.choice([1, 3, 8, 30])
        plans = [Plan(TABLE.whole, prefill_layers=layers)] if layers else []
        if view.decode_in_flight < self._decode_depth:
            if view.running:
                plans.append(Plan(TABLE.whole, decode=True))
                plans.append(Plan(split, decode=True, prefill_layers=layers))
            if view.running or view.can_fuse:
                plans.append(Plan(TABLE.whole, decode=True, fused_tokens=tokens))
        return plans


class AnyOrder(AnyMode):
    """Beside that: orders with names left out and others that nobody has, small batches, batches
    that pre-empt, and prompts refused. With nothing at work it names every prompt."""

    def admit(self, view: LoadView, now_s: float) -> Admission | None:
        if self._random.random() < 0.3:
            return None
        shed = ()
        if self._random.random() < 0.05:
            shed = tuple(self._some_keys(view)[:1])
        return Admission(
            order=self._random.choice([self._order(view), None]),
            tokens=self._random.choice([None, 1, 5, 20, 100]),
            preempts=view.prefill is not None,
            shed=shed,
        )

    def dispatch(self, view: LoadView, now_s: float) -> Plan:
        plan = super().dispatch(view, now_s)
        order = self._random.choice([self._order(view), None])
        return replace(plan, fused_order=order) if plan.fused_tokens else plan

    def _order(self, view: LoadView) -> tuple[str, ...]:
        keys = self._some_keys(view)
        if view.prefill or view.running:
            keys = keys[: self._random.randint(0, len(keys))]
        keys.insert(self._random.randint(0, len(keys)), "unknown")
        return tuple(keys)

    def _some_keys(self, view: LoadView) -> list[str]:
        keys = [prompt.key for prompt in view.backlog.oldest(len(view.backlog))]
        self._random.shuffle(keys)
        return keys


def dispatcher_of(setup: Setup) -> Dispatcher:
    depth = setup.decode_depth
    match setup.mode:
        case "split":
            return SplitByBatchSize(TABLE, (1, 3, 5), decode_depth=depth)
        case "turns":
            return TakeTurns(TABLE, decode_depth=depth)
        case "chunked":
            return Chunked(TABLE, setup.step_tokens, decode_depth=depth)
        case "any":
            return AnyMode(setup.step_tokens, depth)
        case "order":
            return AnyOrder(setup.step_tokens, depth)
    raise ValueError(setup.mode)


@dataclass
class Answer:
    """What a client has seen of one request."""

    ids: list[int] = field(default_factory=list)
    finish: FinishReason | None = None
    cached_tokens: int = 0
    retractions: int = 0
    logprobs: AnswerLogprobs = field(default_factory=AnswerLogprobs.empty)


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
        self.clock = VirtualClock()
        # Of each launch as it begins: (new, cached) tokens of its prompts, and who decodes.
        self.begun: list[tuple[str, list]] = []
        self.started: list[str] = []  # in the order of their first launch
        self.finished: list[Request] = []
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
            on_prefill=self._begun,
            on_decode=lambda members: self.begun.append(
                ("decode", [request.rid for request in members])
            ),
            on_finish=self.finished.append,
            clock=self.clock,
        )
        self.lanes = VirtualLanes(TABLE, self.clock)
        self.timeline = Timeline()
        self.gang = Gang(self.engine, self.lanes, dispatcher_of(setup), self.timeline, self.clock)
        self.answers: dict[str, Answer] = {}
        self._arrivals = 0

    def ask(
        self,
        rid: str,
        prompt: Sequence[int],
        namespace: str = "",
        slo: Slo = NO_SLO,
        rank: int = 0,
        **sampling,
    ) -> None:
        self._arrivals += 1
        self.engine.add(
            GenerateRequest(
                rid=rid,
                input_ids=token_ids(prompt),
                sampling=SamplingParams(**{"temperature": 0.0, **sampling}),
                arrival_s=self.clock.now_s + self._arrivals * 1e-9,
                namespace=namespace,
                slo=slo,
                rank=rank,
            )
        )

    def _begun(self, fills: Sequence[Fill]) -> None:
        self.begun.append(("prefill", [(fill.tokens, fill.cached_tokens) for fill in fills]))
        new = [fill.request.rid for fill in fills if fill.request.rid not in self.started]
        self.started += new

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
            if rid in batch.logprobs:
                answer.logprobs.take(batch.logprobs[rid])


def reference(
    prompt: Sequence[int], sampling: SamplingParams, room: int
) -> tuple[list[int], FinishReason]:
    """The answer of a server with endless memory that serves nobody else."""
    choose = choose_by_hash(VOCAB_SIZE)
    limit = room - len(prompt) if sampling.max_new_tokens is None else sampling.max_new_tokens
    stops = {*sampling.stop_token_ids} | (set() if sampling.ignore_eos else {EOS})
    wish = SampleWish(
        sampling=sampling,
        seed=0,
        withheld_ids=tuple(stops),
        withheld_until=len(prompt) + sampling.min_new_tokens,
    )
    ids: list[int] = []
    while len(ids) < limit:
        ids.append(choose(prefix_hash([*prompt, *ids]), wish, len(prompt) + len(ids)))
        if ids[-1] in stops:
            return ids, FinishReason(type="stop", matched=ids[-1])
    return ids, FinishReason(type="length", length=len(ids))


def answer_of(prompt: Sequence[int], room: int = 64, **sampling) -> list[int]:
    return reference(prompt, SamplingParams(**sampling), room)[0]


# Random traffic.


@dataclass(frozen=True)
class Wish:
    """One request and what its client does to it. Times are microseconds; None means never."""

    arrival_us: int
    prompt: tuple[int, ...]
    namespace: str
    sampling: SamplingParams
    slo: Slo
    logprobs: LogprobWish | None
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
    start = draw(st.integers(0, len(shared) + len(own)))
    return Wish(
        logprobs=draw(st.sampled_from([None, LogprobWish(start=start, top=2, token_ids=[5])])),
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
        slo=draw(st.sampled_from([Slo(), Slo(ttft_s=2e-4), Slo(1e-4, 2e-5, 3e-5)])),
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
        mode=draw(st.sampled_from(["split", "turns", "chunked", "any", "order", "order"])),
        step_tokens=draw(st.integers(1, 40)),
        cache=draw(st.integers(0, 3)) > 0,
        policy=draw(st.sampled_from(["fcfs", "lpm"])),
        decode_depth=draw(st.integers(1, 3)),
        prefill_max_requests=draw(st.sampled_from([None, None, 1, 2])),
        conservativeness=draw(st.sampled_from([0.0, 0.3, 1.0])),
        stream_interval=draw(st.sampled_from([1, 1, 3])),
    )


def check_logprobs(answer: Answer, wish: Wish) -> None:
    """Each value is that of its place, told once, wherever the prefix came from."""
    got, asked = answer.logprobs, wish.logprobs
    if asked is None:
        assert got.prompt.tokens == got.output.tokens == []
        return

    def value(position: int, token: int) -> float:
        return logprob_by_hash(prefix_hash([*wish.prompt, *answer.ids][:position]), token)

    lengths = [len(got.prompt.tokens), len(got.output.tokens)]
    if answer.ids:
        assert lengths == [len(wish.prompt) - asked.start, len(answer.ids)]
        assert answer.cached_tokens <= max(asked.start, 0)
    spans = [(got.prompt, asked.start), (got.output, len(wish.prompt))]
    for lists, start in spans:
        for i, (logprob, token, text) in enumerate(lists.tokens):
            position = start + i
            assert (token, text) == ([*wish.prompt, *answer.ids][position], None)
            if lists is got.prompt and i == 0:
                assert logprob is lists.top[i] is lists.listed[i] is None
                continue
            assert logprob == value(position, token)
            assert lists.top[i] == [(value(position, other), other, None) for other in (0, 1)]
            assert lists.listed[i] == [(value(position, 5), 5, None)]


@settings(
    max_examples=400,
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
                    input_ids=token_ids(wish.prompt),
                    sampling=wish.sampling,
                    arrival_s=server.clock.now_s,
                    namespace=wish.namespace,
                    slo=wish.slo,
                    logprobs=wish.logprobs,
                )
            )
        elif kind == 1:
            server.engine.stop_matched(rid)
        else:
            server.engine.abort(rid)
        server.engine.check()
    server.finish()

    assert sorted(request.rid for request in server.finished) == sorted(server.answers)
    if setup.mode != "order" and setup.policy == "fcfs":  # then nobody is overtaken
        arrivals = {f"r{i:02d}": (wish.arrival_us, i) for i, wish in enumerate(traffic)}
        assert server.started == sorted(server.started, key=arrivals.__getitem__)
    for batch in server.runner.launched:
        prompts = len(batch.rows) - batch.decode_reqs
        tokens = int(batch.new_lens[batch.decode_reqs :].sum())
        assert prompts <= (setup.prefill_max_requests or prompts)
        if setup.mode == "chunked":
            assert batch.decode_reqs + tokens <= setup.step_tokens or not tokens
        else:
            fused = setup.mode in ("any", "order") and tokens <= 30
            whole_prompt = not setup.chunked and prompts == 1
            assert tokens <= setup.prefill_tokens or whole_prompt or fused
    if setup.mode == "chunked":
        assert not server.timeline.runs(Phase.PREFILL)
    assert len(server.answers) == len(traffic)
    for index, wish in enumerate(traffic):
        answer = server.answers[f"r{index:02d}"]
        assert answer.finish is not None
        limit = wish.sampling.max_new_tokens
        if len(wish.prompt) + (limit or 0) > setup.room:
            assert answer.finish.status_code == 400
            assert not answer.ids
            continue
        check_logprobs(answer, wish)
        ids, finish = reference(wish.prompt, wish.sampling, setup.room)
        assert answer.cached_tokens % setup.page_size == 0
        assert answer.cached_tokens < len(wish.prompt)
        assert setup.cache or answer.cached_tokens == 0
        if answer.finish == finish:
            assert answer.ids == ids
        else:
            assert answer.ids == ids[: len(answer.ids)]
            if answer.finish.status_code == 503:
                assert setup.mode == "order"
                assert "--slo-overload" in answer.finish.message
                assert not answer.ids
            elif answer.finish.type == "abort":
                assert wish.abort_after_us is not None
                assert answer.finish.status_code == 499
            else:
                assert wish.stop_after_us is not None
                assert answer.finish == FinishReason(type="stop")


def test_a_half_filled_prompt_and_a_growing_answer_do_not_block_each_other():
    server = Server(Setup(pool_pages=32, prefill_tokens=16, conservativeness=0.0, cache=False))
    grows, waits = [1] * 8, [2] * 20
    server.ask("grows", grows, max_new_tokens=20, ignore_eos=True)
    server.settle(until_s=1e-4)
    server.ask("waits", waits, max_new_tokens=1)
    server.finish()
    assert server.answers["grows"].ids == answer_of(grows, max_new_tokens=20, ignore_eos=True)
    assert server.answers["waits"].ids == answer_of(waits, max_new_tokens=1)
    assert server.answers["grows"].retractions == 1


def prompt_of(length: int, start: int = 0) -> list[int]:
    return [(start + 3 * i) % VOCAB_SIZE for i in range(length)]


@pytest.mark.parametrize(("page_size", "reused"), [(1, 10 + 6 - 1), (4, 12)])
def test_the_next_turn_of_a_conversation_reuses_all_computed_tokens(page_size, reused):
    server = Server(Setup(page_size=page_size))
    first = prompt_of(10)
    answer = server.answer("first", first, max_new_tokens=6, ignore_eos=True)
    assert answer.cached_tokens == 0
    second = [*first, *answer.ids, 4, 4]
    assert server.answer("second", second, max_new_tokens=3).cached_tokens == reused
    assert server.answers["second"].ids == answer_of(second, max_new_tokens=3)


def test_what_was_computed_beyond_a_stop_stays_cached():
    """The step behind the one that stops was in flight; it has computed the last token."""
    server = Server(Setup())
    prompt = prompt_of(5)
    stop = answer_of(prompt, max_new_tokens=12, ignore_eos=True)[4]
    answer = server.answer("stops", prompt, max_new_tokens=12, stop_token_ids=[stop])
    assert answer.finish.type == "stop"
    following = [*prompt, *answer.ids, 1]
    cached = server.answer("next", following, max_new_tokens=1).cached_tokens
    assert cached == len(prompt) + len(answer.ids)


def test_namespaces_share_nothing():
    server = Server(Setup())
    prompt = prompt_of(10)
    for namespace, cached_tokens in [("a", 0), ("b", 0), ("a", 9), ("b", 9), ("", 0)]:
        rid = f"{len(server.answers)}"
        answer = server.answer(rid, prompt, namespace=namespace, max_new_tokens=2)
        assert answer.cached_tokens == cached_tokens
        assert answer.ids == answer_of(prompt, max_new_tokens=2)


def test_without_a_cache_nothing_is_reused_and_nothing_is_kept():
    server = Server(Setup(cache=False))
    for rid in ("a", "b"):
        assert server.answer(rid, prompt_of(10), max_new_tokens=2).cached_tokens == 0
        assert server.cache.allocator.available == server.cache.allocator.total


def test_max_new_tokens_0_only_fills_the_cache():
    server = Server(Setup())
    answer = server.answer("warm", prompt_of(40), max_new_tokens=0)
    assert answer.ids == []
    assert answer.finish == FinishReason(type="length", length=0)
    assert not any(batch.is_decode or batch.samples for batch in server.runner.launched)
    assert server.answer("next", prompt_of(40), max_new_tokens=1).cached_tokens == 39


def test_stop_ids_end_an_answer_but_not_before_min_new_tokens():
    server = Server(Setup())
    prompt = prompt_of(5)
    free = answer_of(prompt, max_new_tokens=12, ignore_eos=True)
    stop = free[2]
    answer = server.answer("stops", prompt, max_new_tokens=12, stop_token_ids=[stop])
    assert answer.ids == free[: free.index(stop) + 1]
    assert answer.finish == FinishReason(type="stop", matched=stop)
    later = server.answer(
        "later", prompt, max_new_tokens=12, stop_token_ids=[stop], min_new_tokens=6, ignore_eos=True
    )
    assert len(later.ids) > 6
    assert stop not in later.ids[:6]


def test_an_answer_without_limit_fills_the_context():
    server = Server(Setup(context_length=30))
    answer = server.answer("long", prompt_of(10), max_new_tokens=None, ignore_eos=True)
    assert answer.finish == FinishReason(type="length", length=20)


@pytest.mark.parametrize("max_new_tokens", [23, 1000])
def test_a_request_larger_than_the_pool_is_refused_and_names_the_flags(max_new_tokens):
    server = Server(Setup(pool_pages=32))
    answer = server.answer("large", prompt_of(10), max_new_tokens=max_new_tokens)
    assert answer.finish.status_code == 400
    assert "--max-total-tokens" in answer.finish.message
    assert "--mem-fraction-static" in answer.finish.message
    assert str(max_new_tokens) in answer.finish.message
    assert not server.runner.launched
    fits = server.answer("fits", prompt_of(10), max_new_tokens=22, ignore_eos=True)
    assert len(fits.ids) == 22


def test_a_full_queue_refuses_with_503_and_names_the_flag():
    server = Server(Setup(max_queued=2))
    for index in range(4):
        server.ask(f"r{index}", prompt_of(6, start=index), max_new_tokens=2)
    server.finish()
    codes = [server.answers[f"r{index}"].finish.status_code for index in range(4)]
    assert codes == [None, None, 503, 503]
    assert "--max-queued-requests 2" in server.answers["r2"].finish.message
    assert server.answer("later", prompt_of(6), max_new_tokens=2).finish.type != "abort"


def test_an_id_in_use_is_refused():
    server = Server(Setup())
    server.ask("same", prompt_of(5), max_new_tokens=2)
    server.ask("same", prompt_of(6), max_new_tokens=2)
    batch = server.outbox.flush()
    assert batch.rids == ["same"]
    assert batch.finish[0].status_code == 400


def test_an_abort_during_prefill_stops_its_layers_and_gives_back_its_memory():
    server = Server(Setup(), num_layers=16)
    server.ask("other", prompt_of(5), max_new_tokens=40, ignore_eos=True)
    server.settle(until_s=1e-3)
    server.ask("gone", prompt_of(16, start=1), max_new_tokens=5)
    server.turn()
    assert server.cache.num_open == 2
    server.engine.abort("gone")
    server.turn()
    assert server.answers["gone"].finish.status_code == 499
    server.finish()
    launched = sum(run.layers for run in server.timeline.runs(Phase.PREFILL)) - 16
    assert 0 < launched < 16
    assert server.answers["other"].finish.type == "length"


def test_an_abort_between_two_chunks_keeps_what_is_computed():
    server = Server(Setup(prefill_tokens=16))
    prompt = prompt_of(40)
    server.ask("gone", prompt, max_new_tokens=5)
    batch = server.engine.begin_prefill(Admission())
    batch.slice_work(server.lanes.lane(Phase.PREFILL, TABLE.whole), 0, 4)
    server.engine.finish_prefill(batch)
    assert server.engine.waiting == 1
    server.engine.abort("gone")
    server.finish()
    assert server.answers["gone"].finish.status_code == 499
    assert server.answer("again", prompt, max_new_tokens=1).cached_tokens == 16


def test_aborts_go_by_prefix_and_an_empty_one_names_nobody():
    server = Server(Setup())
    for rid in ("a1", "a2", "b1"):
        server.ask(rid, prompt_of(5), max_new_tokens=3)
    server.engine.abort("")
    server.engine.abort("1")
    server.engine.abort("a")
    server.engine.abort("nobody")
    server.finish()
    ends = {rid: answer.finish.type for rid, answer in server.answers.items()}
    assert {rid for rid, end in ends.items() if end == "abort"} == {"a1", "a2"}
    server.ask("c1", prompt_of(5), max_new_tokens=3)
    server.engine.abort("", abort_all=True)
    server.finish()
    assert server.answers["c1"].finish.type == "abort"


def test_the_abort_of_a_waiting_request_lets_the_next_one_in_at_once():
    server = Server(Setup(pool_pages=40))
    server.ask("runs", prompt_of(5), max_new_tokens=30, ignore_eos=True)
    server.settle(until_s=2e-4)
    server.ask("large", prompt_of(30, start=1), max_new_tokens=1)
    server.ask("small", prompt_of(5, start=2), max_new_tokens=1)
    server.turn()
    server.engine.abort("large")
    server.settle(until_s=4e-4)
    assert server.answers["small"].finish is not None
    assert server.answers["runs"].finish is None
    server.finish()


def test_a_stop_string_found_elsewhere_ends_the_request():
    server = Server(Setup())
    server.ask("r", prompt_of(5), max_new_tokens=50, ignore_eos=True)
    server.settle(until_s=4e-4)
    server.engine.stop_matched("r")
    server.engine.stop_matched("unknown")
    server.finish()
    answer = server.answers["r"]
    assert answer.finish == FinishReason(type="stop")
    assert 0 < len(answer.ids) < 50


def test_retracted_requests_come_back_to_their_prefix_with_the_same_answer():
    server = Server(Setup(pool_pages=48, conservativeness=0.0))
    prompts = {f"r{i}": prompt_of(10, start=i) for i in range(3)}
    for rid, prompt in prompts.items():
        server.ask(rid, prompt, max_new_tokens=25, ignore_eos=True)
    server.finish()
    assert server.engine.retractions > 0
    assert server.engine.retractions == sum(a.retractions for a in server.answers.values())
    for rid, prompt in prompts.items():
        assert server.answers[rid].ids == answer_of(prompt, max_new_tokens=25, ignore_eos=True)
        assert server.answers[rid].cached_tokens == 0  # at its first admission


def test_what_is_promised_to_running_requests_avoids_retractions():
    careful, careless = (
        Server(Setup(pool_pages=48, conservativeness=ratio)) for ratio in (2.0, 0.0)
    )
    for server in (careful, careless):
        for i in range(3):
            server.ask(f"r{i}", prompt_of(10, start=i), max_new_tokens=25, ignore_eos=True)
        server.finish()
    assert careful.engine.retractions == 0
    assert careless.engine.retractions > 0


def test_a_large_prompt_is_not_overtaken_for_ever():
    server = Server(Setup(pool_pages=64, chunked=False))
    for i in range(3):
        server.ask(f"early{i}", prompt_of(12, start=i), max_new_tokens=6, ignore_eos=True)
    server.settle(until_s=1e-4)
    large = prompt_of(50, start=5)
    server.ask("large", large, max_new_tokens=4)
    for i in range(12):
        server.ask(f"late{i}", prompt_of(12, start=7 + i), max_new_tokens=6, ignore_eos=True)
        server.turn()
    while server.answers.get("large", Answer()).finish is None:
        if not server.turn():
            server.clock.advance_to(server.lanes.next_completion_s())
    assert not any(rid.startswith("late") and a.finish for rid, a in server.answers.items())
    server.finish()


def test_a_request_that_comes_back_to_the_queue_keeps_its_place():
    queue = WaitingQueue("fcfs", cached_prefix=lambda request: 0)
    requests = [
        Request(
            GenerateRequest(
                rid=rid,
                input_ids=token_ids([1]),
                sampling=SamplingParams(),
                arrival_s=float(arrival_s),
            ),
            max_new_tokens=1,
            seed=0,
            eos_token_ids=frozenset(),
        )
        for arrival_s, rid in enumerate("abc")
    ]
    for request in requests:
        queue.add(request)
    queue.remove(requests[0])
    queue.add(requests[0])
    assert queue.in_order() == requests
    assert len(queue) == 3


@pytest.mark.parametrize("mode", ["turns", "chunked"])
@pytest.mark.parametrize("policy", ["fcfs", "lpm"])
def test_a_lower_rank_starts_first(mode, policy):
    server = Server(Setup(mode=mode, policy=policy, prefill_max_requests=1, step_tokens=9))
    for i, rank in enumerate([3, 1, 2, 1, 0]):
        server.ask(f"r{i}", [i + 1] * 8, rank=rank, max_new_tokens=2)
    server.finish()
    assert server.started == ["r4", "r1", "r3", "r2", "r0"]


def test_lpm_takes_the_longest_cached_prefix_first():
    served = {}
    for policy in ("fcfs", "lpm"):
        server = Server(Setup(policy=policy, max_running=1))
        prefix = prompt_of(20)
        server.answer("warm", prefix, max_new_tokens=1)
        server.ask("cold", prompt_of(20, start=1), max_new_tokens=1)
        server.ask("half", [*prefix[:10], 1, 1], max_new_tokens=1)
        server.ask("full", [*prefix, 1, 1], max_new_tokens=1)
        server.finish()
        served[policy] = list(server.answers)[1:]
    assert served == {"fcfs": ["cold", "half", "full"], "lpm": ["full", "half", "cold"]}


def test_a_prompt_is_only_shared_once_it_is_computed():
    """Two requests of one batch each fill their own copy and end up on the same slots."""
    server = Server(Setup(prefill_tokens=32))
    prompt = prompt_of(10)
    server.ask("a", prompt, max_new_tokens=8, ignore_eos=True)
    server.ask("b", prompt, max_new_tokens=8, ignore_eos=True)
    server.settle(until_s=2e-4)
    assert server.answers["b"].cached_tokens == 0
    assert server.cache.radix.protected == 10
    server.finish()
    expected = answer_of(prompt, max_new_tokens=8, ignore_eos=True)
    assert server.answers["a"].ids == server.answers["b"].ids == expected


@pytest.mark.parametrize("mode", ["turns", "chunked"])
def test_a_request_that_did_not_fit_starts_once_others_share_its_prefix(mode):
    server = Server(Setup(pool_pages=48, mode=mode, prefill_tokens=32, step_tokens=32))
    prompt = prompt_of(20)
    server.ask("first", prompt, max_new_tokens=20, ignore_eos=True)
    server.turn()
    server.ask("second", [*prompt, 3], max_new_tokens=1)
    while server.answers.get("second", Answer()).finish is None:
        if not server.turn():
            server.clock.advance_to(server.lanes.next_completion_s())
    assert server.answers["second"].cached_tokens == 20
    assert server.answers["first"].finish is None
    server.finish()


# Prompts that ride in decode steps.


def launches_of(server: Server) -> list[tuple[int, list[int]]]:
    """Of each launch, how many requests decode and how many tokens each prompt brings."""
    return [
        (batch.decode_reqs, batch.new_lens[batch.decode_reqs :].tolist())
        for batch in server.runner.launched
    ]


def test_chunks_and_first_steps_are_launched_before_the_host_has_seen_a_token():
    server = Server(Setup(mode="chunked", step_tokens=16))
    prompt = prompt_of(20)
    server.ask("r", prompt, max_new_tokens=4, ignore_eos=True)
    assert server.engine.waiting_tokens == 20
    server.turn()
    assert (server.engine.waiting, server.engine.waiting_tokens) == (1, 4)
    server.turn()
    assert (server.engine.waiting, server.engine.waiting_tokens) == (0, 0)
    assert server.engine.running == 1
    server.clock.advance_to(server.lanes.next_completion_s())
    server.turn()
    assert launches_of(server) == [(0, [16]), (0, [4]), (1, [])]
    assert "r" not in server.answers
    server.finish()
    assert server.answers["r"].ids == answer_of(prompt, max_new_tokens=4, ignore_eos=True)


def test_prompts_share_a_step_with_each_other_and_with_those_that_decode():
    server = Server(Setup(mode="chunked", step_tokens=12))
    prompts = {"a": prompt_of(5), "b": prompt_of(6, start=1), "c": prompt_of(9, start=2)}
    for rid, prompt in prompts.items():
        server.ask(rid, prompt, max_new_tokens=3, ignore_eos=True)
    server.finish()
    assert launches_of(server) == [
        (0, [5, 6, 1]),
        (2, [8]),
        (3, []),
        (1, []),
    ]
    for rid, prompt in prompts.items():
        assert server.answers[rid].ids == answer_of(prompt, max_new_tokens=3, ignore_eos=True)


@pytest.mark.parametrize("max_new_tokens", [0, 1])
def test_a_prompt_that_wants_no_step_rides_and_leaves(max_new_tokens):
    server = Server(Setup(mode="chunked", step_tokens=16))
    answer = server.answer("r", prompt_of(20), max_new_tokens=max_new_tokens)
    assert len(answer.ids) == max_new_tokens
    assert launches_of(server) == [(0, [16]), (0, [4])]
    assert server.answer("next", prompt_of(20), max_new_tokens=1).cached_tokens == 19


@pytest.mark.parametrize("chunked", [True, False])
def test_a_prompt_may_change_between_steps_and_prefill_batches_at_every_chunk(chunked):
    """Neither waits for the host: the next part is launched while the last one is in flight."""
    server = Server(Setup(prefill_tokens=16, chunked=chunked))
    lane = server.lanes.lane(Phase.DECODE, TABLE.whole)
    prompt = prompt_of(40)
    server.ask("r", prompt, max_new_tokens=5, ignore_eos=True)
    step = server.engine.begin_decode(0, 3)
    step.step_work(lane)
    batch = server.engine.begin_prefill(Admission())
    batch.slice_work(lane, 0, 4)
    server.engine.finish_decode(step)
    server.engine.finish_prefill(batch)
    server.engine.check()
    expected = [(0, [3]), (0, [16]) if chunked else (0, [37])]
    assert launches_of(server) == expected
    if chunked:
        step = server.engine.begin_decode(0, 7)
        step.step_work(lane)
        server.engine.finish_decode(step)
        assert launches_of(server)[-1] == (0, [7])
    server.finish()
    assert server.answers["r"].ids == answer_of(prompt, max_new_tokens=5, ignore_eos=True)


def test_an_abort_between_two_parts_in_flight_keeps_what_is_computed():
    """A fused step is in flight, and a prefill batch behind it that is never launched."""
    server = Server(Setup())
    lane = server.lanes.lane(Phase.DECODE, TABLE.whole)
    server.ask("gone", prompt_of(40), max_new_tokens=5)
    step = server.engine.begin_decode(0, 10)
    step.step_work(lane)
    batch = server.engine.begin_prefill(Admission())
    server.engine.abort("gone")
    assert batch.cancelled
    server.engine.finish_prefill(batch)
    server.engine.check()
    assert not server.engine.idle
    server.engine.finish_decode(step)
    server.engine.check()
    assert server.engine.idle
    assert server.answer("again", prompt_of(40), max_new_tokens=1).cached_tokens == 10


def test_a_first_token_that_ends_the_answer_leaves_a_step_behind():
    server = Server(Setup(mode="chunked"))
    prompt = prompt_of(8)
    [stop] = answer_of(prompt, max_new_tokens=1, ignore_eos=True)
    answer = server.answer("r", prompt, max_new_tokens=9, stop_token_ids=[stop])
    assert answer.finish == FinishReason(type="stop", matched=stop)
    assert answer.ids == [stop]
    assert launches_of(server) == [(0, [8]), (1, [])]


def test_retracted_requests_ride_again():
    server = Server(Setup(mode="chunked", pool_pages=48, conservativeness=0.0))
    prompts = {f"r{i}": prompt_of(10, start=i) for i in range(3)}
    for rid, prompt in prompts.items():
        server.ask(rid, prompt, max_new_tokens=25, ignore_eos=True)
    server.finish()
    assert server.engine.retractions > 0
    for rid, prompt in prompts.items():
        assert server.answers[rid].ids == answer_of(prompt, max_new_tokens=25, ignore_eos=True)


def test_the_callbacks_see_prompts_and_running_requests_of_a_fused_step():
    server = Server(Setup(mode="chunked", step_tokens=8))
    server.answer("a", prompt_of(10), max_new_tokens=2, ignore_eos=True)
    server.ask("b", [*prompt_of(10), 1, 1], max_new_tokens=2, ignore_eos=True)
    server.ask("c", prompt_of(5, start=1), max_new_tokens=1)
    server.finish()
    assert server.begun == [
        ("prefill", [(8, 0)]),
        ("prefill", [(2, 0)]),
        ("decode", ["a"]),
        ("prefill", [(2, 10), (5, 0)]),
        ("decode", ["b"]),
    ]


def test_prefill_and_decode_are_at_work_at_the_same_time():
    server = Server(Setup(), num_layers=12)
    server.ask("decodes", prompt_of(5), max_new_tokens=50, ignore_eos=True)
    server.settle(until_s=1e-3)
    for i in range(4):
        server.ask(f"r{i}", prompt_of(40, start=i), max_new_tokens=2)
    server.finish()
    assert server.timeline.both_busy_s > 0.5 * server.timeline.busy_s(Phase.PREFILL)
    assert server.timeline.launches(TABLE.splits[0]) > 0


def test_seeds_are_kept_and_requests_without_one_get_different_ones():
    server = Server(Setup(prefill_tokens=64))
    server.ask("given", prompt_of(5), max_new_tokens=3, sampling_seed=-5)
    server.ask("first", prompt_of(5, start=1), max_new_tokens=3)
    server.ask("second", prompt_of(5, start=2), max_new_tokens=3)
    server.finish()
    prefill = server.runner.launched[0]
    given, first, second = (wish.seed for wish in prefill.samples)
    assert given == -5
    assert first != second
    for batch in server.runner.launched[1:]:
        assert {wish.seed for wish in batch.samples} <= {given, first, second}


def test_the_cache_can_only_be_reset_while_no_request_holds_memory():
    server = Server(Setup())
    server.ask("r", prompt_of(5), max_new_tokens=3)
    server.engine.reset_cache()
    batch = begin(server)
    with pytest.raises(AssertionError, match="cache reset under 1 sequences"):
        server.engine.reset_cache()
    compute(server, batch)
    server.finish()
    server.engine.reset_cache()
    assert server.cache.allocator.available == server.cache.allocator.total
    assert server.answer("again", prompt_of(5), max_new_tokens=3).cached_tokens == 0


def test_check_sees_a_lost_slot_and_a_lost_row():
    server = Server(Setup())
    server.ask("r", prompt_of(5), max_new_tokens=30, ignore_eos=True)
    server.settle(until_s=2e-4)
    lost = server.cache.allocator.alloc_extend(None, 0, 1)
    with pytest.raises(AssertionError, match="in flight"):
        server.engine.check()
    server.cache.allocator.free(lost)
    server.engine.check()
    server.engine._rows.alloc()
    with pytest.raises(AssertionError, match="2 rows taken, 1 in use"):
        server.engine.check()


# What a dispatcher sees and says: due times, orders, batches in front of others.


def begin(server: Server, *order: str, **admission) -> PrefillBatch | None:
    """A prefill batch of these prompts, in this order; of the queue's choice without any."""
    return server.engine.begin_prefill(Admission(order or None, **admission))


def compute(server: Server, batch: PrefillBatch) -> None:
    batch.slice_work(server.lanes.lane(Phase.PREFILL, TABLE.whole), 0, 4)
    server.engine.finish_prefill(batch)
    server.engine.check()


def parts(batch: PrefillBatch) -> list[tuple[str, int]]:
    """Of each prompt of the batch, its name and its tokens."""
    return [(fill.request.rid, fill.tokens) for fill in batch.fills]


def waiting(server: Server) -> dict[str, tuple[int, int]]:
    """(new, cached) tokens of the prompts in the backlog."""
    oldest = server.engine.backlog.oldest(99)
    return {prompt.key: (prompt.new, prompt.cached) for prompt in oldest}


def test_prompts_go_in_the_order_given_and_others_stay():
    server = Server(Setup(prefill_tokens=64))
    for i, rid in enumerate("abcd"):
        server.ask(rid, prompt_of(5 + i, start=i), max_new_tokens=2)
    batch = begin(server, "c", "gone", "a")
    assert parts(batch) == [("c", 7), ("a", 5)]
    assert waiting(server) == {"b": (6, 0), "d": (8, 0)}
    compute(server, batch)
    assert parts(begin(server)) == [("b", 6), ("d", 8)]
    assert waiting(server) == {}


def test_a_batch_has_no_more_tokens_than_it_may():
    server = Server(Setup(prefill_tokens=16))
    for i, rid in enumerate("abc"):
        server.ask(rid, prompt_of(6, start=i), max_new_tokens=2)
    batch = begin(server, "b", "a", "c", tokens=8)
    assert parts(batch) == [("b", 6), ("a", 2)]
    [half_filled] = [p for p in server.engine.backlog.oldest(9) if p.begun]
    assert (half_filled.key, half_filled.new, half_filled.cached) == ("a", 4, 2)
    compute(server, batch)
    assert parts(begin(server, "c", "a", tokens=1000)) == [("c", 6), ("a", 4)]


def test_only_whole_prompts_go_in_front_of_the_half_filled_one():
    server = Server(Setup(prefill_tokens=16))
    server.ask("half", prompt_of(40), max_new_tokens=2)
    compute(server, begin(server))
    server.ask("long", prompt_of(20, start=1), max_new_tokens=2)
    server.ask("short", prompt_of(6, start=2), max_new_tokens=2)
    batch = begin(server, "long", "short", "half")
    assert parts(batch) == [("short", 6), ("half", 10)]
    compute(server, batch)
    # Once the half-filled one is complete, the next may be cut.
    batch = begin(server, "half", "long", tokens=16)
    assert parts(batch) == [("half", 14), ("long", 2)]


@pytest.mark.parametrize(("new_tokens", "fits"), [(11, True), (12, False)])
def test_the_rest_of_the_half_filled_prompt_keeps_its_room(new_tokens, fits):
    server = Server(Setup(pool_pages=52, conservativeness=0.0, cache=False))
    server.ask("half", prompt_of(41), max_new_tokens=1)
    compute(server, begin(server))
    server.ask("other", prompt_of(new_tokens, start=1), max_new_tokens=1)
    batch = begin(server, "other", "half")
    assert parts(batch)[0] == (("other", 11) if fits else ("half", 16))
    compute(server, batch)
    server.finish()


def test_a_half_filled_prompt_that_is_not_named_stays():
    server = Server(Setup(prefill_tokens=16))
    server.ask("half", prompt_of(40), max_new_tokens=2)
    compute(server, begin(server))
    assert begin(server, "nobody") is None
    assert waiting(server) == {"half": (24, 16)}
    assert server.engine.waiting == 1  # another order may do
    server.finish()


def test_an_order_that_found_no_room_is_only_tried_again_when_something_has_changed():
    server = Server(Setup(pool_pages=40))
    server.ask("runs", prompt_of(5), max_new_tokens=20, ignore_eos=True)
    server.settle(until_s=2e-4)
    server.ask("large", prompt_of(30, start=1), max_new_tokens=1)
    assert begin(server, "large") is None
    looked_up = server.cache.radix.stats.looked_up_tokens
    assert begin(server, "large") is None
    assert server.cache.radix.stats.looked_up_tokens == looked_up
    server.finish()
    assert server.answers["large"].finish.type == "length"


def test_a_large_prompt_is_passed_over_four_times_and_then_blocks():
    server = Server(Setup(pool_pages=64, max_running=16, conservativeness=0.0, cache=False))
    server.ask("runs", prompt_of(20), max_new_tokens=30, ignore_eos=True)
    compute(server, begin(server))
    if server.engine.waiting:
        compute(server, begin(server))
    server.ask("large", prompt_of(50, start=1), max_new_tokens=1)
    for i in range(6):
        server.ask(f"small{i}", prompt_of(2, start=i), max_new_tokens=1)
    overtaking = []
    for i in range(6):
        batch = begin(server, "large", f"small{i}")
        if batch is None:
            break
        overtaking += parts(batch)
        compute(server, batch)
    assert overtaking == [(f"small{i}", 2) for i in range(4)]
    server.finish()
    assert all(answer.finish.type != "abort" for answer in server.answers.values())


@pytest.mark.parametrize(("large", "fits"), [(7, True), (8, False)])
def test_only_so_many_prompts_that_do_not_fit_are_looked_at(large, fits):
    server = Server(Setup(pool_pages=64, max_running=16, conservativeness=0.0, cache=False))
    server.ask("runs", prompt_of(16), max_new_tokens=30, ignore_eos=True)
    compute(server, begin(server))
    names = [f"large{i}" for i in range(large)]
    for i, rid in enumerate(names):
        server.ask(rid, prompt_of(50, start=i), max_new_tokens=1)
    server.ask("small", prompt_of(2), max_new_tokens=1)
    batch = begin(server, *names, "small")
    assert (batch is not None) == fits


def test_a_batch_in_front_of_another_has_whole_prompts_and_leaves_the_half_filled_one():
    server = Server(Setup(prefill_tokens=16))
    server.ask("half", prompt_of(40), max_new_tokens=3, ignore_eos=True)
    parked = begin(server)
    lane = server.lanes.lane(Phase.PREFILL, TABLE.whole)
    parked.slice_work(lane, 0, 2)
    server.ask("long", prompt_of(17, start=1), max_new_tokens=2)
    server.ask("short", prompt_of(6, start=2), max_new_tokens=3, ignore_eos=True)
    server.ask("next", prompt_of(12, start=3), max_new_tokens=2)
    batch = begin(server, "half", "long", "short", "next", preempts=True)
    assert parts(batch) == [("short", 6)]
    assert waiting(server) == {"half": (24, 16), "long": (17, 0), "next": (12, 0)}
    compute(server, batch)
    assert server.engine.running == 1
    parked.slice_work(lane, 2, 4)
    server.engine.finish_prefill(parked)
    server.finish()
    for rid, prompt in [("half", prompt_of(40)), ("short", prompt_of(6, start=2))]:
        assert server.answers[rid].ids == answer_of(prompt, max_new_tokens=3, ignore_eos=True)


def test_a_parked_batch_may_be_aborted():
    server = Server(Setup())
    server.ask("gone", prompt_of(10), max_new_tokens=3)
    parked = begin(server)
    server.ask("r", prompt_of(6, start=2), max_new_tokens=3, ignore_eos=True)
    batch = begin(server, "r", preempts=True)
    server.engine.abort("gone")
    assert parked.cancelled and not batch.cancelled
    server.engine.check()
    compute(server, batch)
    server.engine.finish_prefill(parked)
    server.finish()
    assert server.answers["gone"].finish.status_code == 499
    assert len(server.answers["r"].ids) == 3


def test_a_fused_step_takes_prompts_in_the_order_given():
    server = Server(Setup())
    for i, rid in enumerate("abc"):
        server.ask(rid, prompt_of(6, start=i), max_new_tokens=1)
    step = server.engine.begin_decode(0, 8, ("c", "a"))
    assert parts(step) == [("c", 6), ("a", 2)]
    assert step.fused == PrefillShape.of([(6, 0), (2, 0)])
    assert step.shape == DecodeShape(0, 0)


def test_a_batch_says_what_it_is_and_when_its_first_prompt_is_due():
    server = Server(Setup(prefill_tokens=16))
    server.answer("warm", prompt_of(8), max_new_tokens=1)
    arrival_s = server.clock.now_s
    server.ask("b", prompt_of(9), slo=Slo(ttft_s=2.0), max_new_tokens=1)
    server.ask("a", prompt_of(4, start=1), slo=Slo(ttft_s=1.0), max_new_tokens=1)
    server.ask("c", prompt_of(40, start=2), slo=Slo(ttft_s=0.1), max_new_tokens=1)
    batch = begin(server)
    assert batch.shape == PrefillShape.of([(1, 8), (4, 0), (11, 0)])
    assert batch.due_s == pytest.approx(arrival_s + 1.0)  # c does not get its token here
    server.engine.abort("a")
    assert batch.due_s == pytest.approx(arrival_s + 2.0)
    compute(server, batch)
    assert begin(server).due_s == math.inf  # 16 of 29 tokens more of c


def test_the_first_token_is_due_by_the_tokens_that_are_not_cached():
    server = Server(Setup())
    server.answer("warm", prompt_of(20), max_new_tokens=1)
    tree = [node.last_access for node in server.cache.radix._nodes()]
    now_s = server.clock.now_s
    slo = Slo(ttft_s=0.5, ttft_per_token_s=0.1)
    server.ask("known", [*prompt_of(20), 1, 1], slo=slo, max_new_tokens=1)
    server.ask("new", prompt_of(22, start=1), slo=slo, max_new_tokens=1)
    server.ask("any", prompt_of(4, start=2), max_new_tokens=1)
    due = {prompt.key: prompt.due_s - now_s for prompt in server.engine.backlog.oldest(9)}
    assert due == pytest.approx({"known": 0.5, "new": 2.2, "any": math.inf})
    assert [p.key for p in server.engine.backlog.first_due(-math.inf, 2)] == ["known", "new"]
    assert waiting(server)["known"] == (2, 20)
    # To ask is not to use: what would be evicted first is what it was.
    assert [node.last_access for node in server.cache.radix._nodes()] == tree


def test_a_retracted_request_is_due_with_its_next_token():
    server = Server(Setup(pool_pages=48, conservativeness=0.0))
    slo = Slo(ttft_s=9.0, tbt_s=0.25)
    for i in range(3):
        prompt = prompt_of(10, start=i)
        server.ask(f"r{i}", prompt, slo=slo, max_new_tokens=25, ignore_eos=True)
    while not server.engine.retractions:
        if not server.turn():
            server.clock.advance_to(server.lanes.next_completion_s())
    [prompt] = server.engine.backlog.oldest(9)
    request = server.engine._by_rid[prompt.key]
    assert request.output
    assert prompt.due_s == request.pace.last_s + 0.25
    first_s = request.pace.first_s
    server.finish()
    assert request.pace.first_s == first_s
    assert request.pace.tokens == 25


def test_what_the_tree_has_learnt_shows_when_a_prefill_is_done():
    server = Server(Setup(prefill_tokens=32))
    prompt = prompt_of(20)
    for i in range(20):
        slo = Slo(ttft_s=1.0 + i)
        server.ask(f"r{i:02d}", [*prompt, i % 5, i // 5], slo=slo, max_new_tokens=1)
    compute(server, begin(server, "r19"))
    cached = [cached for _, cached in waiting(server).values()]
    assert sum(count >= 20 for count in cached) == 16
    assert cached[16:] == [0] * 3  # those that are due last


def test_a_prompt_waits_for_another_that_computes_most_of_it():
    sizes = Setup(pool_pages=4096, context_length=2048, prefill_tokens=2048)
    server = Server(sizes)
    shared = prompt_of(600)
    server.ask("first", [*shared, 1], max_new_tokens=1)
    server.ask("waits", [*shared, 2], max_new_tokens=1)
    server.ask("other namespace", [*shared, 2], namespace="b", max_new_tokens=1)
    server.ask("shares too little", [*shared[:255], *prompt_of(9, start=4)], max_new_tokens=1)
    server.ask("too small a share", [*shared[:300], *[5] * 1200], max_new_tokens=1)

    def deferred() -> list[str]:
        return [prompt.key for prompt in server.engine.backlog.oldest(99) if prompt.deferred]

    assert deferred() == []
    batch = begin(server, "first")
    assert deferred() == ["waits"]
    server.ask("comes later", [*shared, 3, 3], max_new_tokens=1)
    assert deferred() == ["waits", "comes later"]
    compute(server, batch)
    assert deferred() == []
    assert waiting(server)["waits"] == (1, 600)
    # A half-filled prompt is being computed too, between its launches.
    server.ask("half", prompt_of(2000, start=1), max_new_tokens=1)
    server.ask("follows", [*prompt_of(1000, start=1), 7], max_new_tokens=1)
    compute(server, begin(server, "half", tokens=100))
    assert deferred() == ["follows"]
    server.engine.abort("half")
    assert deferred() == []
    server.finish()


def test_a_prompt_waits_for_one_that_rides_until_it_is_done():
    server = Server(Setup(pool_pages=4096, context_length=2048))
    lane = server.lanes.lane(Phase.DECODE, TABLE.whole)
    shared = prompt_of(600)
    for rid, last in [("rides", 1), ("waits", 2)]:
        server.ask(rid, [*shared, last], max_new_tokens=1)
    steps = []
    for tokens in (500, 101):
        steps.append(server.engine.begin_decode(len(steps), tokens, ("rides",)))
        steps[-1].step_work(lane)
        assert server.engine.backlog["waits"].deferred
    server.engine.finish_decode(steps[0])
    assert server.engine.backlog["waits"].deferred
    server.engine.finish_decode(steps[1])
    assert not server.engine.backlog["waits"].deferred
    assert waiting(server) == {"waits": (1, 600)}


def test_without_a_cache_nobody_waits_for_another():
    sizes = Setup(pool_pages=4096, context_length=2048, prefill_tokens=2048, cache=False)
    server = Server(sizes)
    server.ask("first", prompt_of(600), max_new_tokens=1)
    server.ask("second", prompt_of(600), max_new_tokens=1)
    begin(server, "first")
    assert not server.engine.backlog["second"].deferred


def test_the_decode_load_is_that_of_the_next_step():
    server = Server(Setup(prefill_tokens=64))
    assert server.engine.decode_load() == DecodeLoad(DecodeShape(0, 0))
    strict, lax = Slo(tbt_s=0.5), Slo(tbt_s=2.0)
    server.ask("a", prompt_of(5), slo=lax, max_new_tokens=3, ignore_eos=True)
    server.ask("b", prompt_of(7, start=1), slo=strict, max_new_tokens=2, ignore_eos=True)
    batch = begin(server)
    server.clock.advance_to(1.0)
    compute(server, batch)
    # The token that each of them has got is attended to by the next step, and computed in it. Their
    # first tokens are kept back until that step starts: until then no next one is due.
    assert server.engine.decode_load() == DecodeLoad(DecodeShape(2, 6 + 8), 0.5)
    lane = server.lanes.lane(Phase.DECODE, TABLE.whole)
    step = server.engine.begin_decode(0, 0)
    step.step_work(lane)
    assert (step.shape, step.fused) == (DecodeShape(2, 6 + 8), None)
    assert server.engine.decode_load() == DecodeLoad(DecodeShape(1, 7), 2.0)  # b has asked for 2
    server.ask("c", prompt_of(3, start=2), slo=strict, max_new_tokens=2, ignore_eos=True)
    fused = server.engine.begin_decode(1, 8)
    fused.step_work(lane)
    assert (fused.shape, fused.fused) == (DecodeShape(1, 7), PrefillShape.of([(3, 0)]))
    # c has joined, but nobody can say when its next token is due before it has its first.
    assert server.engine.decode_load() == DecodeLoad(DecodeShape(1, 4), 0.5)
    server.engine.finish_decode(step)
    server.clock.advance_to(3.0)
    server.engine.finish_decode(fused)
    assert server.engine.decode_load() == DecodeLoad(DecodeShape(1, 4), 0.5, 3.5)
    server.engine.abort("c")
    assert server.engine.decode_load() == DecodeLoad(DecodeShape(0, 0))


@pytest.mark.parametrize(("ttft_s", "sent_at_once"), [(9.0, False), (1.5, True), (0.5, False)])
def test_a_first_token_is_sent_when_its_first_step_starts(ttft_s, sent_at_once):
    """Unless it could be late; one that is late already is not in a hurry any more."""
    server = Server(Setup(prefill_tokens=64))
    slo = Slo(ttft_s=ttft_s, tbt_s=0.5)
    server.ask("a", prompt_of(5), slo=NO_SLO, max_new_tokens=9, ignore_eos=True)
    compute(server, begin(server))
    running = [server.engine.begin_decode(i, 0) for i in range(2)]
    server.ask("b", prompt_of(7, start=1), slo=slo, max_new_tokens=3, ignore_eos=True)
    server.clock.advance_to(1.0)
    compute(server, begin(server))
    request = server.engine._by_rid["b"]

    def sent():
        return request.pace.tokens > 0

    assert sent() == sent_at_once
    lane = server.lanes.lane(Phase.DECODE, TABLE.whole)
    for step in running:
        step.step_work(lane)
    joined = server.engine.begin_decode(2, 0)
    assert joined.shape.requests == 2
    server.engine.finish_decode(running[0])
    assert sent() == sent_at_once
    server.clock.advance_to(2.0)
    server.engine.finish_decode(running[1])
    assert request.pace.first_s == (1.0 if sent_at_once else 2.0)


def test_refused_prompts_are_told_which_flag_refuses_them():
    server = Server(Setup(pool_pages=48, conservativeness=0.0))
    for i in range(3):
        server.ask(f"r{i}", prompt_of(10, start=i), max_new_tokens=25, ignore_eos=True)
    while not server.engine.retractions:
        if not server.turn():
            server.clock.advance_to(server.lanes.next_completion_s())
    [retracted] = waiting(server)
    server.ask("late", prompt_of(5, start=5), max_new_tokens=5)
    server.engine.shed(["late", retracted, "nobody", "r0"])
    server.finish()
    late = server.answers.pop("late")
    assert late.finish.status_code == 503
    assert "--slo-overload" in late.finish.message
    # Who has had a token is served to the end.
    assert all(len(answer.ids) == 25 for answer in server.answers.values())


def test_everyone_who_ends_is_reported_with_the_times_of_its_tokens():
    server = Server(Setup(max_queued=2))
    for rid in ("r", "aborted", "refused"):
        server.ask(rid, prompt_of(5), slo=Slo(tbt_s=1.0), max_new_tokens=4, ignore_eos=True)
    server.engine.abort("aborted")
    server.finish()
    ends = {request.rid: request.finish.status_code for request in server.finished}
    assert ends == {"refused": 503, "aborted": 499, "r": None}
    request = server.finished[-1]
    decode_runs = server.timeline.runs(Phase.DECODE)
    [prefill] = server.timeline.runs(Phase.PREFILL)
    assert request.pace.tokens == 4
    assert request.pace.first_s == pytest.approx(prefill.span.end_s)
    assert request.pace.last_s == pytest.approx(decode_runs[2].span.end_s)
    assert (request.uncached_at_arrival, request.slo) == (5, Slo(tbt_s=1.0))
