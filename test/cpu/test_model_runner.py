"""A real tiny model through the runner, on CPU lanes; and the fake runner's own checks."""

from __future__ import annotations

import itertools
import os
import select
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers

from drift_scheduler.dispatcher import Admission
from drift_scheduler.gang import Gang
from drift_scheduler.lane import Phase
from drift_scheduler.lane_cpu import CpuLanes
from drift_scheduler.lane_virtual import VirtualClock, VirtualLanes
from drift_scheduler.partition import Partition, PartitionTable
from drift_scheduler.policies.by_batch_size import SplitByBatchSize
from drift_scheduler.policies.chunked import Chunked
from drift_scheduler.policies.take_turns import TakeTurns
from drift_scheduler.timeline import Timeline
from sglang.srt.layers.attention.torch_native import TorchNativeAttention
from sglang.srt.layers.matmul.base import TorchMatmul
from sglang.srt.managers.admission import EngineLimits
from sglang.srt.managers.outbox import Outbox
from sglang.srt.managers.serving_engine import ServingEngine
from sglang.srt.mem_cache.kv_pool import DeviceKVPool
from sglang.srt.mem_cache.radix_cache import RadixCache
from sglang.srt.mem_cache.sequence_cache import SequenceCache
from sglang.srt.mem_cache.slot_allocator import SlotAllocator
from sglang.srt.mem_cache.slot_table import RowPool
from sglang.srt.messages import GenerateRequest, token_ids
from sglang.srt.model_config import ModelConfig, resolve_model_source
from sglang.srt.model_executor.fake_runner import FakeRunner, choose_by_hash, prefix_hash
from sglang.srt.model_executor.host_batch import HostBatch, SampleWish, upload, upload_table_update
from sglang.srt.model_executor.model_runner import LaneKernels, ModelRunner
from sglang.srt.model_loader import load_model
from sglang.srt.sampling_params import SamplingParams

LIMIT_S = 30.0
NUM_SLOTS = 257
NUM_ROWS = 9
CONTEXT = 80
LAYERS = 4
GREEDY = SamplingParams(temperature=0.0)

has_two_cores = len(os.sched_getaffinity(0)) > 1


@pytest.fixture(scope="module")
def lanes():
    lanes = CpuLanes(split_count=1 if has_two_cores else 0)
    yield lanes
    lanes.close()


@pytest.fixture(scope="module")
def model_dir(tiny_model_dir):
    return tiny_model_dir("llama", num_hidden_layers=LAYERS)


@pytest.fixture
def runner(model_dir, lanes):
    """A fresh pool each time, poisoned, so that reading what was never written shows."""
    source = resolve_model_source(str(model_dir))
    config = replace(ModelConfig.load(source), context_length=CONTEXT)
    pool = DeviceKVPool(
        NUM_SLOTS, LAYERS, config.num_kv_heads, config.head_dim, config.dtype, "cpu"
    )
    pool.keys.fill_(float("nan"))
    pool.values.fill_(float("nan"))
    kernels = {
        (phase, index): LaneKernels(TorchNativeAttention(pool, config), TorchMatmul())
        for phase in Phase
        for index in range(len(lanes.table))
    }
    return ModelRunner(
        load_model(source, config, "cpu"),
        pool,
        kernels,
        device=torch.device("cpu"),
        num_rows=NUM_ROWS,
    )


@pytest.fixture(scope="module")
def greedy(model_dir):
    """greedy(prompt, count) -> token ids, by whole forward passes of transformers."""
    model = transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)

    @torch.inference_mode()
    def generate(prompt, count):
        ids = list(prompt)
        for _ in range(count):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        return ids[len(prompt) :]

    return generate


