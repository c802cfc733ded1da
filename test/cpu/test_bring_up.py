"""Bring-up on CPU: flags become lanes, a policy, and pools of the asked size."""

from __future__ import annotations

import os
from types import SimpleNamespace

import psutil
import pytest
import torch

from drift_scheduler.lane import Phase
from drift_scheduler.partition import Partition, PartitionTable
from drift_scheduler.policies.by_batch_size import SplitByBatchSize
from drift_scheduler.policies.chunked import Chunked
from drift_scheduler.policies.take_turns import TakeTurns
from sglang.srt.errors import ConfigError
from sglang.srt.model_executor.bring_up import bring_up, make_lanes, make_policies
from sglang.srt.model_executor.memory_for_serving import (
    SHARES,
    SMALL_BYTES,
    SMALL_TENSORS,
    take_memory,
    take_small_memory,
)
from sglang.srt.model_executor.warm_up import PROMPT_TOKENS, warm_up
from sglang.srt.multiplex_policy import MultiplexPolicy
from sglang.srt.pdmux_config import Division, PdmuxConfig
from sglang.srt.server_args import ServerArgs

CPU = torch.device("cpu")
num_cores = len(os.sched_getaffinity(0))
needs_two_cores = pytest.mark.skipif(num_cores < 2, reason="needs two cores to split")


@pytest.fixture
def start(tiny_model_dir):
    """start(**flags) brings up the tiny model; its lanes are closed at the end of the test."""
    started = []

    def start(**flags):
        args = ServerArgs(
            **{
                "model_path": str(tiny_model_dir("llama")),
                "device": "cpu",
                "max_total_tokens": 256,
                **flags,
            }
        )
        args.check()
        started.append(bring_up(args))
        return started[-1]

    yield start
    for executor in started:
        executor.lanes.close()


def test_defaults_on_cpu(start):
    executor = start()
    assert executor.device == CPU
    assert executor.attention_backend == "torch_native"
    assert executor.num_slots == 256 + 1  # and the scratch page
    assert executor.num_rows == 64 + 1  # and the padding row
    assert executor.runner.num_layers == executor.config.num_layers == 3
    assert executor.runner.slot_table.shape == (65, executor.config.context_length)
    assert executor.runner.relay.shape == (65,)
    assert executor.dispatcher == TakeTurns(executor.lanes.table, decode_depth=2)
    assert len(executor.lanes.table) == 1


def test_sizes_follow_their_flags(start):
    executor = start(
        max_running_requests=3,
        context_length=100,
        page_size=16,
        max_total_tokens=100,
        chunked_prefill_size=64,
        disable_overlap_schedule=True,
    )
    assert executor.num_rows == 4
    assert executor.runner.slot_table.shape == (4, 100)
    assert executor.num_slots == 96 + 16  # whole pages
    assert executor.prefill_tokens == 64
    assert executor.dispatcher.decode_depth == 1


@pytest.mark.parametrize(
    ("flags", "prefill_tokens"),
    [
        ({}, 2048),
        ({"chunked_prefill_size": 512}, 512),
        ({"chunked_prefill_size": 512, "max_prefill_tokens": 100, "page_size": 16}, 96),
        ({"chunked_prefill_size": -1, "max_prefill_tokens": 777}, 777),
    ],
)
def test_tokens_of_a_prefill_batch(start, flags, prefill_tokens):
    assert start(**flags).prefill_tokens == prefill_tokens


@pytest.mark.parametrize(
    "flags", [{"max_prefill_tokens": 32, "page_size": 64}, {"page_size": 4096}]
)
def test_a_prefill_batch_smaller_than_a_page_is_refused(start, flags):
    with pytest.raises(ConfigError, match=r"--max-prefill-tokens .* --page-size"):
        start(max_total_tokens=16384, **flags)


def test_every_lane_has_attention_of_its_own(start):
    flags = {"enable_pdmux": True, "pd_multiplex_policy": "table"} if num_cores > 1 else {}
    executor = start(**flags)
    kernels = executor.runner.kernels
    expected = {(phase, index) for phase in Phase for index in range(len(executor.lanes.table))}
    assert set(kernels) == expected
    assert len({id(lane.attention) for lane in kernels.values()}) == len(expected)


def test_a_pool_that_does_not_fit_names_the_flags(start):
    with pytest.raises(ConfigError, match=r"--max-total-tokens \d+ does not fit.*--mem-fraction"):
        start(max_total_tokens=10**9)


def test_no_room_at_all_names_the_flag(start):
    with pytest.raises(ConfigError, match="--mem-fraction-static"):
        start(max_total_tokens=None, mem_fraction_static=1e-9)


def test_without_a_size_the_pool_takes_its_share_of_free_memory(start, monkeypatch):
    free_bytes = 3_000_000
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=free_bytes))
    executor = start(max_total_tokens=None, mem_fraction_static=0.5, page_size=4)
    config = executor.config
    table_bytes = executor.num_rows * config.context_length * 4
    room = (free_bytes / 2 - table_bytes) / config.kv_bytes_per_token
    assert executor.num_slots % 4 == 0
    assert room - 4 < executor.num_slots <= room


