"""On a GPU: memory really given back, weights replaced under graphs, graphs captured anew."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import sglang

GREEDY = {"temperature": 0, "max_new_tokens": 24, "ignore_eos": True}
PROMPTS = [[*range(100, 140)], [5, 6, 7, 8]]
SHAPE = {
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with random weights, as transformers saves it."""
    torch.manual_seed(7)
    folder = tmp_path_factory.mktemp("llama")
    LlamaForCausalLM(LlamaConfig(**SHAPE)).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def engine(checkpoint: Path) -> Iterator[Any]:
    with sglang.Engine(
        model_path=str(checkpoint),
        skip_tokenizer_init=True,
        enable_pdmux=True,
        pd_multiplex_policy="table",
        dtype="bfloat16",
        context_length=4096,
        mem_fraction_static=0.5,
        max_running_requests=32,
        matmul_backend="torch",
        log_level="info",
    ) as engine:
        yield engine


def answers(engine: Any) -> list[list[int]]:
    return [
        each["output_ids"] for each in engine.generate(input_ids=PROMPTS, sampling_params=GREEDY)
    ]


def used_bytes() -> int:
    free, total = torch.cuda.mem_get_info()
    return total - free


def test_memory_is_given_back_and_answers_are_the_same_afterwards(engine: Any) -> None:
    expected = answers(engine)
    before = used_bytes()
    usage = engine.get_server_info()["internal_states"][0]["memory_usage"]
    for _ in range(2):  # a second time finds what the first has left behind
        released = engine.release_memory_occupation()
        assert released["success"], released
        assert before - used_bytes() > 0.95e9 * (usage["kvcache"] + usage["weight"])
        resumed = engine.resume_memory_occupation(["weights"])
        assert resumed["released"] == ["cuda_graph", "kv_cache"]
        assert engine.resume_memory_occupation()["success"]
        assert answers(engine) == expected
    assert used_bytes() < 1.05 * before


def test_graphs_read_the_new_weights(engine: Any, checkpoint: Path) -> None:
    original = answers(engine)
    assert engine.update_weights_from_disk(str(checkpoint), load_format="dummy").success
    assert answers(engine) != original
    assert engine.update_weights_from_disk(str(checkpoint), load_format="safetensors").success
    assert answers(engine) == original


def test_a_profile_has_kernels(engine: Any, tmp_path: Path) -> None:
    assert engine.start_profile(output_dir=str(tmp_path))["success"]
    answers(engine)
    path = engine.stop_profile()["path"]

    with gzip.open(path) as file:
        kinds = {event.get("cat") for event in json.load(file)["traceEvents"]}
    assert {"kernel", "cpu_op"} <= kinds
