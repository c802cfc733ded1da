"""The gang's turns, step by step on virtual lanes: order of launches and what waits for what."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field, replace

import pytest

from drift_scheduler.backlog import Backlog, Prompt
from drift_scheduler.dispatcher import Admission, Forecast, Plan
from drift_scheduler.gang import DecodeLoad, Gang
from drift_scheduler.lane import Phase
from drift_scheduler.lane_virtual import TimedWork, VirtualClock, VirtualLanes
from drift_scheduler.partition import Partition, PartitionTable
from drift_scheduler.policies.by_batch_size import SplitByBatchSize
from drift_scheduler.policies.chunked import Chunked
from drift_scheduler.policies.take_turns import TakeTurns
from drift_scheduler.shapes import DecodeShape, PrefillShape
from drift_scheduler.timeline import LaneRun, Timeline
from drift_scheduler.view import LoadView

LAYERS = 8
LAYER_S = 1.0
STEP_S = 2.5
TOKEN_S = 0.5
CONTEXT = 100  # tokens that a request attends to
TABLE = PartitionTable(4, (Partition(1, 3, 1), Partition(2, 2, 2)))


@dataclass
class Prefill:
    """A batch of one request; answers with `steps` decode steps."""

    name: str
    steps: int
    log: list[tuple]
    cancelled: bool = False
    indivisible: bool = False
    tokens: int = 10
    due_s: float = math.inf

    @property
    def shape(self) -> PrefillShape:
        return PrefillShape.of([(self.tokens, 0)])

    def slice_work(self, lane, first, last):
        self.log.append(("slice", self.name, lane.partition.index, first, last))
        return TimedWork((last - first) * LAYER_S)


@dataclass
class Step:
    members: list[str]
    log: list[tuple]
    rides: dict[str, int] = field(default_factory=dict)  # prompt tokens

    @property
    def shape(self) -> DecodeShape:
        return DecodeShape(len(self.members), CONTEXT * len(self.members))

    @property
    def fused(self) -> PrefillShape | None:
        parts = [(tokens, 0) for tokens in self.rides.values()]
        return PrefillShape.of(parts) if parts else None

    def step_work(self, lane):
        self.log.append(("step", self.name, lane.partition.index))
        return TimedWork(STEP_S + TOKEN_S * sum(self.rides.values()))

    @property
    def name(self) -> str:
        """Like "a+b+c:4": a and b decode, four tokens of c ride along."""
        return "+".join([*self.members, *(f"{name}:{n}" for name, n in self.rides.items())])


@dataclass
class Engine:
    """Prefills one request at a time, then decodes all that have steps left to launch. A prompt
    that began in a fused step goes on as a prefill batch of what is left of it."""

    num_layers: int = LAYERS
    queue: list[Prefill] = field(default_factory=list)
    left: dict[str, int] = field(default_factory=dict)
    log: list[tuple] = field(default_factory=list)
    memory: bool = True

    def ask(self, name: str, steps: int, due_s: float = math.inf) -> Prefill:
        self.queue.append(Prefill(name, steps, self.log, due_s=due_s))
        return self.queue[-1]

    @property
    def waiting(self) -> int:
        return len(self.queue)

    @property
    def waiting_tokens(self) -> int:
        return sum(job.tokens for job in self.queue)

    @property
    def backlog(self) -> Backlog:
        backlog = Backlog()
        for arrival_s, job in enumerate(self.queue):
            backlog.add(Prompt(job.name, job.tokens, 0, arrival_s, job.due_s))
        return backlog

    def decode_load(self) -> DecodeLoad:
        running = sum(steps > 0 for steps in self.left.values())
        return DecodeLoad(DecodeShape(running, CONTEXT * running))

    def shed(self, keys):
        self.log.append(("shed", *keys))
        self.queue = [job for job in self.queue if job.name not in keys]

    def begin_prefill(self, admission):
        order = admission.order
        if order is None:
            order = [job.name for job in self.queue]
        named = [job for name in order for job in self.queue if job.name == name]
        if not named or not self.memory:
            return None
        self.queue.remove(named[0])
        return named[0]

    def finish_prefill(self, job):
        self.log.append(("joined", job.name))
        if not job.cancelled:
            self.left[job.name] = job.steps

    def begin_decode(self, steps_in_flight, fused_tokens, fused_order):
        members = [name for name, steps in self.left.items() if steps > 0]
        for name in members:
            self.left[name] -= 1
        step = Step(members, self.log)
        order = fused_order or [job.name for job in self.queue]
        named = [job for name in order for job in self.queue if job.name == name]
        if named and fused_tokens:
            prompt = named[0]
            step.rides[prompt.name] = min(fused_tokens, prompt.tokens)
            prompt.tokens -= step.rides[prompt.name]
            if prompt.tokens == 0:
                self.queue.remove(prompt)
                self.left[prompt.name] = prompt.steps
        return step if self.memory and (members or step.rides) else None

    def finish_decode(self, job):
        self.log.append(("settled", job.name))


class Bench:
    """A gang over the engine above; the clock moves from one completion to the next."""

    def __init__(self, dispatcher=None, clock: VirtualClock | None = None) -> None:
        self.engine = Engine()
        self.clock = clock or VirtualClock()
        self.lanes = VirtualLanes(TABLE, self.clock)
        self.timeline = Timeline()
        self.observed: list[LaneRun] = []
        self.gang = Gang(
            self.engine,
            self.lanes,
            dispatcher or SplitByBatchSize(TABLE, (1, 2)),
            self.timeline,
            self.clock,
            self.observed.append,
        )

    @property
    def log(self) -> list[tuple]:
        return self.engine.log

    def settle(self) -> None:
        while self.gang.turn():
            pass

    def advance(self) -> bool:
        """To the next completion, and turns until nothing more can be done."""
        next_s = self.lanes.next_completion_s()
        if next_s is None:
            return False
        self.clock.advance_to(next_s)
        self.settle()
        return True

    def finish(self) -> None:
        self.settle()
        for _ in range(1000):
            if not self.advance():
                break
        assert self.gang.idle

    def decoding(self, name: str = "a", steps: int = 100) -> None:
        """Until `name` decodes with two steps in flight and nothing else happens."""
        self.engine.ask(name, steps)
        self.settle()
        while name not in self.engine.left:
            self.advance()
        self.advance()
        self.log.clear()


def test_an_idle_gang_does_nothing():
    bench = Bench()
    assert bench.gang.idle
    assert not bench.gang.turn()
    assert bench.lanes.next_completion_s() is None


def test_a_lone_request_prefills_in_one_slice_and_decodes_on_the_whole_device():
    bench = Bench()
    bench.engine.ask("a", steps=2)
    bench.finish()
    assert bench.log == [
        ("slice", "a", 0, 0, LAYERS),
        ("joined", "a"),
        ("step", "a", 0),
        ("step", "a", 0),
        ("settled", "a"),
        ("settled", "a"),
    ]
    assert bench.clock.now_s == LAYERS * LAYER_S + 2 * STEP_S


def test_a_step_is_launched_before_the_one_ahead_is_settled_and_never_a_third():
    bench = Bench()
    bench.decoding("a", steps=6)
    while bench.advance():
        pass
    in_flight, depths = 2, []
    for event in bench.log:
        in_flight += {"step": 1, "settled": -1}.get(event[0], 0)
        depths.append(in_flight)
    assert max(depths) == 2
    # The lane never waits for the host: every step starts when the one before it ends.
    steps = bench.timeline.runs(Phase.DECODE)
    assert len(steps) == 6
    for earlier, later in itertools.pairwise(steps):
        assert later.span.start_s == earlier.span.end_s


def test_in_one_turn_decode_is_launched_before_prefill():
    class Both:
        """Decode at every turn, one prefill layer if there is a batch."""

        def admit(self, view: LoadView, now_s: float) -> Admission | None:
            return None if view.prefill else Admission()

        def dispatch(self, view: LoadView, now_s: float) -> Plan:
            return Plan(TABLE[1], decode=view.running > 0, prefill_layers=1)

    bench = Bench(Both())
    bench.engine.left["a"] = 1
    bench.engine.ask("b", steps=1)
    bench.gang.turn()
    assert bench.log == [("step", "a", 1), ("slice", "b", 1, 0, 1)]


def test_slices_of_a_prefill_outlast_a_step_and_cover_every_layer_once():
    bench = Bench()
    bench.decoding()
    bench.engine.ask("b", steps=1)
    bench.settle()
    while "b" not in bench.engine.left:
        bench.advance()
    slices = [event[3:] for event in bench.log if event[0] == "slice"]
    assert slices[0] == (0, 1)  # no layer is measured yet
    # ceil(2.5 / 1.0) would outlast a step; a slice has two at most.
    assert [last - first for first, last in slices if last < LAYERS][2:] == [2, 2]
    assert [first for first, _ in slices] == [0] + [last for _, last in slices[:-1]]
    assert slices[-1][1] == LAYERS
    assert {event[2] for event in bench.log if event[0] == "slice"} == {1}
    runs = bench.timeline.runs(Phase.PREFILL)
    assert sum(run.layers for run in runs) == 2 * LAYERS
    bench.advance()  # the step that the last slice ran beside
    assert bench.timeline.both_busy_s == pytest.approx(LAYERS * LAYER_S)


def test_a_finished_prefill_joins_the_next_step():
    bench = Bench()
    bench.decoding()
    bench.engine.ask("b", steps=3)
    bench.settle()
    while ("joined", "b") not in bench.log:
        bench.advance()
    assert bench.timeline.runs(Phase.PREFILL)[-1].span.end_s == bench.clock.now_s
    bench.advance()
    after_join = bench.log[bench.log.index(("joined", "b")) + 1 :]
    assert next(event for event in after_join if event[0] == "step")[1] == "a+b"


class Scripted:
    """Gives the plans it is told to, in turn; nothing once they run out. Prefill batches are
    admitted as `admissions` say, and whenever none is in flight after that."""

    def __init__(self, *plans: Plan, admit: tuple[Admission | None, ...] = ()) -> None:
        self.plans = list(plans)
        self.admissions = list(admit)
        self.views: list[LoadView] = []  # of every turn
        self.asked: list[LoadView] = []  # of every turn at which a batch could have been admitted

    def admit(self, view: LoadView, now_s: float) -> Admission | None:
        self.asked.append(view)
        if self.admissions:
            return self.admissions.pop(0)
        return None if view.prefill else Admission()

    def dispatch(self, view: LoadView, now_s: float) -> Plan:
        self.views.append(view)
        return self.plans.pop(0) if self.plans else Plan(TABLE.whole)


def test_a_decode_step_does_not_wait_for_the_running_prefill():
    bench = Bench(
        Scripted(
            Plan(TABLE[1], prefill_layers=LAYERS),  # a: 0..8 s
            Plan(TABLE[1], decode=True, prefill_layers=LAYERS),  # b starts, a decodes beside it
        )
    )
    bench.engine.ask("a", steps=5)
    bench.engine.ask("b", steps=5)
    bench.gang.turn()
    bench.clock.advance_to(8.0)
    bench.gang.turn()
    bench.clock.advance_to(8.0 + STEP_S)
    bench.gang.turn()
    assert bench.timeline.runs(Phase.DECODE)[0].span.end_s == 8.0 + STEP_S


def test_a_phase_that_changes_lanes_stays_in_order():
    bench = Bench(
        Scripted(
            Plan(TABLE[1], decode=True, prefill_layers=2),  # prefill 0..2 s, decode 0..2.5 s
            Plan(TABLE[2], decode=True, prefill_layers=3),  # 2..5 s, 2.5..5 s
            Plan(TABLE.whole, prefill_layers=3),  # 5..8 s
        )
    )
    bench.engine.left["a"] = 5
    bench.engine.ask("b", steps=0)
    for _ in range(3):
        bench.gang.turn()
    bench.clock.advance_to(8.0)
    bench.settle()
    spans = {
        phase: [(run.partition.index, run.span.start_s, run.span.end_s) for run in runs]
        for phase in Phase
        if (runs := bench.timeline.runs(phase))
    }
    assert spans == {
        Phase.PREFILL: [(1, 0.0, 2.0), (2, 2.0, 5.0), (0, 5.0, 8.0)],
        Phase.DECODE: [(1, 0.0, 2.5), (2, 2.5, 5.0)],
    }


def test_the_first_step_of_a_request_names_the_prefill_it_follows():
    """Virtual time cannot tell: the host has seen the slice end. A device needs the order too."""
    bench = Bench()
    launches = record_launches(bench.lanes)
    bench.decoding()
    bench.engine.ask("b", steps=4)
    bench.settle()
    while "b" not in bench.engine.left:
        bench.advance()
    bench.advance()
    slices = [i for i, (phase, _) in enumerate(launches) if phase is Phase.PREFILL]
    # One step follows the only slice of a, one the last slice of b; no other waits for prefill.
    waits = [
        [earlier for earlier in after if earlier in slices]
        for phase, after in launches
        if phase is Phase.DECODE
    ]
    assert [wait for wait in waits if wait] == [[slices[0]], [slices[-1]]]


def test_a_prefill_that_is_not_wanted_any_more_launches_nothing_and_ends():
    bench = Bench()
    bench.decoding()
    job = bench.engine.ask("b", steps=3)
    bench.settle()
    job.cancelled = True
    launched = sum(event[0] == "slice" for event in bench.log)
    assert launched
    for _ in range(4):
        bench.advance()
    assert sum(event[0] == "slice" for event in bench.log) == launched
    assert bench.log.count(("joined", "b")) == 1
    # Not before its launched slices are done: they still write its memory.
    assert bench.timeline.runs(Phase.PREFILL)[-1].layers == 1
    bench.engine.ask("c", steps=1)
    while "c" not in bench.engine.left:
        bench.settle()
        bench.advance()


def test_a_batch_cancelled_while_slices_run_is_kept_until_they_are_done():
    bench = Bench()
    job = bench.engine.ask("a", steps=1)
    bench.settle()
    job.cancelled = True
    bench.settle()
    assert ("joined", "a") not in bench.log
    assert not bench.gang.idle
    bench.advance()
    assert ("joined", "a") in bench.log
    assert bench.gang.idle


def test_a_batch_cancelled_before_its_first_slice_ends_at_the_next_turn():
    bench = Bench(Scripted(Plan(TABLE[1], prefill_layers=1)))
    bench.engine.ask("a", steps=1).cancelled = True
    bench.gang.turn()
    bench.gang.turn()
    assert bench.log == [("joined", "a")]
    assert bench.gang.idle


def test_without_memory_a_turn_launches_nothing_and_says_so():
    bench = Bench()
    bench.engine.memory = False
    bench.engine.left["a"] = 3
    bench.engine.ask("b", steps=1)
    assert not bench.gang.turn()
    assert bench.gang.idle


def test_taking_turns_prefills_first_then_decodes():
    bench = Bench(TakeTurns(TABLE))
    bench.engine.ask("a", steps=2)
    bench.engine.ask("b", steps=2)
    bench.finish()
    assert [event[:2] for event in bench.log[:4]] == [
        ("slice", "a"),
        ("joined", "a"),
        ("slice", "b"),
        ("joined", "b"),
    ]
    assert bench.timeline.both_busy_s == 0
    assert {run.partition.index for phase in Phase for run in bench.timeline.runs(phase)} == {0}


def test_a_prompt_rides_in_the_steps_of_others_and_steps_stay_two_ahead():
    bench = Bench(Chunked(TABLE, step_tokens=5))
    bench.engine.left["a"] = 6
    bench.engine.ask("b", steps=2)  # of 10 tokens
    bench.finish()
    assert bench.log == [
        ("step", "a+b:4", 0),
        ("step", "a+b:4", 0),  # goes on before the host has seen the first part end
        ("settled", "a+b:4"),
        ("step", "a+b:2", 0),
        ("settled", "a+b:4"),
        ("step", "a+b", 0),  # decodes before the host has seen its first token
        ("settled", "a+b:2"),
        ("step", "a+b", 0),
        ("settled", "a+b"),
        ("step", "a", 0),
        ("settled", "a+b"),
        ("settled", "a"),
    ]
    runs = bench.timeline.runs(Phase.DECODE)
    assert [(run.requests, run.tokens, run.fused_tokens) for run in runs] == [
        (2, 5, 4),
        (2, 5, 4),
        (2, 3, 2),
        (2, 2, 0),
        (2, 2, 0),
        (1, 1, 0),
    ]
    assert not bench.timeline.runs(Phase.PREFILL)
    assert bench.timeline.fused_busy_s == 3 * STEP_S + 10 * TOKEN_S
    assert bench.timeline.busy_s(Phase.DECODE) == 6 * STEP_S + 10 * TOKEN_S


def test_with_nothing_decoding_a_step_is_just_a_chunk():
    bench = Bench(Chunked(TABLE, step_tokens=8))
    bench.engine.ask("a", steps=1)
    bench.finish()
    steps = [event[1] for event in bench.log if event[0] == "step"]
    assert steps == ["a:8", "a:2", "a"]


def test_fused_steps_and_slices_run_one_behind_the_other():
    """The prompt begins in a fused step, goes on in a prefill batch; the next one rides again."""
    bench = Bench(
        Scripted(
            Plan(TABLE.whole, decode=True, fused_tokens=4),  # 0..4.5 s
            Plan(TABLE[1], prefill_layers=LAYERS, decode=True),  # 4.5..12.5 s, step 4.5..7 s
            Plan(TABLE.whole, decode=True, fused_tokens=4),
            admit=(None, Admission(), None),
        )
    )
    launches = record_launches(bench.lanes)
    bench.engine.left["a"] = 9
    bench.engine.ask("b", steps=1)
    bench.engine.ask("c", steps=1)
    bench.gang.turn()
    bench.gang.turn()
    bench.clock.advance_to(12.5)
    bench.gang.turn()
    assert bench.log == [
        ("step", "a+b:4", 0),
        ("step", "a", 1),
        ("slice", "b", 1, 0, LAYERS),
        ("settled", "a+b:4"),
        ("settled", "a"),
        ("joined", "b"),
        ("step", "a+b+c:4", 0),
    ]
    assert launches == [
        (Phase.DECODE, []),
        (Phase.DECODE, [0]),
        (Phase.PREFILL, [0]),
        (Phase.DECODE, [1, 2]),
    ]
    [run] = bench.timeline.runs(Phase.PREFILL)
    assert (run.span.start_s, run.tokens) == (4.5, 6)


def test_nothing_rides_beside_a_prefill_batch():
    bench = Bench(
        Scripted(
            Plan(TABLE.whole, prefill_layers=1),
            Plan(TABLE.whole, decode=True, fused_tokens=4),
        )
    )
    bench.engine.left["a"] = 9
    bench.engine.ask("b", steps=1)
    bench.engine.ask("c", steps=1)
    bench.gang.turn()
    bench.gang.turn()
    assert bench.log == [("slice", "b", 0, 0, 1), ("step", "a", 0)]


class RestlessClock(VirtualClock):
    """Every look finds the next of the times `ahead`; then time stands still."""

    def __init__(self) -> None:
        self._now_s = 0.0
        self.ahead: list[float] = []

    @property
    def now_s(self) -> float:
        if self.ahead:
            self._now_s = self.ahead.pop(0)
        return self._now_s

    @now_s.setter
    def now_s(self, now_s: float) -> None:
        self._now_s = now_s


@pytest.mark.parametrize("looks", [(4.0, 13.0), (4.0, 5.0, 13.0), (4.0, 4.0, 4.0, 13.0), (13.0,)])
def test_a_batch_is_finished_after_the_fused_step_that_it_follows(looks):
    """Also if both end between two looks of the same turn: the step at 4.5 s, the batch at 12.5."""
    bench = Bench(
        Scripted(
            Plan(TABLE.whole, decode=True, fused_tokens=4),
            Plan(TABLE[1], prefill_layers=LAYERS),
            admit=(None, Admission()),
        ),
        clock=RestlessClock(),
    )
    bench.engine.ask("a", steps=1)
    bench.gang.turn()
    bench.gang.turn()
    bench.clock.ahead += looks
    for _ in range(5):
        bench.gang.turn()
    assert bench.log[2:] == [("settled", "a:4"), ("joined", "a")]


def test_the_time_of_a_step_is_that_of_one_without_prompts():
    class Watch(Chunked):
        def dispatch(self, view: LoadView, now_s: float) -> Plan:
            seen.append(view)
            return super().dispatch(view, now_s)

    seen: list[LoadView] = []
    bench = Bench(Watch(TABLE, step_tokens=5))
    bench.engine.left["a"] = 9
    bench.engine.ask("b", steps=1)
    bench.finish()
    assert seen[0].waiting_tokens == 10
    assert seen[-1].waiting_tokens == 0
    assert {view.decode_step_s for view in seen} == {None, STEP_S}


# Pre-emption.

PRE_EMPT = Admission(preempts=True)


def pre_empting(*plans: Plan, clock: VirtualClock | None = None) -> tuple[Bench, Scripted]:
    """Batch a is admitted at the first turn, b in front of it at the second."""
    dispatcher = Scripted(*plans, admit=(Admission(("a",)), PRE_EMPT))
    bench = Bench(dispatcher, clock)
    bench.engine.ask("a", steps=1, due_s=90.0)
    bench.engine.ask("b", steps=1, due_s=20.0)
    bench.gang.turn()
    return bench, dispatcher


def layers(count: int) -> Plan:
    return Plan(TABLE.whole, prefill_layers=count)


def test_a_parked_batch_goes_on_where_it_was_when_the_other_is_done():
    bench, _ = pre_empting(layers(3), layers(LAYERS), layers(0), layers(LAYERS))
    bench.gang.turn()
    bench.clock.advance_to(11.0)
    bench.settle()
    bench.finish()
    assert bench.log == [
        ("slice", "a", 0, 0, 3),
        ("slice", "b", 0, 0, LAYERS),
        ("joined", "b"),
        ("slice", "a", 0, 3, LAYERS),
        ("joined", "a"),
    ]
    runs = bench.timeline.runs(Phase.PREFILL)
    assert [(run.span.start_s, run.span.end_s) for run in runs] == [(0, 3), (3, 11), (11, 16)]


def test_a_view_tells_the_parked_batch_from_the_one_in_flight():
    bench, dispatcher = pre_empting(layers(3), layers(1))
    bench.gang.turn()
    first, second = dispatcher.views
    assert (first.prefill.due_s, first.parked) == (90.0, None)
    assert (second.prefill.due_s, second.prefill.layers_launched) == (20.0, 0)
    assert (second.parked.due_s, second.parked.layers_launched) == (90.0, 3)
    assert (second.parked.slices_in_flight, second.waiting) == (1, 0)


def test_a_batch_that_has_pre_empted_is_not_pre_empted_itself():
    bench, dispatcher = pre_empting(layers(3), layers(1))
    bench.engine.ask("c", steps=1)
    dispatcher.admissions += [PRE_EMPT] * 9
    asked = len(dispatcher.asked)
    for _ in range(5):
        bench.gang.turn()
    assert len(dispatcher.asked) == asked + 1
    assert bench.log == [("slice", "a", 0, 0, 3), ("slice", "b", 0, 0, 1)]


def test_a_batch_whose_last_layer_is_launched_cannot_be_pre_empted():
    bench, dispatcher = pre_empting(layers(LAYERS))
    for _ in range(5):
        bench.gang.turn()
    assert len(dispatcher.asked) == 1
    assert bench.engine.waiting == 1


@pytest.mark.parametrize("admission", [Admission(), Admission(("b",)), Admission((), tokens=5)])
def test_a_second_batch_only_begins_if_it_pre_empts(admission):
    bench, dispatcher = pre_empting(layers(3))
    dispatcher.admissions = [admission] * 3
    for _ in range(3):
        bench.gang.turn()
    assert len(dispatcher.asked) == 4
    assert bench.engine.waiting == 1


def test_nothing_is_pre_empted_where_nothing_is_in_flight():
    bench = Bench(Scripted(admit=(PRE_EMPT,)))
    bench.engine.ask("a", steps=1)
    bench.gang.turn()
    assert bench.gang.idle


def test_where_nothing_fits_the_batch_in_flight_stays_in_flight():
    bench, dispatcher = pre_empting(layers(3), layers(2))
    bench.engine.memory = False
    bench.gang.turn()
    assert bench.log[1:] == [("slice", "a", 0, 3, 5)]
    assert dispatcher.views[-1].parked is None


@pytest.mark.parametrize("looks", [(3.0, 3.5, 20.0), (2.0, 3.5, 20.0), (1.0, 4.5, 20.0), (20.0,)])
def test_slices_are_settled_in_order_whenever_they_are_seen_to_end(looks):
    """a runs 0..2 and 2..3, b 3..4 and 4..11; a look is a moment at which the gang polls."""
    bench, dispatcher = pre_empting(
        layers(2),
        layers(0),
        layers(1),
        layers(1),
        layers(LAYERS - 1),
        clock=RestlessClock(),
    )
    dispatcher.admissions = [None, None, PRE_EMPT]
    for _ in range(4):
        bench.gang.turn()
    bench.clock.ahead += looks
    for _ in range(4):
        bench.gang.turn()
    spans = [(run.span.start_s, run.layers) for run in bench.timeline.runs(Phase.PREFILL)]
    assert spans == [(0, 2), (2, 1), (3, 1), (4, 7)]


def test_a_parked_batch_that_is_not_wanted_any_more_ends_behind_the_other():
    bench, _ = pre_empting(layers(3), layers(LAYERS), *[layers(LAYERS)] * 5)
    a = bench.gang._prefill.job
    bench.gang.turn()
    a.cancelled = True
    bench.finish()
    assert [event for event in bench.log if event[0] == "joined"] == [
        ("joined", "b"),
        ("joined", "a"),
    ]
    assert sum(event[:2] == ("slice", "a") for event in bench.log) == 1
    assert bench.engine.left == {"b": 1}


def test_a_pre_empting_batch_that_is_not_wanted_any_more_makes_way():
    bench, _ = pre_empting(layers(3), layers(2), *[layers(LAYERS)] * 9)
    bench.gang.turn()
    bench.gang._prefill.job.cancelled = True
    bench.finish()
    assert [event[:2] for event in bench.log] == [
        ("slice", "a"),
        ("slice", "b"),
        ("joined", "b"),
        ("slice", "a"),
        ("joined", "a"),
    ]


# What else a dispatcher may say.


def test_on_the_whole_device_the_phases_run_one_behind_the_other():
    bench = Bench(
        Scripted(
            Plan(TABLE.whole, prefill_layers=2),  # 0..2 s
            Plan(TABLE.whole, decode=True, prefill_layers=3),  # 2..4.5 s, 4.5..7.5 s
            Plan(TABLE.whole, decode=True),  # 7.5..10 s
            Plan(TABLE.whole, prefill_layers=3),  # 10..13 s
        )
    )
    launches = record_launches(bench.lanes)
    bench.engine.left["a"] = 9
    bench.engine.ask("b", steps=1)
    for _ in range(4):
        bench.gang.turn()
    assert launches == [
        (Phase.PREFILL, []),
        (Phase.DECODE, [0]),
        (Phase.PREFILL, [0, 1]),
        (Phase.DECODE, [1, 2]),
        (Phase.PREFILL, [2, 3]),
    ]
    bench.clock.advance_to(13.0)
    bench.settle()
    assert bench.timeline.both_busy_s == 0
    busy_s = sum(bench.timeline.busy_s(phase) for phase in Phase)
    assert busy_s == 13.0


def test_prompts_may_be_refused_and_others_admitted_at_once():
    bench = Bench(Scripted(admit=(Admission(("c",), shed=("a", "b")),)))
    for name in "abc":
        bench.engine.ask(name, steps=1)
    bench.gang.turn()
    assert bench.log == [("shed", "a", "b")]
    assert bench.gang.dispatcher.views[0].waiting == 0
    assert bench.gang.dispatcher.views[0].prefill is not None


def test_prompts_may_be_refused_beside_a_batch():
    bench = Bench(Scripted(layers(1), admit=(Admission(), Admission(shed=("b",)))))
    bench.engine.ask("a", steps=1)
    bench.engine.ask("b", steps=1)
    bench.gang.turn()
    bench.gang.turn()
    assert bench.log == [("slice", "a", 0, 0, 1), ("shed", "b")]


def test_the_order_of_a_fused_step_reaches_the_engine():
    plan = Plan(TABLE.whole, decode=True, fused_tokens=4, fused_order=("b", "a"))
    bench = Bench(Scripted(plan, admit=(None,)))
    bench.engine.ask("a", steps=1)
    bench.engine.ask("b", steps=1)
    bench.gang.turn()
    assert bench.log == [("step", "b:4", 0)]


def test_a_gang_says_when_to_look_again():
    bench = Bench(Scripted(Plan(TABLE.whole, look_again_s=3.5), Plan(TABLE.whole)))
    assert bench.gang.look_again_s is None
    bench.gang.turn()
    assert bench.gang.look_again_s == 3.5
    bench.gang.turn()
    assert bench.gang.look_again_s is None


def test_the_end_of_the_launched_steps_is_foretold():
    step = Plan(TABLE.whole, decode=True)
    dispatcher = Scripted(
        step,
        replace(step, step=Forecast(3.0, 4.0)),
        replace(step, step=Forecast(2.0, 4.0)),
        Plan(TABLE.whole),
    )
    bench = Bench(dispatcher)
    bench.engine.left["a"] = 9
    bench.gang.turn()
    bench.clock.advance_to(1.0)
    bench.gang.turn()
    bench.clock.advance_to(2 * STEP_S)
    bench.gang.turn()
    bench.clock.advance_to(2 * STEP_S + 1)
    bench.gang.turn()
    ends_s = [view.decode_ends_s for view in dispatcher.views]
    # Nothing in flight; a step of which nothing is known; nothing in flight; one of 2 s from 5 s.
    assert ends_s == [None, None, None, 2 * STEP_S + 2.0]


def test_launched_steps_are_expected_one_behind_the_other():
    step = Plan(TABLE.whole, decode=True)
    forecast = replace(step, step=Forecast(3.0, 4.0))
    dispatcher = Scripted(step, forecast, step, Plan(TABLE.whole))
    bench = Bench(dispatcher)
    bench.engine.left["a"] = 9
    bench.gang.turn()  # 0..2.5 s
    bench.gang.turn()
    bench.clock.advance_to(STEP_S)
    bench.gang.turn()
    bench.gang.turn()
    # The second from the end of the first, by its forecast; the third as long as the last one.
    assert dispatcher.views[2].decode_ends_s == STEP_S + 3.0
    assert dispatcher.views[3].decode_ends_s == STEP_S + 3.0 + STEP_S


def test_every_run_is_observed_once_with_what_it_was_and_what_ran_beside_it():
    beside = Plan(
        TABLE[1],
        decode=True,
        prefill_layers=2,
        step=Forecast(1.0, 2.0),
        layer=Forecast(0.5, 1.5),
        reason="both",
    )
    bench = Bench(
        Scripted(
            Plan(TABLE.whole, decode=True, fused_tokens=4),
            beside,
            Plan(TABLE.whole, prefill_layers=6, reason="alone"),
            admit=(None, Admission()),
        )
    )
    bench.engine.left.update(a=3, b=3)
    bench.engine.ask("c", steps=0)
    bench.gang.turn()
    for _ in range(3):
        bench.advance()
    bench.finish()
    both = DecodeShape(2, 2 * CONTEXT)
    prompt = PrefillShape.of([(6, 0)])
    seen = [
        (run.phase, run.partition.index, run.layers, run.decode, run.prefill, run.reason)
        for run in bench.observed
    ]
    assert seen == [
        (Phase.DECODE, 0, 0, both, PrefillShape.of([(4, 0)]), ""),
        (Phase.PREFILL, 1, 2, both, prompt, "both"),
        (Phase.DECODE, 1, 0, both, prompt, "both"),
        (Phase.PREFILL, 0, 6, None, prompt, "alone"),
    ]
    assert [run.fused_tokens for run in bench.observed] == [4, 0, 0, 0]
    assert [run.forecast for run in bench.observed] == [
        None,
        Forecast(1.0, 3.0),
        Forecast(1.0, 2.0),
        None,
    ]
    of_phase = {phase: [run for run in bench.observed if run.phase is phase] for phase in Phase}
    assert {phase: bench.timeline.runs(phase) for phase in Phase} == of_phase


def test_a_run_that_nothing_ran_beside_says_so():
    """Both phases have work, on a divided device, but one of them is held back."""
    bench = Bench(
        Scripted(
            Plan(TABLE[1], prefill_layers=2),  # 0..2 s
            Plan(TABLE[1]),
            Plan(TABLE[1], decode=True),  # 2..4.5 s
        )
    )
    bench.engine.left["a"] = 1
    bench.engine.ask("b", steps=1)
    bench.gang.turn()
    bench.clock.advance_to(2.0)
    bench.gang.turn()
    bench.gang.turn()
    bench.clock.advance_to(4.5)
    bench.gang.turn()
    prefill, decode = bench.observed
    assert (prefill.phase, prefill.decode) == (Phase.PREFILL, None)
    assert (decode.phase, decode.prefill) == (Phase.DECODE, None)


def record_launches(lanes: VirtualLanes) -> list[tuple[Phase, list[int]]]:
    """From now on: the phase of each launch, and which earlier launches it was put behind."""
    launches: list[tuple[Phase, list[int]]] = []
    tickets: list[object] = []

    def watch(lane):
        launch = lane.launch

        def recorded(work, after=()):
            ticket = launch(work, after)
            launches.append((lane.phase, [tickets.index(earlier) for earlier in after]))
            tickets.append(ticket)
            return ticket

        lane.launch = recorded

    for phase in Phase:
        for index in range(len(lanes.table)):
            watch(lanes.lane(phase, lanes.table[index]))
    return launches


def test_tokens_are_sent_before_anything_is_launched():
    bench = Bench()
    bench.decoding()
    bench.engine.ask("b", steps=1)
    bench.settle()
    bench.log.clear()
    bench.gang.on_settled = lambda: bench.log.append("sent")
    for _ in range(20):
        if "sent" in bench.log:
            break
        bench.advance()
    launches = [place for place, entry in enumerate(bench.log) if entry[0] in ("step", "slice")]
    assert launches
    assert bench.log.index("sent") < min(launches)


class Watching:
    """Keeps what it was told of the host."""

    def __init__(self) -> None:
        self.policy = SplitByBatchSize(TABLE, (1, 2))
        self.host_s: list[float] = []

    def admit(self, view: LoadView, now_s: float) -> Admission | None:
        return self.policy.admit(view, now_s)

    def dispatch(self, view: LoadView, now_s: float) -> Plan:
        self.host_s.append(view.host_s)
        return self.policy.dispatch(view, now_s)


def test_what_the_host_delays_tokens_by_is_learnt():
    policy = Watching()
    bench = Bench(policy)
    bench.decoding()
    on_time = policy.host_s[-1]
    for _ in range(3):  # looks again long after the step has ended
        next_s = bench.lanes.next_completion_s()
        bench.clock.advance_to(next_s + 0.5 * len(policy.host_s))
        bench.settle()
    assert policy.host_s[-1] > on_time


def test_a_pause_without_requests_is_no_delay():
    policy = Watching()
    bench = Bench(policy)
    bench.engine.left["a"] = 1
    bench.settle()
    bench.advance()
    bench.clock.advance_to(bench.clock.now_s + 60.0)
    bench.engine.left["a"] = 1
    bench.settle()
    bench.advance()
    assert policy.host_s[-1] <= policy.host_s[0]
