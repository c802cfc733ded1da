"""Requests with grammars through the real engine and gang, over a fake runner in virtual time."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmark.structured_cases import cases
from drift_scheduler.gang import Gang
from drift_scheduler.lane_virtual import VirtualClock, VirtualLanes
from drift_scheduler.partition import Partition, PartitionTable
from drift_scheduler.policies.by_batch_size import SplitByBatchSize
from drift_scheduler.policies.chunked import Chunked
from drift_scheduler.policies.take_turns import TakeTurns
from drift_scheduler.timeline import Timeline
from sglang.srt.constrained.compiler import MAX_GIVEN_UP, GrammarCompiler
from sglang.srt.constrained.grammar_queue import GrammarQueue
from sglang.srt.managers.admission import EngineLimits
from sglang.srt.managers.outbox import Outbox
from sglang.srt.managers.serving_engine import ServingEngine
from sglang.srt.mem_cache.radix_cache import RadixCache
from sglang.srt.mem_cache.sequence_cache import SequenceCache
from sglang.srt.mem_cache.slot_allocator import SlotAllocator
from sglang.srt.mem_cache.slot_table import RowPool
from sglang.srt.messages import FinishReason, GenerateRequest, token_ids
from sglang.srt.model_executor.fake_runner import FakeRunner, choose_by_hash
from sglang.srt.requests import Request
from sglang.srt.sampling_params import SamplingParams

TABLE = PartitionTable(4, (Partition(1, 3, 1), Partition(2, 2, 2), Partition(3, 1, 3)))
POLICIES = {
    "split": SplitByBatchSize(TABLE, (1, 3, 5)),
    "turns": TakeTurns(TABLE),
    "chunked": Chunked(TABLE, 16),
}
TURN_LIMIT = 40_000
PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]


class Server:
    """Workers run when `compile` is called; with inline=True at once."""

    def __init__(
        self,
        backend,
        vocabulary,
        *,
        policy: str = "split",
        pool_tokens: int = 4096,
        context_length: int = 2048,
        inline: bool = True,
        max_queued: int | None = None,
        conservativeness: float = 1.0,
    ) -> None:
        allocator = SlotAllocator(pool_tokens + 1, 1)
        self.vocabulary = vocabulary
        self.cache = SequenceCache(RadixCache(1, allocator.free, enabled=True), allocator)
        self.runner = FakeRunner(
            num_layers=4,
            num_slots=pool_tokens + 1,
            num_rows=9,
            context_length=context_length,
            choose=choose_by_hash(vocabulary.size),
        )
        self.outbox = Outbox()
        self.clock = VirtualClock()
        self.works: list[Callable[[], None]] = []
        self.compiler = GrammarCompiler(
            lambda: backend,
            limit_s=10,
            clock=lambda: self.clock.now_s,
            spawn=lambda work: work() if inline else self.works.append(work),
        )
        self.compiler.load_now()
        # Of every decode step: its members, and how many steps were in flight before it.
        self.steps: list[tuple[list[str], int]] = []
        self.engine = ServingEngine(
            self.runner,
            self.cache,
            RowPool(9),
            EngineLimits(
                context_length=context_length,
                prefill_tokens=16,
                chunked=True,
                max_queued=max_queued,
                conservativeness=conservativeness,
            ),
            eos_token_ids=frozenset({vocabulary.eos}),
            outbox=self.outbox,
            random_seed=1,
            grammars=GrammarQueue(self.compiler),
            on_decode=self._step,
            clock=self.clock,
        )
        self.lanes = VirtualLanes(TABLE, self.clock)
        self.gang = Gang(self.engine, self.lanes, POLICIES[policy], Timeline(), self.clock)
        self.ids: dict[str, list[int]] = {}
        self.finish: dict[str, FinishReason] = {}

    def _step(self, members: list[Request]) -> None:
        self.steps.append(([r.rid for r in members], len(self.gang._decode)))

    def ask(self, rid: str, prompt: list[int] = PROMPT, **sampling) -> None:
        self.ids[rid] = []
        self.engine.add(
            GenerateRequest(
                rid=rid,
                input_ids=token_ids(prompt),
                sampling=SamplingParams(**{"max_new_tokens": 40, **sampling}),
                arrival_s=self.clock.now_s,
            )
        )

    def compile(self) -> None:
        works, self.works = self.works, []
        for work in works:
            work()

    def turn(self) -> bool:
        self.engine.take_compiled()
        progressed = self.gang.turn()
        self.engine.check()
        batch = self.outbox.flush()
        if batch is not None:
            for rid, new_ids, finish in zip(batch.rids, batch.new_ids, batch.finish, strict=True):
                assert rid not in self.finish, f"{rid} is heard of after its end"
                self.ids[rid] += new_ids
                if finish is not None:
                    self.finish[rid] = finish
        return progressed

    def settle(self) -> None:
        for _ in range(TURN_LIMIT):
            if self.turn():
                continue
            next_s = self.lanes.next_completion_s()
            if next_s is None:
                return
            self.clock.advance_to(next_s)
        pytest.fail(f"not settled after {TURN_LIMIT} turns")

    def drain(self) -> None:
        self.settle()
        assert self.engine.idle and self.gang.idle
        assert self.cache.available_tokens == self.cache.allocator.total

    def text(self, rid: str) -> str:
        return self.vocabulary.text(self.ids[rid])


@pytest.fixture
def server(make_xgrammar, vocabulary) -> Callable[..., Server]:
    def make(any_whitespace: bool = False, **options) -> Server:
        return Server(make_xgrammar(any_whitespace=any_whitespace), vocabulary, **options)

    return make


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_answers_follow_their_grammars_under_every_policy(server, policy):
    engine = server(policy=policy)
    for i in range(6):
        prompt = [*PROMPT, *range(i, 3 * i)]
        engine.ask(f"regex{i}", prompt, regex="(ab|c){2,3}-[0-9]{2}")
        engine.ask(f"plain{i}", prompt, ignore_eos=True, max_new_tokens=20 + i)
        engine.ask(f"enum{i}", prompt, json_schema='{"enum": ["a", 17, null]}')
    engine.drain()
    for i in range(6):
        assert re.fullmatch("(ab|c){2,3}-[0-9]{2}", engine.text(f"regex{i}"))
        assert json.loads(engine.text(f"enum{i}")) in ("a", 17, None)
        assert len(engine.ids[f"plain{i}"]) == 20 + i
        assert engine.finish[f"regex{i}"].matched == engine.vocabulary.eos


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_a_step_with_a_constrained_member_waits_for_its_token_and_others_do_not(server, policy):
    engine = server(policy=policy)
    engine.ask("plain", ignore_eos=True, max_new_tokens=60)
    engine.settle()
    assert any(in_flight for _, in_flight in engine.steps), "plain traffic never ran ahead"
    engine.steps.clear()
    engine.ask("longer", ignore_eos=True, max_new_tokens=60)
    engine.ask("bound", regex="[ab-]{20}", prompt=[7, 7, 7])
    engine.drain()
    together = [i for i, (members, _) in enumerate(engine.steps) if "bound" in members]
    assert len(together) >= 5
    # The first one may run behind a step in flight: its own token is known.
    assert all(engine.steps[i][1] == 0 for i in together[1:])
    after = [in_flight for members, in_flight in engine.steps[together[-1] + 2 :] if members]
    assert any(after), "plain traffic no longer runs ahead"


def test_unconstrained_launches_carry_no_mask(server):
    engine = server()
    engine.ask("plain", ignore_eos=True)
    engine.drain()
    assert all(batch.mask is None for batch in engine.runner.launched)


def test_the_mask_names_the_constrained_samples_only(server):
    engine = server()
    engine.ask("plain", ignore_eos=True)
    engine.ask("bound", regex="[ab]{5}", prompt=[7, 7])
    engine.drain()
    masked = [batch for batch in engine.runner.launched if batch.mask is not None]
    assert masked
    assert all(len(batch.mask.rows) == 1 for batch in masked)
    assert any(len(batch.samples) == 2 for batch in masked)


def test_a_request_waits_for_its_grammar_outside_the_prompt_queue(server):
    engine = server(inline=False)
    engine.ask("bound", regex="ab")
    engine.ask("plain", max_new_tokens=5, ignore_eos=True)
    engine.settle()
    assert engine.finish.keys() == {"plain"}
    assert engine.engine.queued == 1 and engine.engine.waiting == 0
    assert engine.engine.only_compiles and not engine.engine.idle
    engine.compile()
    engine.drain()
    assert engine.text("bound") == "ab"


def test_a_bad_grammar_gets_400_with_the_librarys_reason(server):
    engine = server()
    engine.ask("bad", regex="(")
    engine.drain()
    assert engine.finish["bad"].status_code == 400
    assert "sampling_params.regex" in (engine.finish["bad"].message or "")
    assert "parenthesis" in (engine.finish["bad"].message or "")


def test_an_abort_while_compiling_ends_the_request_at_once(server):
    engine = server(inline=False)
    engine.ask("one", regex="ab")
    engine.ask("two", regex="ab")
    engine.engine.abort("one")
    engine.turn()
    assert engine.finish["one"].type == "abort"
    assert engine.engine.queued == 1
    engine.compile()
    engine.drain()
    assert engine.text("two") == "ab"
    assert engine.ids["one"] == []


def test_an_abort_of_all_while_compiling_leaves_an_idle_engine(server):
    engine = server(inline=False)
    engine.ask("one", regex="ab")
    engine.engine.abort("", abort_all=True)
    engine.turn()
    assert engine.engine.idle
    engine.compile()
    engine.drain()


def test_a_compilation_that_takes_too_long_gets_400_while_others_are_served(server):
    engine = server(inline=False)
    engine.ask("slow", regex="ab")
    engine.ask("plain", max_new_tokens=3, ignore_eos=True)
    engine.settle()
    assert engine.finish.keys() == {"plain"}
    engine.clock.advance_to(engine.clock.now_s + 10)
    engine.settle()
    assert engine.finish["slow"].status_code == 400
    assert "within 10 s" in (engine.finish["slow"].message or "")
    assert engine.engine.idle


def test_without_a_worker_left_a_grammar_gets_503(server):
    engine = server(inline=False)
    for i in range(MAX_GIVEN_UP):
        engine.ask(f"slow{i}", regex="a" * (i + 1))
        engine.clock.advance_to(engine.clock.now_s + 10)
        engine.settle()
    engine.ask("one", regex="ab")
    engine.drain()
    assert engine.finish["one"].status_code == 503
    assert {engine.finish[f"slow{i}"].status_code for i in range(MAX_GIVEN_UP)} == {400}


def test_requests_that_wait_for_grammars_count_as_queued(server):
    engine = server(inline=False, max_queued=1)
    engine.ask("one", regex="ab")
    engine.ask("two", regex="ab")
    engine.turn()
    assert engine.finish["two"].status_code == 503


def test_a_rid_in_use_by_a_compiling_request_is_refused(server):
    engine = server(inline=False)
    engine.ask("one", regex="ab")
    engine.ask("one", regex="ab")
    engine.turn()
    assert engine.finish["one"].status_code == 400
    assert engine.engine.queued == 1


def test_an_engine_without_grammars_refuses_them(make_xgrammar, vocabulary):
    engine = Server(make_xgrammar(), vocabulary)
    engine.engine.grammars = GrammarQueue(None, "started with --grammar-backend none")
    engine.ask("one", regex="ab")
    engine.drain()
    assert engine.finish["one"].status_code == 400
    assert "--grammar-backend none" in (engine.finish["one"].message or "")


def test_a_length_limit_leaves_a_valid_beginning(server):
    engine = server()
    engine.ask("one", regex="(ab){9}", max_new_tokens=5)
    engine.drain()
    assert engine.finish["one"].type == "length"
    assert ("ab" * 9).startswith(engine.text("one"))


def test_no_new_tokens_is_a_valid_wish(server):
    engine = server()
    engine.ask("one", regex="ab", max_new_tokens=0)
    engine.drain()
    assert engine.finish["one"].type == "length" and engine.ids["one"] == []


def test_a_stop_token_inside_the_grammar_ends_the_answer(server, vocabulary):
    engine = server()
    stop = vocabulary.entries.index("b")
    engine.ask("one", regex="[ab]{30}", stop_token_ids=[stop], ignore_eos=True)
    engine.drain()
    assert engine.finish["one"].matched == stop
    assert engine.ids["one"].count(stop) == 1 and engine.ids["one"][-1] == stop


def test_a_dead_end_ends_the_answer_with_the_reason(server):
    engine = server()
    engine.ask("one", regex="a\u00e9")
    engine.drain()
    assert engine.finish["one"].type == "abort" and engine.finish["one"].status_code == 400
    assert "no token" in (engine.finish["one"].message or "")
    assert engine.text("one") == "a"


def test_a_retracted_answer_goes_on_where_it_was(server):
    engine = server(pool_tokens=120, conservativeness=0.05)
    for i in range(6):
        engine.ask(f"r{i}", [i, *PROMPT], regex="([ab]{2}[0-9]){12}", max_new_tokens=60)
    engine.drain()
    assert engine.engine.retractions > 0
    for i in range(6):
        assert re.fullmatch("([ab]{2}[0-9]){12}", engine.text(f"r{i}")), engine.text(f"r{i}")


@settings(
    max_examples=40,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    seed=st.integers(0, 2**32),
    policy=st.sampled_from(sorted(POLICIES)),
    pool_tokens=st.sampled_from([1100, 2500]),
    plain=st.integers(0, 4),
    aborted=st.booleans(),
)
def test_every_finished_answer_is_valid_whatever_runs_beside_it(
    server, seed, policy, pool_tokens, plain, aborted
):
    engine = server(policy=policy, pool_tokens=pool_tokens, context_length=1000)
    asked = {f"case{i}": case for i, case in enumerate(cases(seed, schemas=4, regexes=2))}
    for i, (rid, case) in enumerate(asked.items()):
        engine.ask(rid, [i, *PROMPT], **{case.kind: case.text, "max_new_tokens": 800})
        if i < plain:
            engine.ask(f"plain{i}", [i, 5, 5], ignore_eos=True, max_new_tokens=30 + i)
    if aborted:
        for _ in range(seed % 60):
            engine.turn()
            engine.clock.advance_to(engine.lanes.next_completion_s() or engine.clock.now_s)
        engine.engine.abort("case0")
    engine.drain()
    for rid, case in asked.items():
        if engine.finish[rid].type == "stop":
            assert case.problem(engine.text(rid)) is None
    for i in range(min(plain, len(asked))):
        assert len(engine.ids[f"plain{i}"]) == 30 + i
    assert math.isfinite(engine.clock.now_s)