@pytest.mark.parametrize(
    ("flags", "step_tokens"),
    [
        pytest.param(
            {"enable_pdmux": True, "pd_multiplex_policy": "chunked:96"}, 96, marks=needs_two_cores
        ),
        ({"enable_mixed_chunk": True}, 2048),
        ({"enable_mixed_chunk": True, "chunked_prefill_size": 64}, 64),
        ({"enable_mixed_chunk": True, "chunked_prefill_size": 64, "max_prefill_tokens": 40}, 40),
    ],
)
def test_chunked_steps_have_the_size_asked_for(start, flags, step_tokens):
    executor = start(**flags, disable_overlap_schedule=True)
    table = executor.lanes.table
    assert bool(table.splits) == ("enable_pdmux" in flags)  # for policies that come later
    assert executor.dispatcher == Chunked(table, step_tokens, decode_depth=1)


def by_batch_size(lanes, pdmux: PdmuxConfig, *, disable_overlap_schedule=False):
    """What becomes of the policy "table" on these lanes."""
    args = SimpleNamespace(
        policy=lambda: MultiplexPolicy("table", pdmux),
        disable_overlap_schedule=disable_overlap_schedule,
        slo_overload="queue",
    )
    return make_policies(args, lanes, None, num_layers=3, prefill_tokens=64).make("table")


@needs_two_cores
def test_multiplexing_divides_the_cores():
    pdmux = PdmuxConfig()
    lanes = make_lanes(CPU, pdmux)
    try:
        assert 1 <= len(lanes.table.splits) <= pdmux.sm_group_num - 2
        dispatcher = by_batch_size(lanes, pdmux)
        assert isinstance(dispatcher, SplitByBatchSize)
        assert len(dispatcher.thresholds) == len(lanes.table.splits)
        assert dispatcher.thresholds[0] == 1
        assert dispatcher.layer_token_budget == pdmux.split_forward_token_budget
    finally:
        lanes.close()


def test_a_division_larger_than_the_machine_is_a_config_error():
    rows = (Division(prefill_sms=1, decode_sms=num_cores, min_decode_reqs=1),)
    with pytest.raises(ConfigError, match=f"{num_cores} decode cores do not fit"):
        make_lanes(CPU, PdmuxConfig(sm_group_num=3, manual_divisions=rows))


@pytest.mark.parametrize("shares", [(2, 1), (1, 1)])
def test_divisions_must_give_decode_more_and_more(shares):
    rows = tuple(Division(1, share, i) for i, share in enumerate(shares))
    with pytest.raises(ConfigError, match=r"rising decode SMs, got \[\d, 1\]"):
        make_lanes(CPU, PdmuxConfig(sm_group_num=4, manual_divisions=rows))


def granting(splits: dict[int, int], total: int = 132) -> SimpleNamespace:
    """Lanes of a device that grants other shares than were asked: {asked: granted}."""
    table = PartitionTable(
        total,
        tuple(
            Partition(i + 1, total - share, share)
            for i, share in enumerate(sorted(set(splits.values())))
        ),
    )
    return SimpleNamespace(table=table, granted=splits)


def test_thresholds_of_divisions_go_with_the_share_that_was_granted():
    rows = (Division(112, 20, 2), Division(92, 40, 8), Division(60, 72, 20))
    pdmux = PdmuxConfig(sm_group_num=5, manual_divisions=rows, split_forward_token_budget=777)
    dispatcher = by_batch_size(
        granting({20: 24, 40: 40, 72: 72}), pdmux, disable_overlap_schedule=True
    )
    assert dispatcher.thresholds == (2, 8, 20)
    assert dispatcher.layer_token_budget == 777
    assert dispatcher.decode_depth == 1


def test_divisions_rounded_to_one_share_keep_the_smallest_threshold():
    rows = (Division(112, 20, 2), Division(110, 22, 8), Division(60, 72, 20))
    pdmux = PdmuxConfig(sm_group_num=5, manual_divisions=rows)
    dispatcher = by_batch_size(granting({20: 24, 22: 24, 72: 72}), pdmux)
    assert dispatcher.thresholds == (2, 20)


def test_without_divisions_thresholds_are_even():
    pdmux = PdmuxConfig(sm_group_num=5, decode_bs_divisor=30)
    dispatcher = by_batch_size(granting({24: 24, 48: 48, 72: 72}), pdmux)
    assert dispatcher.thresholds == (1, 20, 30)


def test_warm_up_touches_one_row_and_leaves_scratch_finite(start):
    """The padding row and slot keep what padding relies on."""
    executor = start()
    context_length = executor.config.context_length
    warm_up(
        executor.runner,
        executor.lanes,
        num_slots=executor.num_slots,
        context_length=context_length,
        vocab_size=executor.config.vocab_size,
    )
    table = executor.runner.slot_table
    used = [count for count in PROMPT_TOKENS if count < context_length]
    assert table[1, : max(used)].tolist() == list(range(1, max(used) + 1))
    assert int(table[0].sum()) == 0
    keys, values = executor.kv_pool.layer(0)
    assert keys[1].any()
    assert keys[0].isfinite().all()
    assert values[0].isfinite().all()


