"""Prefill graphs give what eager launches give, for prompts alone and beside decoding requests."""

from __future__ import annotations

import dataclasses
import itertools
import json

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from drift_scheduler.lane import Phase
from sglang.srt.layers.attention.flashinfer_backend import is_installed
from sglang.srt.layers.matmul.base import TorchMatmul
from sglang.srt.logprobs import LogprobWish
from sglang.srt.mem_cache.kv_pool import DeviceKVPool
from sglang.srt.model_config import ModelConfig
from sglang.srt.model_executor.graph_capture import capture_graphs
from sglang.srt.model_executor.host_batch import HostBatch, PromptPart, SampleWish
from sglang.srt.model_executor.lane_kernels import kernels_by_lane
from sglang.srt.model_executor.model_runner import ModelRunner
from sglang.srt.model_loader import load_model
from sglang.srt.model_source import resolve_model_source
from sglang.srt.sampling_params import SamplingParams

if not is_installed():
    pytest.skip("needs flashinfer-python", allow_module_level=True)

LIMIT_S = 120.0
MAX_REQS = 9
CONTEXT = 2048
SLOTS = 24_000
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "vocab_size": 1000,
    "max_position_embeddings": CONTEXT,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}


@pytest.fixture(scope="module")
def lanes(device):
    pytest.importorskip("cuda.core", reason="needs cuda-core (extra: cuda)")
    from drift_scheduler.lane_cuda import CudaLanes

    lanes = CudaLanes(device, split_count=1)
    yield lanes
    lanes.close()


@pytest.fixture(scope="module")
def runner(lanes, device, tmp_path_factory):
    if torch.cuda.get_device_capability(device) != (9, 0):
        pytest.skip("prefill graphs need Hopper's FlashInfer kernels")
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    source = resolve_model_source(str(folder), load_format="dummy")
    config = ModelConfig.load(source, dtype="bfloat16", device=device)
    model = load_model(source, config, device, seed=3)
    pool = DeviceKVPool(SLOTS, config.num_layers, 2, config.head_dim, config.dtype, device)
    pool.keys.normal_()
    pool.values.normal_()
    matmuls = {(phase, i): TorchMatmul() for phase in Phase for i in range(len(lanes.table))}
    kernels = kernels_by_lane("flashinfer", lanes, pool, config, matmuls, max_prefill_tokens=1024)
    runner = ModelRunner(model, pool, kernels, device=device, num_rows=MAX_REQS + 1)
    torch.cuda.synchronize(device)
    capture_graphs(runner, lanes, pool, max_reqs=MAX_REQS, max_tokens=1024, fuses=True)
    return runner


def batch_of(decode: list[int], prefill: list[tuple[int, int]]) -> HostBatch:
    """Requests that decode, by length; and that prefill, by cached and new tokens."""
    lens = [(length - 1, 1) for length in decode] + prefill
    free = np.random.default_rng(11).permutation(np.arange(1, SLOTS))
    rows = np.arange(1, len(lens) + 1)
    slots = []
    for cached, new in lens:
        slots.append(free[: cached + new])
        free = free[cached + new :]
    totals = np.asarray([cached + new for cached, new in lens])
    new_lens = np.asarray([new for _, new in lens])
    positions = [np.arange(cached, cached + new) for cached, new in lens]
    prompt_tokens = sum(new for _, new in prefill)
    return HostBatch(
        decode_reqs=len(decode),
        input_ids=np.arange(prompt_tokens) * 7 % 1000,
        positions=np.concatenate(positions),
        token_slots=np.concatenate([s[c:] for s, (c, _) in zip(slots, lens, strict=True)]),
        rows=rows,
        seq_lens=totals,
        new_lens=new_lens,
        table_index=np.concatenate(
            [row * CONTEXT + np.arange(n) for row, n in zip(rows, totals, strict=True)]
        ),
        table_slots=np.concatenate(slots),
        samples=tuple(SampleWish(SamplingParams(temperature=0), seed=i) for i in range(len(lens))),
        sample_tokens=new_lens.cumsum() - 1,
        sample_rows=rows,
    )


def logits_of(runner, lane, batch, monkeypatch):
    """[requests, vocab_size] and the keys that were stored, of a run from the same relayed ids."""
    seen = []
    with monkeypatch.context() as patch, torch.inference_mode():
        patch.setattr(
            runner, "choose", lambda host, logits, rows, positions, result: seen.append(logits)
        )
        runner.relay.copy_(torch.arange(len(runner.relay)) * 37 % 1000)
        torch.cuda.synchronize()
        run = runner.start(batch)
        lane.launch(run.slice_work(lane, 0, runner.num_layers)).wait(LIMIT_S)
        keys = runner.kv_pool.keys[:, torch.from_numpy(batch.token_slots).to(runner.device)]
        return seen[0].clone(), keys.clone()


