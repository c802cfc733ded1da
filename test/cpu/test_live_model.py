"""Weights that are replaced and memory that is given back, on a tiny model."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from drift_scheduler.lane import Phase
from drift_scheduler.lane_cpu import CpuLanes
from sglang.srt.errors import SglangError
from sglang.srt.layers.attention.torch_native import TorchNativeAttention
from sglang.srt.layers.matmul.base import TorchMatmul
from sglang.srt.mem_cache.kv_pool import DeviceKVPool
from sglang.srt.model_config import ModelConfig, resolve_model_source
from sglang.srt.model_executor.live_model import TAGS, LiveModel
from sglang.srt.model_executor.made_up_batches import GREEDY, batch_of
from sglang.srt.model_executor.model_runner import LaneKernels, ModelRunner
from sglang.srt.model_loader import load_model
from sglang.srt.server_args import ServerArgs

LIMIT_S = 30.0
NUM_SLOTS = 65


def unheard() -> None:
    """Nobody waits for a sign of life."""


class Served:
    """A model on a CPU lane, as a scheduler has it."""

    def __init__(self, folder, lanes) -> None:
        source = resolve_model_source(str(folder))
        config = ModelConfig.load(source)
        self.lanes = lanes
        self.model = load_model(source, config, "cpu")
        self.pool = DeviceKVPool(
            NUM_SLOTS,
            config.num_layers,
            config.num_kv_heads,
            config.head_dim,
            config.dtype,
            "cpu",
        )
        attention = TorchNativeAttention(self.pool, config)
        kernels = LaneKernels(attention, TorchMatmul())
        self.runner = ModelRunner(
            self.model,
            self.pool,
            {(Phase.PREFILL, 0): kernels},
            device=torch.device("cpu"),
            num_rows=4,
        )
        args = ServerArgs(model_path=str(folder))
        self.live = LiveModel(args, self.model, source, self.runner, self.pool, None)

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: p.clone() for name, p in self.model.named_parameters().items()}

    def compute(self) -> torch.Tensor:
        """Keys that a prompt leaves in the last layer of the pool."""
        run = self.runner.start(batch_of((9,), 0, GREEDY, self.model.config.context_length))
        lane = self.lanes.lane(Phase.PREFILL, self.lanes.table.whole)
        lane.launch(run.slice_work(lane, 0, self.runner.num_layers)).wait(LIMIT_S)
        return self.pool.keys[-1, 1:10].clone()


@pytest.fixture(scope="module")
def lanes():
    lanes = CpuLanes()
    yield lanes
    lanes.close()


@pytest.fixture
def checkpoint(tiny_model_dir, tmp_path):
    """checkpoint(change) is a copy of the tiny Llama whose tensors `change` has edited."""

    def write(change):
        folder = tmp_path / f"copy_{len(list(tmp_path.iterdir()))}"
        shutil.copytree(tiny_model_dir("llama"), folder)
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return write


@pytest.fixture
def served(tiny_model_dir, lanes):
    return Served(tiny_model_dir("llama"), lanes)


def negate(tensors) -> None:
    for tensor in tensors.values():
        tensor.neg_()


def test_new_weights_compute_what_a_server_started_with_them_does(served, checkpoint, lanes):
    folder = checkpoint(negate)
    before = served.compute()
    served.live.update_weights(str(folder), "auto", unheard)
    after = served.compute()
    assert not torch.equal(before, after)
    assert torch.equal(after, Served(folder, lanes).compute())


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda tensors: tensors.pop("model.norm.weight"), "missing: model.norm.weight"),
        (lambda tensors: tensors.update(extra=torch.zeros(1)), "unexpected: extra"),
        (
            lambda tensors: tensors.update({"model.norm.weight": torch.zeros(3)}),
            "wrong shape: model.norm.weight",
        ),
    ],
)
def test_weights_that_do_not_fit_leave_the_old_ones(served, checkpoint, change, problem):
    def negate_and_break(tensors) -> None:
        negate(tensors)
        change(tensors)

    folder, before = checkpoint(negate_and_break), served.weights()
    with pytest.raises(SglangError, match=problem):
        served.live.update_weights(str(folder), "auto", unheard)
    after = served.weights()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_another_architecture_is_refused_naming_what_differs(served, tiny_model_dir):
    wider = tiny_model_dir("llama", intermediate_size=71)
    with pytest.raises(SglangError, match="differs from the model served in intermediate_size"):
        served.live.update_weights(str(wider), "auto", unheard)
    turned = tiny_model_dir("llama", rope_parameters={"rope_type": "default", "rope_theta": 77.0})
    with pytest.raises(SglangError, match="rope_parameters"):
        served.live.update_weights(str(turned), "auto", unheard)
    with pytest.raises(SglangError, match="architecture"):
        served.live.update_weights(str(tiny_model_dir("qwen3")), "auto", unheard)


def test_weights_that_break_while_they_are_written_bring_the_old_ones_back(
    served, checkpoint, monkeypatch
):
    folder, before = checkpoint(negate), served.weights()
    load = served.model.load_weights
    calls = []

    def break_once(weights) -> None:
        calls.append(1)
        if len(calls) == 1:
            served.model.named_parameters()["model.norm.weight"].zero_()
            raise OSError("the disk is gone")
        load(weights)

    monkeypatch.setattr(type(served.model), "load_weights", lambda self, w: break_once(w))
    with pytest.raises(SglangError, match="the disk is gone"):
        served.live.update_weights(str(folder), "auto", unheard)
    after = served.weights()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_released_memory_is_gone_and_comes_back_with_the_same_weights(served):
    before, storage = served.compute(), served.model.named_parameters()["lm_head.weight"]
    served.live.release(list(TAGS))
    assert served.live.released == set(TAGS)
    assert storage.untyped_storage().nbytes() == 0
    assert served.pool.keys.numel() == served.pool.values.numel() == 0
    assert served.live.usage()["weight"] == served.live.usage()["kvcache"] == 0
    served.live.resume(["weights"], unheard)
    assert served.live.released == {"kv_cache", "cuda_graph"}
    served.live.resume(list(TAGS), unheard)
    assert served.live.released == frozenset()
    assert served.pool.keys.shape[1] == NUM_SLOTS
    assert torch.equal(served.compute(), before)


def test_memory_comes_back_with_the_weights_that_were_served_last(served, checkpoint):
    served.live.update_weights(str(checkpoint(negate)), "auto", unheard)
    after = served.compute()
    served.live.release(["weights"])
    served.live.release(["weights"])  # again: nothing happens
    served.live.resume(["weights"], unheard)
    assert torch.equal(served.compute(), after)


def test_weights_that_cannot_be_read_again_stay_released(served, checkpoint):
    folder = checkpoint(negate)
    served.live.update_weights(str(folder), "auto", unheard)
    served.live.release(["weights"])
    (folder / "model.safetensors").unlink()
    with pytest.raises(SglangError, match="cannot be read again"):
        served.live.resume(["weights"], unheard)
    assert served.live.released == {"weights"}
    with pytest.raises(SglangError, match="resume them first"):
        served.live.update_weights(str(folder), "auto", unheard)
    with pytest.raises(SglangError, match="resume them first"):
        served.live.rows("lm_head.weight", 1)


def test_rows_are_those_of_the_checkpoint(served, tiny_model_dir):
    tensors = load_file(tiny_model_dir("llama") / "model.safetensors")
    name = "model.layers.1.self_attn.k_proj.weight"  # part of a fused parameter
    assert served.live.rows(name, 3) == tensors[name][:3].tolist()
    with pytest.raises(SglangError, match="no parameter 'nope'"):
        served.live.rows("nope", 3)