class Sequences:
    """Builds the batches of a few requests whose slots lie anywhere in the pool."""

    def __init__(self, *, num_slots: int = NUM_SLOTS, width: int = CONTEXT) -> None:
        self._free = (1 + np.random.default_rng(3).permutation(num_slots - 1)).tolist()
        self._width = width
        self.slots: dict[int, list[int]] = {}

    def batch(
        self, new: dict[int, list[int] | int], sampling: SamplingParams = GREEDY
    ) -> HostBatch:
        """new: row -> prompt tokens, or the number 1 for a decode step, which must come first."""
        prompts = [tokens for tokens in new.values() if tokens != 1]
        decode_reqs = len(new) - len(prompts)
        new_lens = [1] * decode_reqs + [len(tokens) for tokens in prompts]
        positions, token_slots, table_index = [], [], []
        for row, count in zip(new, new_lens, strict=True):
            slots = self.slots.setdefault(row, [])
            start = len(slots)
            slots += [self._free.pop() for _ in range(count)]
            positions += range(start, start + count)
            token_slots += slots[start:]
            table_index += range(row * self._width + start, row * self._width + start + count)
        rows = list(new)
        seq_lens = [len(self.slots[row]) for row in rows]
        return HostBatch(
            decode_reqs=decode_reqs,
            input_ids=_i64(itertools.chain.from_iterable(prompts)),
            positions=_i64(positions),
            token_slots=_i64(token_slots),
            rows=_i64(rows),
            seq_lens=_i64(seq_lens),
            new_lens=_i64(new_lens),
            table_index=_i64(table_index),
            table_slots=_i64(token_slots),
            samples=tuple(SampleWish(sampling, seed=row) for row in rows),
            sample_tokens=_i64(np.cumsum(new_lens) - 1),
            sample_rows=_i64(rows),
        )


def _i64(values) -> np.ndarray:
    return np.asarray(list(values), dtype=np.int64)


def prompt_of(length: int, start: int = 3) -> list[int]:
    return [(start + 7 * i) % 133 for i in range(length)]


def run_slices(run, lanes, cuts, partitions=None) -> list[int]:
    """Runs a batch in slices cut at `cuts`, each behind the one before it; returns its tokens."""
    bounds = list(itertools.pairwise([0, *cuts, LAYERS]))
    partitions = partitions or [lanes.table.whole] * len(bounds)
    last = None
    for (first, end), partition in zip(bounds, partitions, strict=True):
        lane = lanes.lane(Phase.PREFILL, partition)
        last = lane.launch(run.slice_work(lane, first, end), after=[last] if last else [])
    last.wait(LIMIT_S)
    return run.tokens()


@pytest.mark.parametrize("cuts", [(), (1,), (1, 2, 3)])
def test_sliced_prefill_and_decode_equal_whole_forward_passes(runner, lanes, greedy, cuts):
    prompts = {1: prompt_of(1), 4: prompt_of(30, start=9), 2: prompt_of(13, start=50)}
    sequences = Sequences()
    answers = {row: [] for row in prompts}
    run = runner.start(sequences.batch(prompts))
    for row, token in zip(prompts, run_slices(run, lanes, cuts), strict=True):
        answers[row].append(token)
    lane = lanes.lane(Phase.DECODE, lanes.table.whole)
    steps = []
    for _ in range(6):  # all launched before the host has seen a token
        run = runner.start(sequences.batch(dict.fromkeys(prompts, 1)))
        steps.append((run, lane.launch(run.slice_work(lane, 0, LAYERS))))
    for run, ticket in steps:
        ticket.wait(LIMIT_S)
        for row, token in zip(prompts, run.tokens(), strict=True):
            answers[row].append(token)
    assert answers == {row: greedy(prompt, 7) for row, prompt in prompts.items()}


@pytest.mark.skipif(not has_two_cores, reason="needs two cores to split")
def test_a_prefill_may_change_lanes_at_any_layer(runner, lanes, greedy):
    prompts = {1: prompt_of(20), 2: prompt_of(9, start=70)}
    whole, split = lanes.table[0], lanes.table[1]
    expected = [greedy(prompt, 1)[0] for prompt in prompts.values()]
    for partitions in [
        (whole, split),
        (split, whole),
        (split, whole, split),
        (whole, split, whole),
    ]:
        run = runner.start(Sequences().batch(prompts))
        cuts = [2] if len(partitions) == 2 else [1, 3]
        assert run_slices(run, lanes, cuts, list(partitions)) == expected


def test_slices_of_two_batches_may_take_turns_on_a_lane(runner, lanes, greedy):
    """Each goes on with its own plan, whichever ran on the lane before it."""
    prompts = {1: prompt_of(20), 2: prompt_of(9, start=70)}
    others = {3: prompt_of(33, start=40), 4: prompt_of(17, start=11), 5: prompt_of(2)}
    sequences = Sequences()
    runs = [runner.start(sequences.batch(new)) for new in (prompts, others)]
    lane = lanes.lane(Phase.PREFILL, lanes.table.whole)
    turns = [(0, 0, 1), (1, 0, 2), (0, 1, 2), (0, 2, 3), (1, 2, 4), (0, 3, 4)]
    for index, first, last in turns:
        ticket = lane.launch(runs[index].slice_work(lane, first, last))
    ticket.wait(LIMIT_S)
    for run, new in zip(runs, (prompts, others), strict=True):
        assert run.tokens() == [greedy(prompt, 1)[0] for prompt in new.values()]


