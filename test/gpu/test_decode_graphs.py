"""Decode graphs give what eager steps give, on every lane and for every padded size."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from drift_scheduler.lane import Phase
from sglang.srt.constrained.grammar import words_of
from sglang.srt.layers.attention.triton_backend import TritonAttention
from sglang.srt.layers.matmul.base import TorchMatmul
from sglang.srt.layers.penalties import IN_PROMPT, History
from sglang.srt.logprobs import LogprobWish
from sglang.srt.mem_cache.kv_pool import DeviceKVPool
from sglang.srt.model_config import ModelConfig
from sglang.srt.model_executor.decode_graphs import DecodeGraphs
from sglang.srt.model_executor.host_batch import HostBatch, SampleWish, TokenMask
from sglang.srt.model_executor.model_runner import LaneKernels, ModelRunner
from sglang.srt.model_loader import load_model
from sglang.srt.model_source import resolve_model_source
from sglang.srt.sampling_params import SamplingParams

pytest.importorskip("cuda.core", reason="needs cuda-core (extra: cuda)")

LIMIT_S = 60.0
MAX_REQS = 12
CONTEXT = 512
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 1000,
    "max_position_embeddings": CONTEXT,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}


@pytest.fixture(scope="module")
def lanes(device):
    from drift_scheduler.lane_cuda import CudaLanes

    lanes = CudaLanes(device, split_count=3)
    yield lanes
    lanes.close()


@pytest.fixture(scope="module")
def runner(lanes, device, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    source = resolve_model_source(str(folder), load_format="dummy")
    config = ModelConfig.load(source, dtype="float32", device=device)
    model = load_model(source, config, device, seed=3)
    pool = DeviceKVPool(
        MAX_REQS * CONTEXT, config.num_layers, 2, config.head_dim, config.dtype, device
    )
    pool.keys.normal_()
    pool.values.normal_()
    keys = [(phase, i) for phase in Phase for i in range(len(lanes.table))]
    kernels = {
        key: LaneKernels(
            TritonAttention(pool, config, lanes.lane(key[0], lanes.table[key[1]]).sms),
            TorchMatmul(),
        )
        for key in keys
    }
    runner = ModelRunner(model, pool, kernels, device=device, num_rows=MAX_REQS + 1)
    torch.cuda.synchronize(device)
    runner.graph_attention = TritonAttention(pool, config, lanes.table.total_sms)
    return runner


@pytest.fixture(scope="module")
def graphs(runner, lanes):
    attention = runner.graph_attention
    sizes = [1, 4, MAX_REQS]
    attention.reserve(MAX_REQS, CONTEXT)
    matmuls = {index: TorchMatmul() for index in range(len(lanes.table))}
    graphs = DecodeGraphs(
        runner.model,
        runner.kv_pool,
        attention,
        matmuls,
        runner.slot_table,
        runner.relay,
        sizes,
    )
    decode = [lanes.lane(Phase.DECODE, lanes.table[i]) for i in range(len(lanes.table))]
    graphs.capture(decode)
    return graphs


def decode_batch(
    lengths: list[int], logprobs: LogprobWish | None = None, temperature: float = 0
) -> HostBatch:
    """One step of requests whose slots are a fixed shuffle; positions follow from the lengths."""
    count = len(lengths)
    slots = np.random.default_rng(7).permutation(np.arange(1, MAX_REQS * CONTEXT))
    per_row = [slots[i * 400 : i * 400 + length] for i, length in enumerate(lengths)]
    rows = np.arange(1, count + 1)
    table_index = [row * CONTEXT + np.arange(len(s)) for row, s in zip(rows, per_row, strict=True)]
    sampling = SamplingParams(temperature=temperature)
    return HostBatch(
        decode_reqs=count,
        input_ids=np.empty(0, dtype=np.int64),
        positions=np.asarray(lengths) - 1,
        token_slots=np.asarray([s[-1] for s in per_row]),
        rows=rows,
        seq_lens=np.asarray(lengths),
        new_lens=np.ones(count, dtype=np.int64),
        table_index=np.concatenate(table_index),
        table_slots=np.concatenate(per_row),
        samples=tuple(SampleWish(sampling, seed=i, logprobs=logprobs) for i in range(count)),
        sample_tokens=np.arange(count),
        sample_rows=rows,
    )


def step(runner, lane, lengths):
    """Tokens of one decode step from the same relayed inputs each time."""
    with torch.inference_mode():
        runner.relay.copy_(torch.arange(len(runner.relay)) * 37 % 1000)
    torch.cuda.synchronize()
    run = runner.start(decode_batch(lengths))
    lane.launch(run.slice_work(lane, 0, runner.num_layers)).wait(LIMIT_S)
    # Row 0 belongs to padding, which only graphs have.
    return run.tokens(), runner.relay[1:].tolist()


@pytest.mark.parametrize("lengths", [[5], [300, 7], [1, 64, 300, 399], [17] * 7, [399] * 12])
def test_graphs_agree_with_eager_steps_on_every_lane(runner, graphs, lanes, lengths):
    for index in range(len(lanes.table)):
        lane = lanes.lane(Phase.DECODE, lanes.table[index])
        runner.graphs = None
        eager = step(runner, lane, lengths)
        runner.use_graphs(graphs)
        assert step(runner, lane, lengths) == eager, str(lane.partition)


@pytest.mark.parametrize("temperature", [0, 0.7])
def test_log_probabilities_of_a_graphed_step_are_those_of_an_eager_one(
    runner, graphs, lanes, temperature
):
    wish = LogprobWish(top=3, token_ids=[5, 900])
    for index in range(len(lanes.table)):
        lane = lanes.lane(Phase.DECODE, lanes.table[index])
        told = []
        for used in (None, graphs):
            runner.graphs = used
            with torch.inference_mode():
                runner.relay.copy_(torch.arange(len(runner.relay)) * 37 % 1000)
            torch.cuda.synchronize()
            run = runner.start(decode_batch([300, 7, 64], wish, temperature))
            lane.launch(run.slice_work(lane, 0, runner.num_layers)).wait(LIMIT_S)
            told.append((run.tokens(), run.scores().samples))
        (tokens, eager), (same_tokens, graphed) = told
        assert tokens == same_tokens
        assert eager.keys() == graphed.keys() == {0, 1, 2}
        for place, scores in eager.items():
            for ours, theirs in zip(graphed[place], scores, strict=True):
                np.testing.assert_allclose(ours, theirs, atol=1e-4)
            if temperature == 0:
                assert scores.top_ids[0, 0] == tokens[place]
                assert scores.chosen[0] == pytest.approx(scores.top_values[0, 0])


def write_lines(runner, lane, histories):
    """As the launches do that fill the prompts."""
    for history in histories:
        runner.penalties.take(history.owner)
        lane.launch(lambda history=history: runner.penalties.begin(history)).wait(LIMIT_S)


def test_penalties_count_what_graphed_steps_choose(runner, graphs, lanes):
    """Three steps one behind the other, of rows of which every second is penalised."""
    lane = lanes.lane(Phase.DECODE, lanes.table.whole)
    plain = SamplingParams(temperature=0)
    penalised = SamplingParams(
        temperature=0, frequency_penalty=2.0, repetition_penalty=1.5, logit_bias={17: 0.5}
    )
    prompt = np.arange(40, 90)
    told = []
    for used in (None, graphs):
        runner.graphs = used
        wishes = tuple(SampleWish((plain, penalised)[i % 2], seed=i) for i in range(4))
        histories = [History(wish, prompt, np.array([17, 17])) for wish in wishes[1::2]]
        write_lines(runner, lane, histories)
        with torch.inference_mode():
            runner.relay.copy_(torch.arange(len(runner.relay)) * 37 % 1000)
        torch.cuda.synchronize()
        runs = []
        for step in range(3):
            batch = decode_batch([100 + step, 7 + step, 64 + step, 30 + step])
            run = runner.start(dataclasses.replace(batch, samples=wishes))
            runs.append((run, lane.launch(run.slice_work(lane, 0, runner.num_layers))))
        for _, ticket in runs:
            ticket.wait(LIMIT_S)
        told.append([run.tokens() for run, _ in runs])
        [rows] = runner.penalties.rows_of(wishes, [wish.sampling for wish in wishes])
        times = rows.counts[rows.lines] & (IN_PROMPT - 1)
        assert times.sum(dim=1).tolist() == [2 + 3] * 2
        for row, place in enumerate((1, 3)):
            for tokens in told[-1]:
                assert times[row, tokens[place]] > 0
        for wish in wishes:
            runner.forget(wish)
        assert runner.penalties.num_blocks == 0
    assert told[0] == told[1]


def test_log_probabilities_arrive_in_pinned_memory_with_those_of_a_prompt(runner, lanes, device):
    """Prompt parts of an eager launch, in small pieces and in one, against torch's own softmax."""
    from sglang.srt.layers.logprobs import prompt_scores

    vocab_size = runner.model.config.vocab_size
    logits = torch.randn(40, vocab_size, device=device, dtype=torch.bfloat16)
    next_ids = np.random.default_rng(1).integers(0, vocab_size, 30)
    wish = LogprobWish(top=4, token_ids=[1, 2, 3])
    packed = prompt_scores(
        lambda tokens: logits[tokens], 5, next_ids, wish, vocab_size, torch.device(device)
    )
    torch.cuda.synchronize()
    assert packed.rows.is_pinned()
    scores = packed.of(0, 30, wish)
    expected = logits[5:35].double().log_softmax(-1).cpu()
    np.testing.assert_allclose(
        scores.chosen, expected[torch.arange(30), torch.from_numpy(next_ids)], atol=1e-4
    )
    np.testing.assert_allclose(scores.listed, expected[:, [1, 2, 3]], atol=1e-4)
    np.testing.assert_allclose(scores.top_values, expected.topk(4).values, atol=1e-4)
    at_top = expected.gather(1, torch.from_numpy(scores.top_ids.astype(np.int64)))
    np.testing.assert_allclose(at_top, scores.top_values, atol=1e-4)


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_a_graphed_step_chooses_among_the_tokens_that_its_mask_allows(
    runner, graphs, lanes, temperature
):
    """And leaves them for the next step, whose launch does not wait for the host."""
    allowed = [{3, 4}, {999}]
    mask = TokenMask(np.array([0, 2]), np.stack([words_of(ids, 1000) for ids in allowed]))
    for index in range(len(lanes.table)):
        lane = lanes.lane(Phase.DECODE, lanes.table[index])
        told = []
        for used in (None, graphs):
            runner.graphs = used
            with torch.inference_mode():
                runner.relay.copy_(torch.arange(len(runner.relay)) * 37 % 1000)
            torch.cuda.synchronize()
            batch = decode_batch([300, 7, 64], temperature=temperature)
            free = runner.start(batch)
            lane.launch(free.slice_work(lane, 0, runner.num_layers)).wait(LIMIT_S)
            run = runner.start(dataclasses.replace(batch, mask=mask))
            with torch.inference_mode():
                runner.relay.copy_(torch.arange(len(runner.relay)) * 37 % 1000)
            torch.cuda.synchronize()
            lane.launch(run.slice_work(lane, 0, runner.num_layers)).wait(LIMIT_S)
            tokens = run.tokens()
            assert tokens[0] in allowed[0] and tokens[2] in allowed[1]
            assert tokens[1] == free.tokens()[1]
            assert runner.relay[1:4].tolist() == tokens
            told.append(tokens)
        assert told[0] == told[1], str(lane.partition)


def test_larger_batches_than_the_largest_graph_run_eagerly(graphs):
    assert graphs.size_for(MAX_REQS) == MAX_REQS
    assert graphs.size_for(5) == MAX_REQS
    assert graphs.size_for(MAX_REQS + 1) is None


def test_a_graph_keeps_the_sms_it_was_captured_on(lanes, device):
    from sgl_kernel.sm_ids import SmTrace, record_sm_ids, sm_ids_used

    split = lanes.table.splits[0]
    decode = lanes.lane(Phase.DECODE, split)
    trace = SmTrace.allocate(decode.sms * 32, device)
    graph = torch.cuda.CUDAGraph()

    def capture() -> None:
        record_sm_ids(trace, 1_000_000)
        graph.capture_begin()
        record_sm_ids(trace, 1_000_000)
        graph.capture_end()

    decode.launch(capture).wait(LIMIT_S)
    own = sm_ids_used(trace)
    assert len(own) == decode.sms
    trace.sm_ids.fill_(-1)
    torch.cuda.synchronize(device)
    whole = lanes.lane(Phase.PREFILL, lanes.table.whole)
    whole.launch(graph.replay).wait(LIMIT_S)
    assert sm_ids_used(trace) == own
