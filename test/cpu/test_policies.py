"""Policies on a hand-made device: every decision, with a clock that is only a number."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drift_scheduler.backlog import Backlog, Prompt
from drift_scheduler.dispatcher import Forecast
from drift_scheduler.host_delay import START_S
from drift_scheduler.partition import Partition, PartitionTable
from drift_scheduler.policies.adaptive import LAUNCH_AHEAD_S, Adaptive
from drift_scheduler.policies.by_batch_size import SplitByBatchSize, even_thresholds
from drift_scheduler.policies.chunked import Chunked
from drift_scheduler.policies.factory import PolicyFactory
from drift_scheduler.policies.modes import (
    FUSED_STEP_TOKENS,
    LOOKED_AT,
    MIN_FUSED_TOKENS,
    Mode,
    Ways,
    best_mode,
)
from drift_scheduler.policies.names import (
    AdaptiveSpec,
    ChunkedSpec,
    StaticSpec,
    parse_policy,
)
from drift_scheduler.policies.order import (
    LATE_TURN,
    LOOK_AHEAD,
    LOOK_BACK,
    PATIENCE_S,
    SLOT_S,
    WHOLE_TOKENS,
    by_due_time,
    fewest_late,
)
from drift_scheduler.policies.static import StaticSplit
from drift_scheduler.policies.take_turns import TakeTurns
from drift_scheduler.policies.temporal import Temporal
from drift_scheduler.shapes import DecodeShape, PrefillShape
from drift_scheduler.view import LoadView, PrefillView

LAYERS = 32
TABLE = PartitionTable(
    132, (Partition(1, 116, 16), Partition(2, 100, 32), Partition(3, 84, 48), Partition(4, 68, 64))
)
SLOWER = 1.25  # beside the other phase
WORST = 1.1


class Device:
    """Prefill is bound by arithmetic, decode by bandwidth that 64 SMs use up."""

    def decode(self, shape, partition, beside):
        bandwidth = 3e12 * min(1.0, partition.decode_sms / 64) ** 0.8
        moved = 16e9 + shape.context * 131072
        return self._forecast(moved / bandwidth, beside is not None)

    def prefill(self, shape, partition, beside):
        rate = 700e12 * partition.prefill_sms / 132
        work = shape.tokens * 15e9 + (shape.squares / 2 + shape.cross) * 524288
        return self._forecast(5e-3 + work / rate, beside is not None)

    def fused(self, decode, prefill):
        alone = self.decode(decode, TABLE.whole, None).expected_s
        return self._forecast(alone + prefill.tokens * 26e-6, False)

    def _forecast(self, seconds, beside):
        expected_s = seconds * (SLOWER if beside else 1.0)
        return Forecast(expected_s, expected_s * WORST)


class ErraticDevice:
    """Each kind of work by a factor of its own: more SMs or fewer tokens may take longer."""

    def __init__(self, seed):
        self.seed = seed
        self.asked = []

    def decode(self, shape, partition, beside):
        return self._erratic(DEVICE.decode(shape, partition, beside), "d", partition, beside)

    def prefill(self, shape, partition, beside):
        return self._erratic(DEVICE.prefill(shape, partition, beside), "p", partition, beside)

    def fused(self, decode, prefill):
        return self._erratic(DEVICE.fused(decode, prefill), "f", prefill)

    def _erratic(self, forecast, *question):
        self.asked.append(question)
        draw = random.Random(f"{self.seed} {question}")
        expected_s = forecast.expected_s * draw.uniform(0.7, 1.4)
        return Forecast(expected_s, expected_s * draw.uniform(1.0, 1.5))


DEVICE = Device()
BUSY = DecodeShape(32, 32 * 9000)
PROMPT = PrefillShape.of([(4096, 4096)])


def prompt(key, new=1000, *, due_s=1.0, arrival_s=0.0, cached=0, deferred=False, begun=False):
    return Prompt(key, new, cached, arrival_s, due_s, deferred, begun)


def tenths(prompts):
    """A tenth of a second for each."""
    return [0.1] * len(prompts)


def backlog(*prompts):
    waiting = Backlog()
    for entry in prompts:
        waiting.add(entry)
    return waiting


def active(shape=PROMPT, *, launched=4, in_flight=0, layer_s=5e-3, due_s=math.inf):
    return PrefillView(shape, launched, LAYERS, in_flight, layer_s, due_s)


def load(*prompts, decode=BUSY, prefill=None, tbt_s=0.05, **fields):
    waiting = backlog(*prompts)
    return LoadView(
        waiting=len(waiting),
        running=decode.requests,
        decode=decode,
        prefill=prefill,
        tbt_s=tbt_s,
        backlog=waiting,
        waiting_tokens=waiting.new_tokens,
        **{"decode_in_flight": 0} | fields,
    )


IDLE = DecodeShape(0, 0)
ADAPTIVE = Adaptive(TABLE, DEVICE, LAYERS, max_batch_tokens=8192)


def solo_s(shape=BUSY):
    return DEVICE.decode(shape, TABLE.whole, None).worst_s


def test_near_the_steps_own_time_the_device_is_split_and_with_slack_it_is_not():
    tight = best_mode(DEVICE, TABLE, BUSY, PROMPT, 1.5 * solo_s(), LAYERS)
    loose = best_mode(DEVICE, TABLE, BUSY, PROMPT, 5 * solo_s(), LAYERS)
    assert tight.mode is Mode.SPLIT
    assert loose.mode is not Mode.SPLIT
    assert loose.rate > tight.rate


def test_nothing_meets_a_deadline_shorter_than_the_step():
    assert best_mode(DEVICE, TABLE, BUSY, PROMPT, 0.9 * solo_s(), LAYERS) is None


@given(
    requests=st.integers(1, 200),
    context=st.integers(1, 20_000),
    new=st.integers(1, 8192),
    cached=st.integers(0, 32768),
    limit_s=st.floats(1e-3, 0.5),
    modes=st.frozensets(st.sampled_from(Mode), min_size=1),
)
def test_a_choice_meets_the_deadline_and_no_allowed_one_is_faster(
    requests, context, new, cached, limit_s, modes
):
    decode = DecodeShape(requests, requests * context)
    shape = PrefillShape.of([(new, cached)])
    choice = best_mode(DEVICE, TABLE, decode, shape, limit_s, LAYERS, modes)
    if choice is None:
        return
    assert choice.mode in modes
    gap_s = choice.step.worst_s + (choice.layers * choice.layer.worst_s if choice.layers else 0)
    assert gap_s <= limit_s + 1e-12
    assert (choice.fused_tokens > 0) == (choice.mode is Mode.FUSED)
    assert choice.fused_tokens <= new
    for mode in modes:
        other = best_mode(DEVICE, TABLE, decode, shape, limit_s, LAYERS, frozenset({mode}))
        assert other is None or other.rate <= choice.rate


def all_ways(model, decode, shape, limit_s, modes, riding, most_tokens):
    """(rate, mode, partition, tokens in a fused step) of what is compared, from the rules alone."""
    found = []
    if Mode.SPLIT in modes:
        in_time = [s for s in TABLE.splits if model.decode(decode, s, shape).worst_s <= limit_s]
        for split in in_time[:1]:
            rate = shape.tokens / model.prefill(shape, split, decode).expected_s
            found.append((rate, Mode.SPLIT, split, 0))
    if Mode.TURNS in modes:
        step = model.decode(decode, TABLE.whole, None)
        layer = model.prefill(shape, TABLE.whole, None).times(1 / LAYERS)
        layers = min(int((limit_s - step.worst_s) / layer.worst_s), LAYERS)
        if layers >= 1:
            round_s = step.expected_s + layers * layer.expected_s
            rate = shape.tokens * layers / LAYERS / round_s
            found.append((rate, Mode.TURNS, TABLE.whole, 0))
    if Mode.FUSED in modes:
        sizes = {
            min(size - decode.requests, shape.tokens)
            for size in FUSED_STEP_TOKENS
            if size <= most_tokens
        }
        sizes = sorted(size for size in sizes if size >= min(MIN_FUSED_TOKENS, shape.tokens))
        low, high = 0, len(sizes)
        while low < high:
            middle = (low + high) // 2
            slow = model.fused(decode, riding(sizes[middle])).worst_s > limit_s
            low, high = (low, middle) if slow else (middle + 1, high)
        for tokens in sizes[:low][-LOOKED_AT:][::-1]:
            rate = tokens / model.fused(decode, riding(tokens)).expected_s
            found.append((rate, Mode.FUSED, TABLE.whole, tokens))
    return found


@given(
    seed=st.integers(0, 10**6),
    requests=st.integers(1, 300),
    context=st.integers(1, 20_000),
    new=st.integers(1, 8192),
    cached=st.integers(0, 32768),
    limits_s=st.lists(st.floats(1e-3, 0.3), min_size=1, max_size=3),
    modes=st.frozensets(st.sampled_from(Mode), min_size=1),
    most_tokens=st.sampled_from([512, 2048]),
)
def test_whatever_a_model_says_the_choice_is_that_of_a_plain_search(
    seed, requests, context, new, cached, limits_s, modes, most_tokens
):
    """Asked one limit after another, and last for the gentlest split; the model is asked nothing
    twice."""
    model, decode = ErraticDevice(seed), DecodeShape(requests, requests * context)
    shape = PrefillShape.of([(new, cached)])

    def riding(tokens):
        return PrefillShape.of([(tokens, cached)])

    ways = Ways(model, TABLE, decode, shape, LAYERS, modes, riding, max_step_tokens=most_tokens)
    chosen = [ways.best(limit_s) for limit_s in limits_s]
    gentlest = ways.gentlest_split()
    assert len(set(model.asked)) == len(model.asked)
    for limit_s, choice in zip(limits_s, chosen, strict=True):
        found = all_ways(model, decode, shape, limit_s, modes, riding, most_tokens)
        best = max(found, key=lambda way: way[0], default=None)
        assert best == (
            choice and (choice.rate, choice.mode, choice.partition, choice.fused_tokens)
        )
    least = min(model.decode(decode, split, shape).worst_s for split in TABLE.splits)
    assert gentlest.step.worst_s == least


def test_what_can_be_in_time_goes_first_and_the_longest_is_given_up():
    prompts = [prompt("a", due_s=1.0), prompt("long", due_s=2.0), prompt("c", due_s=2.5)]
    kept, given_up = fewest_late(prompts, 0.0, [0.9, 1.0, 0.8])
    assert [entry.key for entry in kept] == ["a", "c"]
    assert [entry.key for entry in given_up] == ["long"]


@given(jobs=st.lists(st.tuples(st.integers(1, 20), st.integers(1, 40)), min_size=1, max_size=7))
def test_no_other_order_has_fewer_late_prompts(jobs):
    by_due = sorted(jobs, key=lambda job: job[1])
    prompts = [prompt(str(i), due_s=due_s) for i, (_, due_s) in enumerate(by_due)]
    took = {str(i): seconds for i, (seconds, _) in enumerate(by_due)}
    kept, _ = fewest_late(prompts, 0.0, [seconds for seconds, _ in by_due])

    def all_in_time(subset):
        end_s = 0
        for entry in subset:
            end_s += took[entry.key]
            if end_s > entry.due_s:
                return False
        return True

    assert all_in_time(kept)
    most = max(
        size
        for size in range(len(prompts) + 1)
        if any(all_in_time(subset) for subset in itertools.combinations(prompts, size))
    )
    assert len(kept) == most


@given(jobs=st.lists(st.tuples(st.integers(1, 20), st.integers(1, 60)), max_size=40))
def test_of_those_that_make_one_late_the_longest_is_given_up_and_of_equals_the_first(jobs):
    by_due = sorted(jobs, key=lambda job: job[1])
    prompts = [prompt(str(i), due_s=due_s) for i, (_, due_s) in enumerate(by_due)]
    took_s = [seconds for seconds, _ in by_due]
    keeps: list[int] = []
    for i in range(len(prompts)):
        keeps.append(i)
        if sum(took_s[kept] for kept in keeps) > prompts[i].due_s:
            keeps.remove(max(keeps, key=lambda kept: took_s[kept]))
    kept, given_up = fewest_late(prompts, 0.0, took_s)
    assert kept == [prompts[i] for i in keeps]
    assert given_up == [entry for i, entry in enumerate(prompts) if i not in keeps]


@given(
    waiting=st.lists(
        st.tuples(
            st.integers(1, 2000),
            st.floats(0, 60),
            st.floats(0, 60) | st.just(math.inf),
            st.booleans(),
        ),
        max_size=60,
    ),
    half_filled=st.integers(0, 100),
    now_s=st.floats(0, 60),
)
def test_an_order_is_what_the_rules_say(waiting, half_filled, now_s):
    prompts = [
        prompt(
            f"{i:02}",
            new,
            arrival_s=arrival_s,
            due_s=due_s,
            deferred=deferred and i != half_filled,
            begun=i == half_filled,
        )
        for i, (new, arrival_s, due_s, deferred) in enumerate(waiting)
    ]
    by_due = sorted(prompts, key=lambda p: (p.due_s, p.arrival_s, p.key))
    by_arrival = sorted(prompts, key=lambda p: (p.arrival_s, p.key))
    urgent = [p for p in by_due if p.due_s >= now_s][:LOOK_AHEAD]
    urgent = [p for p in urgent if not p.deferred]
    oldest = [p for p in by_arrival[:LOOK_BACK] if not p.deferred]
    in_time, given_up = fewest_late(urgent, now_s, tenths(urgent))
    begun = [p for p in prompts if p.begun]
    expected = in_time + begun + sorted(given_up + oldest, key=lambda p: p.arrival_s)
    if int(now_s / SLOT_S) % LATE_TURN == 0:
        long_late = [
            p for p in oldest if now_s - min(p.due_s, p.arrival_s + PATIENCE_S) > PATIENCE_S
        ]
        expected = long_late + expected
    expected = [p for i, p in enumerate(expected) if p not in expected[:i]]
    if begun:
        place = expected.index(begun[0])
        before, behind = expected[:place], expected[place + 1 :]
        short = [p for p in before if p.new <= WHOLE_TOKENS]
        expected = short + begun + [p for p in before if p not in short] + behind
    assert by_due_time(backlog(*prompts), now_s, tenths) == expected


def test_late_prompts_come_last_but_not_for_ever():
    late = prompt("late", due_s=1.0, arrival_s=0.0)
    now_s = 1.0 + PATIENCE_S + SLOT_S
    orders = [
        [entry.key for entry in by_due_time(backlog(late, fresh), at_s, tenths)]
        for slot in range(LATE_TURN)
        for at_s in [now_s + slot * SLOT_S]
        for fresh in [prompt("fresh", due_s=at_s + 1.0, arrival_s=at_s)]
    ]
    assert orders.count(["late", "fresh"]) == 1
    assert orders.count(["fresh", "late"]) == LATE_TURN - 1


def test_a_prompt_that_is_never_due_has_its_turn_too():
    patient = prompt("patient", due_s=math.inf, arrival_s=0.0)
    now_s = (int(3 * PATIENCE_S / SLOT_S / LATE_TURN) + 1) * LATE_TURN * SLOT_S
    fresh = prompt("fresh", due_s=now_s + 1.0, arrival_s=now_s)
    assert by_due_time(backlog(patient, fresh), now_s, tenths)[0].key == "patient"


def test_a_lower_rank_goes_first_whatever_is_due():
    waiting = backlog(
        replace(prompt("urgent", due_s=0.5), rank=5),
        replace(prompt("late", due_s=-1.0, arrival_s=-2.0), rank=5),
        prompt("first", due_s=math.inf, arrival_s=-1.0),
        prompt("second", due_s=math.inf),
        *[replace(prompt(f"crowd{i}", due_s=1.0), rank=7) for i in range(40)],
    )
    for now_s in (0.0, SLOT_S * (LATE_TURN - 1)):  # in the turn of those given up, and not
        order = [entry.key for entry in by_due_time(waiting, now_s, tenths)]
        assert order[:2] == ["first", "second"]
        assert sorted(order[2:4]) == ["late", "urgent"]
    assert [entry.key for entry in waiting.oldest(4)] == ["first", "second", "late", "urgent"]
    waiting.remove("first")
    assert waiting.oldest(1)[0].key == "second"


def test_only_short_prompts_overtake_a_half_filled_one():
    waiting = backlog(
        prompt("long", new=5000, due_s=1.0),
        prompt("short", new=100, due_s=2.0),
        prompt("begun", new=3000, due_s=3.0, cached=8192, begun=True),
        prompt("later", new=100, due_s=4.0),
    )
    order = [entry.key for entry in by_due_time(waiting, 0.0, tenths)]
    assert order == ["short", "begun", "long", "later"]


def test_a_half_filled_prompt_is_never_lost_sight_of():
    """Late, and younger than all the others that are late: without it no long one could go on."""
    late = [prompt(f"late{i:02}", due_s=1.0, arrival_s=0.01 * i) for i in range(40)]
    begun = prompt("begun", new=9000, due_s=1.0, arrival_s=0.9, begun=True)
    order = by_due_time(backlog(*late, begun), 5.0, tenths)
    assert order[0] is begun


def test_deferred_prompts_are_left_out():
    waiting = backlog(prompt("twin", deferred=True), prompt("other", due_s=9.0))
    assert [entry.key for entry in by_due_time(waiting, 0.0, tenths)] == ["other"]


def test_without_decode_a_batch_takes_all_that_fits_and_is_not_sliced():
    view = load(prompt("a", due_s=2.0), prompt("b", due_s=1.0), decode=IDLE)
    admission = ADAPTIVE.admit(view, 0.0)
    assert admission.order == ("b", "a")
    assert admission.tokens == 8192
    plan = ADAPTIVE.dispatch(load(decode=IDLE, prefill=active(launched=0)), 0.0)
    assert (plan.partition, plan.prefill_layers, plan.decode) == (TABLE.whole, LAYERS, False)


def test_without_prompts_decode_has_the_whole_device():
    plan = ADAPTIVE.dispatch(load(), 0.0)
    assert (plan.partition, plan.decode, plan.fused_tokens) == (TABLE.whole, True, 0)


def test_beside_a_tight_decode_the_batch_is_small_and_split():
    view = load(prompt("a", new=8000, cached=4096, due_s=5.0), tbt_s=1.6 * solo_s())
    admission = ADAPTIVE.admit(view, 0.0)
    assert admission.order == ("a",)
    assert 1024 <= admission.tokens < 8192
    plan = ADAPTIVE.dispatch(load(prefill=active(), tbt_s=1.6 * solo_s()), 0.0)
    assert plan.partition in TABLE.splits
    assert plan.decode
    # Two slices in flight outlast the step, so each has half of it.
    assert plan.prefill_layers == math.ceil(plan.step.expected_s / 2 / plan.layer.expected_s)
    assert plan.step.worst_s <= 1.6 * solo_s() - START_S


def test_with_slack_prompts_ride_in_the_step():
    fused_only = dataclasses.replace(ADAPTIVE, modes=frozenset({Mode.FUSED}))
    view = load(prompt("a", new=8000, due_s=5.0), prompt("b", due_s=2.0))
    assert fused_only.admit(view, 0.0) is None
    plan = fused_only.dispatch(view, 0.0)
    assert plan.partition.exclusive
    assert plan.fused_order == ("b", "a")
    assert plan.fused_tokens > 128
    assert plan.step.worst_s <= 0.05 - START_S


def test_a_fused_step_is_no_larger_than_may_be():
    fused = frozenset({Mode.FUSED})
    view = load(prompt("a", new=8000, due_s=5.0), tbt_s=1.0)
    free = dataclasses.replace(ADAPTIVE, modes=fused).dispatch(view, 0.0)
    bound = dataclasses.replace(ADAPTIVE, modes=fused, max_step_tokens=1024).dispatch(view, 0.0)
    assert free.fused_tokens + view.running == 2048
    assert bound.fused_tokens + view.running == 1024


def test_a_request_that_joins_late_is_waited_for_less():
    def gap_s(plan):
        turn = plan.prefill_layers * plan.layer.worst_s if plan.partition.exclusive else 0.0
        return plan.step.worst_s + turn

    limit_s = 1.7 * solo_s()
    patient = ADAPTIVE.dispatch(load(prefill=active(), tbt_s=0.1), 0.0)
    hurried = ADAPTIVE.dispatch(load(prefill=active(), tbt_s=0.1, joined_due_s=limit_s), 0.0)
    assert gap_s(hurried) <= limit_s - START_S < gap_s(patient)


def test_no_way_in_time_still_computes_both():
    plan = ADAPTIVE.dispatch(load(prefill=active(), tbt_s=0.5 * solo_s()), 0.0)
    assert plan.decode
    assert plan.prefill_layers >= 1
    assert plan.partition == TABLE.splits[-1]


def test_the_next_step_is_launched_just_before_the_last_one_ends():
    early = load(decode_in_flight=1, decode_ends_s=1.0)
    plan = ADAPTIVE.dispatch(early, 0.9)
    assert not plan.decode
    assert plan.look_again_s == pytest.approx(1.0 - LAUNCH_AHEAD_S)
    assert ADAPTIVE.dispatch(early, plan.look_again_s).decode
    deep = load(decode_in_flight=2, decode_ends_s=1.0)
    assert not ADAPTIVE.dispatch(deep, 0.999).decode


def test_enough_slices_in_flight_are_left_alone():
    view = load(prefill=active(in_flight=2), decode_in_flight=1, decode_ends_s=1.0)
    plan = ADAPTIVE.dispatch(view, 0.5)
    assert (plan.decode, plan.prefill_layers) == (False, 0)


def test_an_urgent_prompt_preempts_if_both_stay_in_time():
    long_batch = active(launched=2, layer_s=0.05, due_s=9.0)  # 1.5 s to go
    urgent = prompt("urgent", new=500, due_s=1.0)
    admission = ADAPTIVE.admit(load(urgent, prefill=long_batch), 0.0)
    assert (admission.order, admission.preempts) == (("urgent",), True)
    victim_late = dataclasses.replace(long_batch, due_s=1.51)
    assert ADAPTIVE.admit(load(urgent, prefill=victim_late), 0.0) is None
    in_time_anyway = dataclasses.replace(long_batch, layer_s=0.005)
    assert ADAPTIVE.admit(load(urgent, prefill=in_time_anyway), 0.0) is None
    too_late_anyway = prompt("late", new=8000, due_s=0.05)
    assert ADAPTIVE.admit(load(too_late_anyway, prefill=long_batch), 0.0) is None


def test_prompts_that_cannot_be_in_time_are_shed_only_when_asked():
    view = load(prompt("hopeless", new=8000, due_s=0.01), prompt("fine", due_s=2.0))
    assert ADAPTIVE.admit(view, 0.0).shed == ()
    shedding = dataclasses.replace(ADAPTIVE, sheds=True)
    assert shedding.admit(view, 0.0).shed == ("hopeless",)


def test_a_half_filled_prompt_is_never_shed():
    view = load(prompt("begun", new=8000, due_s=0.01, begun=True), prompt("fine", due_s=2.0))
    assert dataclasses.replace(ADAPTIVE, sheds=True).admit(view, 0.0).shed == ()


def test_ablations():
    whole = dataclasses.replace(ADAPTIVE, slices=False, modes=frozenset({Mode.SPLIT}))
    plan = whole.dispatch(load(prefill=active(launched=0)), 0.0)
    assert plan.prefill_layers == LAYERS
    blocking = dataclasses.replace(ADAPTIVE, polls=False)
    assert not blocking.dispatch(load(prefill=active(launched=LAYERS)), 0.0).decode


def test_static_keeps_its_split():
    policy = StaticSplit(TABLE, TABLE.splits[1])
    plan = policy.dispatch(load(prefill=active(), decode_step_s=0.02), 0.0)
    assert (plan.partition, plan.decode, plan.prefill_layers) == (TABLE.splits[1], True, 2)
    assert policy.dispatch(load(), 0.0).partition.exclusive
    alone = policy.dispatch(load(decode=IDLE, prefill=active(launched=0)), 0.0)
    assert (alone.partition, alone.prefill_layers) == (TABLE.whole, LAYERS)


def test_temporal_fills_what_the_deadline_leaves():
    policy = Temporal(TABLE, DEVICE, tbt_s=0.05)
    plan = policy.dispatch(load(prefill=active(launched=0), tbt_s=0.05), 0.0)
    layer_s = DEVICE.prefill(PROMPT, TABLE.whole, None).worst_s / LAYERS
    assert plan.partition.exclusive
    assert plan.decode
    assert plan.prefill_layers == int((0.05 - solo_s()) / layer_s)
    tight = policy.dispatch(load(prefill=active(launched=0), tbt_s=0.001), 0.0)
    assert tight.prefill_layers == 1
    waiting = policy.dispatch(load(prefill=active(), decode_in_flight=1), 0.0)
    assert (waiting.decode, waiting.prefill_layers) == (False, 0)


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("adaptive", AdaptiveSpec()),
        (
            "adaptive:split-only,no-guard",
            AdaptiveSpec(modes=frozenset({Mode.SPLIT}), guard=False),
        ),
        ("adaptive:no-slices,no-polling", AdaptiveSpec(slices=False, polls=False)),
        ("static:84/48", StaticSpec(84, 48)),
        ("chunked", ChunkedSpec(None)),
        ("chunked:512", ChunkedSpec(512)),
        ("chunked:2K", ChunkedSpec(2048)),
    ],
)
def test_names(text, spec):
    assert parse_policy(text) == spec


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected one of adaptive, static:P/D, .* got ''"),
        ("split", "got 'split'"),
        ("static", "expected static:P/D"),
        ("static:84", "expected static:P/D"),
        ("chunked:", "expected chunked:N"),
        ("chunked:0", "expected chunked:N"),
        ("chunked:x", "expected chunked:N"),
        ("table:1", "policy table takes nothing after its name"),
        ("adaptive:fast", "adaptive has no option 'fast'"),
        ("adaptive:split-only,fused-only", "adaptive takes one way only"),
    ],
)
def test_bad_names_are_named(text, message):
    with pytest.raises(ValueError, match=message):
        parse_policy(text)


def test_the_factory_says_what_is_missing():
    factory = PolicyFactory(TABLE, None, LAYERS, 8192)
    assert factory.make("static:100/32") == StaticSplit(TABLE, TABLE.splits[1])
    assert factory.make("chunked").step_tokens == 8192
    with pytest.raises(ValueError, match=r"no partition 90/42; there are 116/16, 100/32, 84/48"):
        factory.make("static:90/42")
    with pytest.raises(ValueError, match="policy adaptive needs a latency model"):
        factory.make("adaptive")
    undivided = PolicyFactory(PartitionTable(132), DEVICE, LAYERS, 8192)
    assert undivided.make("adaptive").modes == {Mode.TURNS, Mode.FUSED}
    with pytest.raises(ValueError, match="policy table needs partitions"):
        undivided.make("table")


def test_without_the_guard_the_worst_case_is_the_expected_one():
    guarded = PolicyFactory(TABLE, DEVICE, LAYERS, 8192).make("adaptive")
    unguarded = PolicyFactory(TABLE, DEVICE, LAYERS, 8192).make("adaptive:no-guard")
    for forecast in (
        unguarded.model.decode(BUSY, TABLE.splits[0], PROMPT),
        unguarded.model.prefill(PROMPT, TABLE.splits[0], BUSY),
        unguarded.model.fused(BUSY, PROMPT),
    ):
        assert forecast.worst_s == forecast.expected_s
    assert guarded.model.fused(BUSY, PROMPT).worst_s > guarded.model.fused(BUSY, PROMPT).expected_s


keys = st.sampled_from("abcdefgh")


@given(
    actions=st.lists(
        st.one_of(
            st.tuples(st.just("add"), keys, st.floats(0, 9), st.floats(0, 9)),
            st.tuples(st.just("remove"), keys),
        ),
        max_size=40,
    )
)
def test_a_backlog_agrees_with_a_plain_dict(actions):
    waiting, plain = Backlog(), {}
    for action, key, *times in actions:
        if action == "add":
            entry = prompt(key, new=ord(key), due_s=times[0], arrival_s=times[1])
            waiting.add(entry)
            plain[key] = entry
        elif key in plain:
            waiting.remove(key)
            del plain[key]
    assert len(waiting) == len(plain)
    assert waiting.new_tokens == sum(entry.new for entry in plain.values())
    by_due = sorted(plain.values(), key=lambda p: (p.due_s, p.arrival_s, p.key))
    assert waiting.first_due(-math.inf, 99) == by_due
    assert waiting.first_due(4.0, 2) == [entry for entry in by_due if entry.due_s >= 4.0][:2]
    by_arrival = sorted(plain.values(), key=lambda p: (p.arrival_s, p.key))
    assert waiting.oldest(3) == by_arrival[:3]


@pytest.mark.parametrize("prefill", [None, active()])
@pytest.mark.parametrize("prompts", [(), (prompt("waiting"),)])
def test_no_policy_launches_a_step_that_awaits_tokens(prompts, prefill):
    """Each of them would, did it not await any."""
    policies = [
        ADAPTIVE,
        StaticSplit(TABLE, TABLE.splits[1]),
        Temporal(TABLE, DEVICE, tbt_s=0.05),
        TakeTurns(TABLE),
        Chunked(TABLE, 256),
        SplitByBatchSize(TABLE, even_thresholds(len(TABLE.splits), 36)),
    ]
    for policy in policies:
        launched = []
        for awaits in (False, True):
            view = load(
                *prompts,
                prefill=prefill,
                decode_in_flight=1,
                decode_ends_s=1.0,
                decode_step_s=0.02,
                awaits_tokens=awaits,
            )
            launched.append(policy.dispatch(view, 0.9999).decode)
        before, after = launched
        assert not after, type(policy).__name__
        takes_turns = isinstance(policy, TakeTurns | Temporal | Chunked) and prefill is not None
        assert before or takes_turns, type(policy).__name__