def test_a_batch_is_planned_once_unless_another_one_comes_between(runner, lanes, monkeypatch):
    lane = lanes.lane(Phase.PREFILL, lanes.table.whole)
    attention = runner.kernels[Phase.PREFILL, 0].attention
    planned = []
    plan = attention.plan

    def recorded(batch):
        planned.append(batch.num_tokens)
        plan(batch)

    monkeypatch.setattr(attention, "plan", recorded)
    sequences = Sequences()
    long, short = (runner.start(sequences.batch({row: prompt_of(4 * row)})) for row in (2, 1))
    turns = [(long, 0, 1), (long, 1, 2), (short, 0, 2), (short, 2, 4), (long, 2, 3), (long, 3, 4)]
    for run, first, last in turns:
        ticket = lane.launch(run.slice_work(lane, first, last))
    ticket.wait(LIMIT_S)
    assert planned == [8, 4, 8]


def test_a_chunked_prompt_gives_the_same_token(runner, lanes, greedy):
    prompt = prompt_of(40)
    sequences = Sequences()
    for first, last in [(0, 16), (16, 32), (32, 40)]:
        batch = sequences.batch({3: prompt[first:last]})
        tokens = run_slices(runner.start(batch), lanes, [2])
    assert tokens == greedy(prompt, 1)


def test_a_step_in_which_a_prompt_rides_equals_the_two_apart(runner, lanes, greedy, monkeypatch):
    prompts = {1: prompt_of(9), 2: prompt_of(30, start=9), 3: prompt_of(21, start=50)}
    lane = lanes.lane(Phase.DECODE, lanes.table.whole)
    sequences = Sequences()
    logits: list[torch.Tensor] = []
    compute = runner.model.logits

    def recorded(state, tokens):
        logits.append(compute(state, tokens))
        return logits[-1]

    monkeypatch.setattr(runner.model, "logits", recorded)

    def launch(new):
        run = runner.start(sequences.batch(new))
        return run, lane.launch(run.slice_work(lane, 0, LAYERS))

    apart = [
        launch({1: prompts[1], 2: prompts[2]}),
        launch({1: 1, 2: 1}),
        launch({3: prompts[3][:13]}),
        launch({1: 1, 2: 1}),
        launch({3: prompts[3][13:]}),
        launch({1: 1, 2: 1, 3: 1}),
    ]
    together = [  # the same three as rows 4, 5 and 6
        launch({4: prompts[1], 5: prompts[2]}),
        launch({4: 1, 5: 1, 6: prompts[3][:13]}),
        launch({4: 1, 5: 1, 6: prompts[3][13:]}),
        launch({4: 1, 5: 1, 6: 1}),
    ]
    for _, ticket in apart + together:
        ticket.wait(LIMIT_S)
    tokens = [run.tokens() for run, _ in together]
    for column, prompt in enumerate((prompts[1], prompts[2])):
        assert [row[column] for row in tokens] == greedy(prompt, 4)
    assert [row[2] for row in tokens[2:]] == greedy(prompts[3], 2)
    of_apart, of_together = torch.cat(logits[: len(apart)]), torch.cat(logits[len(apart) :])
    torch.testing.assert_close(of_together, of_apart, atol=1e-5, rtol=1e-5)


def test_a_batch_without_samples_gives_no_tokens(runner, lanes):
    batch = replace(
        Sequences().batch({1: prompt_of(6)}),
        samples=(),
        sample_tokens=_i64([]),
        sample_rows=_i64([]),
    )
    assert run_slices(runner.start(batch), lanes, [1]) == []


def test_the_first_slice_must_start_at_layer_0(runner, lanes):
    run = runner.start(Sequences().batch({1: prompt_of(6)}))
    lane = lanes.lane(Phase.PREFILL, lanes.table.whole)
    with pytest.raises(AssertionError, match="layer 1 comes first"):
        lane.launch(run.slice_work(lane, 1, 2)).wait(LIMIT_S)