ALONE = [[(0, 1)], [(0, 128)], [(0, 129)], [(700, 300)], [(5, 20), (0, 300), (900, 1), (64, 64)]]
BESIDE = [[9], [1500, 3], [700] * 5]


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.float() - expected.float()).norm() / expected.float().norm())


def compare(runner, lane, batch, monkeypatch):
    captured = dict(runner.prefill_graphs)
    graphs = captured[lane.phase, lane.partition.index]
    assert graphs.takes(len(batch.token_slots), len(batch.rows), batch.decode_reqs)
    replays = []
    with monkeypatch.context() as patch:
        replay = graphs.replay
        patch.setattr(graphs, "replay", lambda *args: replays.append(1) or replay(*args))
        found, keys = logits_of(runner, lane, batch, monkeypatch)
        assert replays, "the batch did not go through a graph"
        patch.setattr(runner, "prefill_graphs", {})
        expected, expected_keys = logits_of(runner, lane, batch, monkeypatch)
    assert found.isfinite().all()
    assert error(found, expected) < 1e-2
    assert error(keys, expected_keys) < 1e-2


@pytest.mark.parametrize("partition", [0, 1], ids=["whole", "split"])
@pytest.mark.parametrize("prefill", ALONE, ids=str)
def test_prompts_alone(runner, lanes, prefill, partition, monkeypatch):
    lane = lanes.lane(Phase.PREFILL, lanes.table[partition])
    compare(runner, lane, batch_of([], prefill), monkeypatch)


def test_log_probabilities_of_a_prompt_come_from_a_graph_too(runner, lanes, monkeypatch):
    lane = lanes.lane(Phase.PREFILL, lanes.table.whole)
    next_ids = np.arange(100, 290)
    part = PromptPart(30, next_ids, LogprobWish(top=2, token_ids=[3]))
    batch = dataclasses.replace(batch_of([], [(0, 20), (64, 210)]), scored=(part,))
    told = []
    for graphs in (runner.prefill_graphs, {}):
        with monkeypatch.context() as patch:
            patch.setattr(runner, "prefill_graphs", graphs)
            run = runner.start(batch)
            assert run.indivisible == bool(graphs)
            lane.launch(run.slice_work(lane, 0, runner.num_layers)).wait(LIMIT_S)
            [scores] = run.scores().prompts
            assert run.scores().samples == {}
            told.append(scores)
    graphed, eager = told
    assert graphed.chosen.shape == (190,)
    np.testing.assert_allclose(graphed.chosen, eager.chosen, atol=0.1)
    np.testing.assert_allclose(graphed.top_values, eager.top_values, atol=0.1)
    np.testing.assert_allclose(graphed.listed, eager.listed, atol=0.1)


def test_lanes_that_share_memory_leave_each_other_alone(runner, lanes, monkeypatch):
    for partition, new in ((0, 1000), (1, 130), (0, 60), (1, 700)):
        lane = lanes.lane(Phase.PREFILL, lanes.table[partition])
        compare(runner, lane, batch_of([], [(40, new)]), monkeypatch)


@pytest.mark.parametrize(
    ("decode", "prefill"), list(itertools.product([[], *BESIDE], ALONE[1:])), ids=str
)
def test_prompts_in_decode_steps(runner, lanes, decode, prefill, monkeypatch):
    lane = lanes.lane(Phase.DECODE, lanes.table.whole)
    compare(runner, lane, batch_of(decode, prefill), monkeypatch)


def test_a_replay_after_a_larger_one_is_its_own(runner, lanes, monkeypatch):
    """Nothing of a batch is left for the next one, smaller in tokens and in requests."""
    lane = lanes.lane(Phase.DECODE, lanes.table.whole)
    compare(runner, lane, batch_of([700] * 5, [(0, 120), (1, 1), (64, 130)]), monkeypatch)
    compare(runner, lane, batch_of([12], [(3, 200)]), monkeypatch)


def test_what_does_not_fit_runs_eagerly(runner, lanes):
    whole = lanes.table.whole.index
    alone, fused = (runner.prefill_graphs[phase, whole] for phase in Phase)
    assert alone.takes(1024, 32, 0)
    assert not alone.takes(1025, 1, 0)
    assert not alone.takes(100, 33, 0)
    assert not alone.takes(100, 2, 1)
    assert fused.takes(1000, MAX_REQS + 32, MAX_REQS)
    assert not fused.takes(1000, MAX_REQS + 2, MAX_REQS + 1)
    assert set(runner.prefill_graphs) == {
        (Phase.PREFILL, 0),
        (Phase.PREFILL, 1),
        (Phase.DECODE, 0),
    }