def test_warm_up_runs_what_only_some_requests_ask_for(start):
    executor = start()
    launches = Launches(executor.runner)
    warm_up(
        launches,
        executor.lanes,
        num_slots=executor.num_slots,
        context_length=executor.config.context_length,
        vocab_size=executor.config.vocab_size,
    )
    last = launches.seen[-1][3]
    (wish,) = last.samples
    assert last.mask is not None
    assert wish.logprobs is not None
    assert wish.withheld_ids
    assert wish.sampling.logit_bias
    assert wish.sampling.penalises
    assert last.histories[0].owner is wish
    assert len(last.scored[0].next_ids) == len(last.input_ids) - 1
    # What it took for penalties is free again.
    assert executor.runner.penalties.num_blocks == 0


class Launches:
    """A runner that notes what the real one is given: lane, layers and batch of every launch."""

    def __init__(self, runner):
        self._runner = runner
        self.seen = []

    @property
    def num_layers(self):
        return self._runner.num_layers

    def start(self, batch):
        run = self._runner.start(batch)
        slice_work = run.slice_work

        def noted(lane, first, last):
            self.seen.append((lane, first, last, batch))
            return slice_work(lane, first, last)

        run.slice_work = noted
        return run

    def forget(self, wish):
        self._runner.forget(wish)


def take(executor, free_bytes=lambda: 80 << 30, **changes):
    launches = Launches(executor.runner)
    sizes = {
        "max_tokens": 200,
        "max_reqs": 6,
        "max_step_tokens": 50,
        "num_slots": executor.num_slots,
        "context_length": executor.config.context_length,
    }
    take_memory(launches, executor.lanes, free_bytes, **{**sizes, **changes})
    return launches.seen


@needs_two_cores
def test_the_largest_batches_and_parts_of_them_run_on_every_lane(start):
    executor = start(enable_pdmux=True, pd_multiplex_policy="table", sm_group_num=3)
    lanes, last = executor.lanes, executor.runner.num_layers
    shares = [lanes.table[index] for index in range(len(lanes.table))]
    assert len(shares) == 2
    seen = take(executor)
    a_round = [
        (lanes.lane(Phase.DECODE, lanes.table.whole), 0, last),
        *(
            (lanes.lane(Phase.PREFILL, share), *ends)
            for _ in ("long prompts", "many prompts")
            for share in shares
            for ends in ((0, 1), (last - 1, last))
        ),
        *((lanes.lane(Phase.DECODE, share), 0, last) for share in shares),
    ]
    assert [launch[:3] for launch in seen] == a_round * len(SHARES)
    batches = [batch for *_, batch in seen]
    rounds = [batches[i : i + len(a_round)] for i in range(0, len(batches), len(a_round))]
    sizes = [
        [(batch.decode_reqs, len(batch.input_ids)) for batch in (one[0], one[1], one[-1])]
        for one in rounds
    ]
    assert sizes[0] == [(6, 50), (0, 200), (6, 0)]
    assert sizes[1] == [(6, 44), (0, 175), (6, 0)]
    assert sizes[-1] == [(1, 7), (0, 25), (1, 0)]
    assert all(one[-1].is_decode for one in rounds)
    prompts = [[one[i].new_lens.tolist() for i in (1, 5)] for one in rounds]
    assert prompts[0] == [[200], [33] * 6]
    assert prompts[-1] == [[25], [25]]
    keys, _ = executor.kv_pool.layer(0)
    assert keys[0].isfinite().all()


def test_prompts_are_no_longer_than_context_and_pool_allow(start):
    executor = start()
    context_length = executor.config.context_length
    tokens = executor.num_slots - 1
    seen = take(executor, max_tokens=10 * tokens, context_length=100)
    prefill = next(batch for *_, batch in seen if not batch.decode_reqs)
    assert prefill.new_lens.tolist() == [99, 99, tokens - 198]
    assert context_length > 100  # the tables of the real runner are wider


@needs_two_cores
def test_every_lane_holds_what_small_tensors_need(start, monkeypatch):
    lanes = start(enable_pdmux=True, pd_multiplex_policy="table", sm_group_num=3).lanes
    held = []
    monkeypatch.setattr(torch, "empty", lambda size, **how: held.append((size, how["device"])))
    take_small_memory(lanes, CPU)
    assert held == [(SMALL_BYTES, CPU)] * SMALL_TENSORS * 2 * len(lanes.table)


def test_steps_in_which_nothing_rides_are_left_out(start):
    seen = take(start(), max_step_tokens=0)
    assert all(batch.decode_reqs in (0, len(batch.rows)) for *_, batch in seen)


def test_memory_is_taken_only_while_there_is_room(start, caplog):
    free = iter([80 << 30, 3 << 30, 1 << 30, 1 << 30])
    seen = take(start(), lambda: next(free))
    assert len({lane for lane, *_ in seen}) == 2
    assert "--mem-fraction-static" in caplog.text