def test_upload_keeps_every_field_apart():
    batch = Sequences().batch({5: prompt_of(3), 2: prompt_of(4)})
    table = torch.zeros(NUM_ROWS, CONTEXT, dtype=torch.int32)
    device = upload(batch, table)
    forward = device.forward
    assert forward.slot_table is table
    assert forward.decode_reqs == 0
    assert (forward.num_tokens, forward.num_reqs) == (7, 2)
    for got, expected, dtype in [
        (device.input_ids, batch.input_ids, torch.int64),
        (forward.positions, [0, 1, 2, 0, 1, 2, 3], torch.int64),
        (forward.token_slots, batch.token_slots, torch.int64),
        (forward.rows, [5, 2], torch.int64),
        (forward.seq_lens, [3, 4], torch.int32),
        (forward.new_lens, [3, 4], torch.int32),
        (forward.new_starts, [0, 3, 7], torch.int32),
        (device.table_index, batch.table_index, torch.int64),
        (device.table_slots, batch.token_slots, torch.int64),
        (device.samples.tokens, [2, 6], torch.int64),
        (device.samples.rows, [5, 2], torch.int64),
        (device.samples.positions, [3, 4], torch.int64),
    ]:
        assert got.dtype == dtype
        assert got.tolist() == list(expected)
    assert (forward.new_lens_host, forward.seq_lens_host) == ([3, 4], [3, 4])
    table_index, table_slots = upload_table_update(batch, torch.device("cpu"))
    assert torch.equal(table_index, device.table_index)
    assert torch.equal(table_slots, device.table_slots)


class PreEmpting(TakeTurns):
    """Prefills layer by layer; a prompt that waits goes in front of the batch in flight."""

    def admit(self, view, now_s):
        if view.prefill is None:
            return Admission(tokens=24)
        shortest = min(view.backlog.oldest(9), key=lambda prompt: prompt.new)
        return Admission((shortest.key,), preempts=True)

    def dispatch(self, view, now_s):
        plan = super().dispatch(view, now_s)
        return replace(plan, prefill_layers=min(plan.prefill_layers, 1))


def serve(
    runner,
    lanes,
    requests,
    *,
    policy: str = "turns",
    pool_tokens: int = NUM_SLOTS - 1,
    random_seed: int = 1,
):
    """Runs requests {rid: (prompt, sampling)} through engine and gang: rid -> (ids, cached)."""
    allocator = SlotAllocator(pool_tokens + 1, 1)
    outbox = Outbox()
    engine = ServingEngine(
        runner,
        SequenceCache(RadixCache(1, allocator.free), allocator),
        RowPool(NUM_ROWS),
        EngineLimits(context_length=CONTEXT, prefill_tokens=24, chunked=True, conservativeness=0.0),
        eos_token_ids=frozenset(),
        outbox=outbox,
        random_seed=random_seed,
    )
    dispatcher = {
        "turns": lambda: TakeTurns(lanes.table),
        "chunked": lambda: Chunked(lanes.table, step_tokens=10),
        "split": lambda: SplitByBatchSize(lanes.table, (1,)),
        "pre-empting": lambda: PreEmpting(lanes.table),
    }[policy]()
    timeline = Timeline()
    gang = Gang(engine, lanes, dispatcher, timeline, time.monotonic)
    for i, (rid, (prompt, sampling)) in enumerate(requests.items()):
        engine.add(
            GenerateRequest(rid=rid, input_ids=token_ids(prompt), sampling=sampling, arrival_s=i)
        )
    answers = {rid: ([], 0) for rid in requests}
    deadline_s = time.monotonic() + LIMIT_S
    while not (engine.idle and gang.idle):
        progressed = gang.turn()
        engine.check()
        if (batch := outbox.flush()) is not None:
            for rid, ids, cached in zip(
                batch.rids, batch.new_ids, batch.cached_tokens, strict=True
            ):
                answers[rid] = (answers[rid][0] + ids, cached)
        if not progressed:
            assert time.monotonic() < deadline_s, "requests are not served in time"
            select.select([lanes.completion_fd()], [], [], 0.05)
    return answers, engine, timeline


