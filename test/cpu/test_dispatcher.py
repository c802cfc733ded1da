"""Dispatchers: which partition, whether to decode, and how many layers."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drift_scheduler.dispatcher import MAX_SLICES_IN_FLIGHT, Plan
from drift_scheduler.partition import Partition, PartitionTable
from drift_scheduler.policies.by_batch_size import SplitByBatchSize, even_thresholds
from drift_scheduler.policies.chunked import Chunked
from drift_scheduler.policies.slices import MAX_SLICE_LAYERS
from drift_scheduler.policies.take_turns import TakeTurns
from drift_scheduler.shapes import PrefillShape
from drift_scheduler.view import LoadView, PrefillView

TABLE = PartitionTable(132, (Partition(1, 112, 20), Partition(2, 92, 40), Partition(3, 72, 60)))
SPLIT = SplitByBatchSize(TABLE, thresholds=(4, 10, 30))


def prefill(
    tokens: int = 100,
    launched: int = 0,
    total: int = 32,
    in_flight: int = 0,
    layer_s: float | None = None,
) -> PrefillView:
    return PrefillView(PrefillShape.of([(tokens, 0)]), launched, total, in_flight, layer_s)


def view(
    running: int = 0,
    decode_in_flight: int = 0,
    prefill: PrefillView | None = None,
    decode_step_s: float | None = None,
    waiting: int = 0,
) -> LoadView:
    return LoadView(waiting, running, decode_in_flight, prefill, decode_step_s)


@pytest.mark.parametrize(
    ("running", "index"), [(1, 1), (3, 1), (4, 1), (9, 1), (10, 2), (29, 2), (30, 3), (1000, 3)]
)
def test_the_split_follows_the_decode_batch_and_small_ones_use_the_first_row(running, index):
    plan = SPLIT.dispatch(view(running=running, prefill=prefill()), now_s=0.0)
    assert plan.partition == TABLE[index]


@pytest.mark.parametrize(
    "load", [view(running=5), view(prefill=prefill()), view()], ids=["decode", "prefill", "idle"]
)
def test_a_phase_alone_has_the_whole_device(load):
    assert SPLIT.dispatch(load, 0.0).partition == TABLE.whole


def test_a_lone_prefill_is_not_sliced():
    plan = SPLIT.dispatch(view(prefill=prefill(tokens=10**6, launched=3, layer_s=1.0)), 0.0)
    assert plan.prefill_layers == 29
    assert not plan.decode


@pytest.mark.parametrize(
    ("decode_step_s", "layer_s", "launched", "layers"),
    [
        (0.004, 0.003, 12, 2),  # 1 layer ends before the step does
        (0.003, 0.003, 12, 1),
        (0.001, 0.003, 12, 1),
        (1.0, 0.003, 31, 1),  # no more than are left
        (1.0, 0.003, 12, MAX_SLICE_LAYERS),
        (0.010, 0.0, 12, MAX_SLICE_LAYERS),  # a clock too coarse to see a layer
    ],
)
def test_layers_just_outlast_a_decode_step(decode_step_s, layer_s, launched, layers):
    load = view(
        running=8, prefill=prefill(launched=launched, layer_s=layer_s), decode_step_s=decode_step_s
    )
    assert SPLIT.dispatch(load, 0.0).prefill_layers == layers


@pytest.mark.parametrize(("layer_s", "decode_step_s"), [(None, None), (0.001, None), (None, 0.05)])
def test_before_both_phases_are_measured_slices_are_one_layer(layer_s, decode_step_s):
    load = view(running=8, prefill=prefill(layer_s=layer_s), decode_step_s=decode_step_s)
    assert SPLIT.dispatch(load, 0.0).prefill_layers == 1


@pytest.mark.parametrize(("tokens", "layers"), [(1000, 2), (5000, 2), (5001, 1), (50_000, 1)])
def test_the_budget_caps_layers_times_tokens_but_not_below_one_layer(tokens, layers):
    dispatcher = SplitByBatchSize(TABLE, (1, 2, 3), layer_token_budget=10_000)
    load = view(running=8, prefill=prefill(tokens=tokens, layer_s=0.001), decode_step_s=1.0)
    assert dispatcher.dispatch(load, 0.0).prefill_layers == layers


@pytest.mark.parametrize("in_flight", range(4))
def test_slices_in_flight_are_bounded(in_flight):
    load = view(running=8, prefill=prefill(in_flight=in_flight))
    launches = SPLIT.dispatch(load, 0.0).prefill_layers > 0
    assert launches == (in_flight < MAX_SLICES_IN_FLIGHT)


@pytest.mark.parametrize("dispatcher", [SPLIT, TakeTurns(TABLE)])
@pytest.mark.parametrize(("in_flight", "decode"), [(0, True), (1, True), (2, False)])
def test_decode_runs_ahead_by_its_depth(dispatcher, in_flight, decode):
    load = view(running=5, decode_in_flight=in_flight)
    assert dispatcher.dispatch(load, 0.0).decode == decode
    assert not dispatcher.dispatch(view(decode_in_flight=in_flight), 0.0).decode


def test_without_multiplexing_a_prefill_goes_first_and_whole():
    plan = TakeTurns(TABLE).dispatch(view(running=5, prefill=prefill(launched=2)), 0.0)
    assert plan.partition == TABLE.whole
    assert plan.prefill_layers == 30
    assert not plan.decode


@pytest.mark.parametrize(
    ("running", "waiting", "decode", "fused_tokens"),
    [
        (0, 0, False, 0),
        (5, 0, True, 0),  # plain decode
        (0, 1, True, 64),  # a chunk and nothing else
        (5, 1, True, 59),
        (63, 9, True, 1),
        (64, 9, True, 0),  # no room for prompts
        (90, 9, True, 0),
    ],
)
def test_chunked_fills_a_step_up_to_its_size(running, waiting, decode, fused_tokens):
    dispatcher = Chunked(TABLE, step_tokens=64)
    load = view(running=running, waiting=waiting)
    assert dispatcher.admit(load, 0.0) is None
    plan = dispatcher.dispatch(load, 0.0)
    assert plan == Plan(TABLE.whole, decode=decode, fused_tokens=fused_tokens)


@pytest.mark.parametrize("running", [0, 5])
def test_chunked_steps_run_ahead_by_their_depth(running):
    dispatcher = Chunked(TABLE, step_tokens=64, decode_depth=3)
    for in_flight, decode in [(2, True), (3, False)]:
        load = view(running=running, waiting=2, decode_in_flight=in_flight)
        assert dispatcher.dispatch(load, 0.0).decode == decode


def test_a_step_of_no_tokens_is_refused():
    with pytest.raises(ValueError, match="step_tokens=0"):
        Chunked(TABLE, step_tokens=0)


@pytest.mark.parametrize(
    "fields",
    [
        {"partition": TABLE.whole, "fused_tokens": 4},
        {"partition": TABLE[1], "decode": True, "fused_tokens": 4},
        {"partition": TABLE.whole, "decode": True, "prefill_layers": 1, "fused_tokens": 4},
        {"partition": TABLE.whole, "decode": True, "fused_tokens": -1},
    ],
    ids=["no step", "split", "beside layers", "negative"],
)
def test_prompts_ride_only_in_a_step_alone_on_the_whole_device(fields):
    with pytest.raises(ValueError, match="fused"):
        Plan(**fields)


def test_nothing_rides_without_prompts_or_beside_a_prefill_batch():
    assert view(waiting=1).can_fuse
    assert not view(running=3).can_fuse
    assert not view(waiting=1, prefill=prefill()).can_fuse


@settings(max_examples=200, derandomize=True)
@given(
    running=st.integers(0, 100),
    decode_in_flight=st.integers(0, 3),
    tokens=st.integers(0, 10**6),
    launched=st.integers(0, 32),
    in_flight=st.integers(0, 3),
    layer_s=st.none() | st.floats(0, 10),
    decode_step_s=st.none() | st.floats(0, 10),
    split=st.booleans(),
)
def test_a_plan_never_exceeds_the_work_there_is(
    running, decode_in_flight, tokens, launched, in_flight, layer_s, decode_step_s, split
):
    dispatcher = SPLIT if split else TakeTurns(TABLE)
    batch = prefill(tokens, launched, 32, in_flight, layer_s)
    load = view(running, decode_in_flight, batch, decode_step_s)
    plan = dispatcher.dispatch(load, 0.0)
    assert 0 <= plan.prefill_layers <= 32 - launched
    assert not (plan.decode and running == 0)
    # Nothing waits for a launch that no later event would trigger.
    if launched < 32 and in_flight == 0:
        assert plan.prefill_layers > 0


@pytest.mark.parametrize(
    ("thresholds", "reason"),
    [((4, 30, 10), "not sorted"), ((1, 2), "2 thresholds for 3 splits"), ((), "0 thresholds")],
)
def test_thresholds_that_do_not_fit_are_refused(thresholds, reason):
    with pytest.raises(ValueError, match=reason):
        SplitByBatchSize(TABLE, thresholds)


def test_a_table_without_splits_cannot_be_split():
    with pytest.raises(ValueError, match="0 thresholds for 0 splits"):
        SplitByBatchSize(PartitionTable(4), ())


@pytest.mark.parametrize("splits", [1, 2, 6])
@pytest.mark.parametrize("largest", [1, 3, 36, 256])
def test_even_thresholds_rise_from_one_within_the_batch_size(splits, largest):
    thresholds = even_thresholds(splits, largest)
    assert len(thresholds) == splits
    assert thresholds[0] == 1
    assert list(thresholds) == sorted(thresholds)
    assert thresholds[-1] == (largest if splits > 1 else 1)


def test_even_thresholds_of_the_default_configuration():
    assert even_thresholds(6, 36) == (1, 12, 18, 24, 30, 36)
