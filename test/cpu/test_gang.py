"""The gang's turns, step by step on virtual lanes: order of launches and what waits for what."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import pytest

from drift_scheduler.dispatcher import Chunked, LoadView, Plan, SplitByBatchSize, TakeTurns
from drift_scheduler.gang import Gang
from drift_scheduler.lane import Phase
from drift_scheduler.lane_virtual import TimedWork, VirtualClock, VirtualLanes
from drift_scheduler.partition import Partition, PartitionTable
from drift_scheduler.timeline import Timeline

LAYERS = 8
LAYER_S = 1.0
STEP_S = 2.5
TOKEN_S = 0.5
TABLE = PartitionTable(4, (Partition(1, 3, 1), Partition(2, 2, 2)))


@dataclass
class Prefill:
    """A batch of one request; answers with `steps` decode steps."""

    name: str
    steps: int
    log: list[tuple]
    cancelled: bool = False
    requests: int = 1
    tokens: int = 10

    def slice_work(self, lane, first, last):
        self.log.append(("slice", self.name, lane.partition.index, first, last))
        return TimedWork((last - first) * LAYER_S)


@dataclass
class Step:
    members: list[str]
    log: list[tuple]
    rides: dict[str, int] = field(default_factory=dict)  # prompt tokens

    @property
    def requests(self) -> int:
        return len(self.members) + len(self.rides)

    @property
    def tokens(self) -> int:
        return len(self.members) + self.fused_tokens

    @property
    def fused_tokens(self) -> int:
        return sum(self.rides.values())

    def step_work(self, lane):
        self.log.append(("step", self.name, lane.partition.index))
        return TimedWork(STEP_S + TOKEN_S * self.fused_tokens)

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

    def ask(self, name: str, steps: int) -> Prefill:
        self.queue.append(Prefill(name, steps, self.log))
        return self.queue[-1]

    @property
    def waiting(self) -> int:
        return len(self.queue)

    @property
    def waiting_tokens(self) -> int:
        return sum(job.tokens for job in self.queue)

    @property
    def running(self) -> int:
        return sum(steps > 0 for steps in self.left.values())

    def begin_prefill(self):
        return self.queue.pop(0) if self.memory else None

    def finish_prefill(self, job):
        self.log.append(("joined", job.name))
        if not job.cancelled:
            self.left[job.name] = job.steps

    def begin_decode(self, steps_in_flight, fused_tokens):
        members = [name for name, steps in self.left.items() if steps > 0]
        for name in members:
            self.left[name] -= 1
        step = Step(members, self.log)
        if self.queue and fused_tokens:
            prompt = self.queue[0]
            step.rides[prompt.name] = min(fused_tokens, prompt.tokens)
            prompt.tokens -= step.fused_tokens
            if prompt.tokens == 0:
                self.queue.remove(prompt)
                self.left[prompt.name] = prompt.steps
        return step if self.memory and step.requests else None

    def finish_decode(self, job):
        self.log.append(("settled", job.name))


class Bench:
    """A gang over the engine above; the clock moves from one completion to the next."""

    def __init__(self, dispatcher=None, clock: VirtualClock | None = None) -> None:
        self.engine = Engine()
        self.clock = clock or VirtualClock()
        self.lanes = VirtualLanes(TABLE, self.clock)
        self.timeline = Timeline()
        self.gang = Gang(
            self.engine,
            self.lanes,
            dispatcher or SplitByBatchSize(TABLE, (1, 2)),
            self.timeline,
            self.clock,
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

        def admits(self, view: LoadView, now_s: float) -> bool:
            return True

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
    assert [last - first for first, last in slices if last < LAYERS][2:] == [3]  # ceil(2.5 / 1.0)
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
    admitted as `admit` says, and whenever asked after that."""

    def __init__(self, *plans: Plan, admit: tuple[bool, ...] = ()) -> None:
        self.plans = list(plans)
        self.admit = list(admit)

    def admits(self, view: LoadView, now_s: float) -> bool:
        return self.admit.pop(0) if self.admit else True

    def dispatch(self, view: LoadView, now_s: float) -> Plan:
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
            admit=(False, True, False),
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
            admit=(False, True),
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