@pytest.mark.parametrize(
    "policy",
    [
        "turns",
        "chunked",
        pytest.param(
            "split", marks=pytest.mark.skipif(not has_two_cores, reason="needs two cores to split")
        ),
    ],
)
def test_the_whole_engine_on_cpu_lanes_gives_greedy_answers(runner, lanes, greedy, policy):
    # The first two are one batch and grow at the same pace to more than the pool holds.
    lengths = [(12, 30), (11, 30), (26, 4), (8, 1), (30, 6)]
    shared = prompt_of(40)
    requests = {
        f"r{i}": ([*shared[: tokens - 3], 100 + i, 1, 2], replaced(max_new_tokens=count))
        for i, (tokens, count) in enumerate(lengths)
    }
    answers, engine, timeline = serve(runner, lanes, requests, policy=policy, pool_tokens=56)
    for rid, (prompt, sampling) in requests.items():
        assert answers[rid][0] == greedy(prompt, sampling.max_new_tokens), rid
    assert engine.retractions > 0
    assert (timeline.busy_s(Phase.PREFILL) > 0) == (policy != "chunked")
    assert (timeline.fused_busy_s > 0) == (policy == "chunked")
    assert timeline.busy_s(Phase.DECODE) > 0


def test_pre_empted_batches_give_greedy_answers(runner, lanes, greedy):
    lengths = [(45, 5), (5, 3), (24, 4), (8, 1), (18, 6)]
    requests = {
        f"r{i}": (prompt_of(tokens, start=20 * i), replaced(max_new_tokens=count))
        for i, (tokens, count) in enumerate(lengths)
    }
    answers, _, timeline = serve(runner, lanes, requests, policy="pre-empting")
    for rid, (prompt, sampling) in requests.items():
        assert answers[rid][0] == greedy(prompt, sampling.max_new_tokens), rid
    # Slices of one batch, and how many of them in a row: less than all where one was parked.
    tokens = [run.tokens for run in timeline.runs(Phase.PREFILL)]
    assert any(len(list(same)) < LAYERS for _, same in itertools.groupby(tokens))


def replaced(**fields) -> SamplingParams:
    return SamplingParams(**{"temperature": 0.0, **fields})


@pytest.mark.parametrize("policy", ["turns", "chunked"])
def test_random_answers_do_not_depend_on_their_neighbours(runner, lanes, policy):
    """Sampling tensors are kept from step to step: joining and leaving requests must renew them."""
    requests = {
        "greedy": (prompt_of(5), replaced(max_new_tokens=9)),
        "random": (
            prompt_of(6, start=20),
            replaced(temperature=1.0, sampling_seed=5, max_new_tokens=12),
        ),
        "top_k": (
            prompt_of(7, start=40),
            replaced(temperature=1.5, top_k=5, sampling_seed=6, max_new_tokens=3),
        ),
        "other seed": (
            prompt_of(6, start=20),
            replaced(temperature=1.0, sampling_seed=7, max_new_tokens=12),
        ),
    }
    together, _, _ = serve(runner, lanes, requests, policy=policy)
    for rid, request in requests.items():
        alone, _, _ = serve(runner, lanes, {rid: request})
        assert together[rid][0] == alone[rid][0], rid
    assert together["random"][0] != together["other seed"][0]


def test_requests_with_equal_parameters_keep_seeds_of_their_own(runner, lanes):
    prompt, wish = prompt_of(6), replaced(temperature=1.0, max_new_tokens=12)
    seed = int(np.random.default_rng(2).integers(2**62))
    serve(runner, lanes, {"first": (prompt, wish)}, random_seed=1)
    second, _, _ = serve(runner, lanes, {"r": (prompt, wish)}, random_seed=2)
    explicit = replaced(temperature=1.0, max_new_tokens=12, sampling_seed=seed)
    expected, _, _ = serve(runner, lanes, {"r": (prompt, explicit)})
    assert second["r"][0] == expected["r"][0]


def test_min_new_tokens_withholds_stop_ids(runner, lanes, greedy):
    prompt = prompt_of(8)
    free = greedy(prompt, 6)
    stop = free[1]
    sampling = replaced(max_new_tokens=6, stop_token_ids=[stop])
    stopped = serve(runner, lanes, {"r": (prompt, sampling)})[0]["r"][0]
    assert stopped == free[: free.index(stop) + 1]
    sampling = replaced(max_new_tokens=6, min_new_tokens=4, stop_token_ids=[stop])
    longer = serve(runner, lanes, {"r": (prompt, sampling)})[0]["r"][0]
    assert len(longer) >= 4
    assert stop not in longer[:4]


# The fake runner: it must see what a test relies on it to see.


class FakeBench:
    def __init__(self) -> None:
        table = PartitionTable(2, (Partition(1, 1, 1),))
        self.lanes = VirtualLanes(table, VirtualClock())
        self.lane = self.lanes.lane(Phase.PREFILL, table.whole)
        self.sequences = Sequences(num_slots=40, width=16)
        self.runner = FakeRunner(
            num_layers=LAYERS,
            num_slots=40,
            num_rows=5,
            context_length=16,
            choose=choose_by_hash(50),
        )

    def launch(self, batch: HostBatch, *cuts: int):
        run = self.runner.start(batch)
        for first, last in itertools.pairwise([0, *cuts, LAYERS]):
            run.slice_work(self.lane, first, last)
        return run


@pytest.fixture
def fake():
    return FakeBench()


def test_the_fake_answers_with_a_function_of_the_prefix(fake):
    first = fake.launch(fake.sequences.batch({1: [7, 8, 9], 2: [4]}), 1, 3).tokens()
    assert first == [prefix_hash([7, 8, 9]) % 50, prefix_hash([4]) % 50]
    second = fake.launch(fake.sequences.batch({1: 1, 2: 1})).tokens()
    assert second[0] == prefix_hash([7, 8, 9, first[0]]) % 50
    assert prefix_hash([7, 8, 9]) != prefix_hash([8, 7, 9])


def test_the_fake_takes_time_by_tokens_layers_and_share(fake):
    batch = fake.sequences.batch({1: [1] * 10})
    small = fake.lanes.lane(Phase.PREFILL, fake.lanes.table[1])
    run = fake.runner.start(batch)
    one_layer = run.slice_work(small, 0, 1).duration_s
    assert run.slice_work(fake.lane, 1, LAYERS).duration_s == pytest.approx(3 * one_layer / 2)


def corrupt_slot(fake, batch):
    """A slot of the prefix is given to somebody else, who writes to it."""
    fake.runner.slot_hashes[fake.sequences.slots[1][0]] += 1
    return batch


def move_slot(fake, batch):
    fake.runner.slot_positions[fake.sequences.slots[1][1]] = 0
    return batch


def stale_table(fake, batch):
    fake.runner.slot_table[1, 0] = 39
    return batch


def lost_update(fake, batch):
    return replace(batch, table_index=batch.table_index[:0], table_slots=batch.table_slots[:0])


def wrong_position(fake, batch):
    return replace(batch, positions=batch.positions + 1)


def wrong_row(fake, batch):
    return replace(batch, table_index=batch.table_index + 2 * 16)


def scratch_slot(fake, batch):
    fake.sequences.slots[1][-1] = 0
    return replace(batch, token_slots=batch.token_slots * 0, table_slots=batch.table_slots * 0)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (corrupt_slot, "mix of two sequences"),
        (move_slot, "reads tokens of positions"),
        (stale_table, "reads tokens of positions"),
        (lost_update, "its table says"),
        (wrong_position, "positions"),
        (wrong_row, "which it lacks"),
        (scratch_slot, "scratch"),
    ],
)
def test_the_fake_sees_damage_before_a_step(fake, damage, message):
    fake.launch(fake.sequences.batch({1: [7, 8, 9]}))
    batch = damage(fake, fake.sequences.batch({1: 1}))
    with pytest.raises(AssertionError, match=message):
        fake.launch(batch)


def test_the_fake_sees_slots_given_away_under_a_launch(fake):
    fake.launch(fake.sequences.batch({1: [7, 8, 9]}))
    run = fake.launch(fake.sequences.batch({1: 1}))
    thief = Sequences(num_slots=40, width=16)  # hands out the same slots again
    fake.launch(thief.batch({2: [5, 5, 5]}))
    with pytest.raises(AssertionError, match="row 1 reads"):
        run.tokens()


def test_the_fake_sees_a_prefix_that_is_not_computed_yet(fake):
    run = fake.runner.start(fake.sequences.batch({1: [7, 8, 9]}))
    run.slice_work(fake.lane, 0, 2)
    fake.sequences.slots[2] = fake.sequences.slots[1][:]
    fake.runner.slot_table[2, :3] = fake.sequences.slots[2]
    with pytest.raises(AssertionError, match="2 layers are computed"):
        fake.launch(fake.sequences.batch({2: [6]}))


def test_the_fake_wants_slices_in_order(fake):
    run = fake.runner.start(fake.sequences.batch({1: [7, 8, 9]}))
    run.slice_work(fake.lane, 0, 2)
    with pytest.raises(AssertionError, match=r"slice 3\.\.4 after 2"):
        run.slice_work(fake.lane, 3, 4)
