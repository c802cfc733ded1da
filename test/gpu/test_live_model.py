"""On a GPU: memory really given back, weights replaced under graphs, graphs captured anew."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import sglang
from benchmark.smollm2 import model_path

GREEDY = {"temperature": 0, "max_new_tokens": 24, "ignore_eos": True}
PROMPT = "The lighthouse keeper climbed the stairs and"

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def smollm2() -> Path:
    try:
        return model_path()
    except FileNotFoundError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def engine(smollm2: Path) -> Iterator[Any]:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    with sglang.Engine(
        model_path=str(smollm2),
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


def used_bytes() -> int:
    free, total = torch.cuda.mem_get_info()
    return total - free


def test_memory_is_given_back_and_answers_are_the_same_afterwards(engine: Any) -> None:
    expected = engine.generate([PROMPT, "One, two,"], GREEDY)
    before = used_bytes()
    usage = engine.get_server_info()["internal_states"][0]["memory_usage"]
    for _ in range(2):  # a second time finds what the first has left behind
        released = engine.release_memory_occupation()
        assert released["success"], released
        assert before - used_bytes() > 0.95e9 * (usage["kvcache"] + usage["weight"])
        resumed = engine.resume_memory_occupation(["weights"])
        assert resumed["released"] == ["cuda_graph", "kv_cache"]
        assert engine.resume_memory_occupation()["success"]
        answers = engine.generate([PROMPT, "One, two,"], GREEDY)
        assert [a["text"] for a in answers] == [e["text"] for e in expected]
    assert used_bytes() < 1.05 * before


def test_graphs_read_the_new_weights(engine: Any, smollm2: Path) -> None:
    original = engine.generate(PROMPT, GREEDY)["text"]
    assert engine.update_weights_from_disk(str(smollm2), load_format="dummy").success
    assert engine.generate(PROMPT, GREEDY)["text"] != original
    assert engine.update_weights_from_disk(str(smollm2), load_format="gguf").success
    assert engine.generate(PROMPT, GREEDY)["text"] == original


def test_a_profile_has_kernels(engine: Any, tmp_path: Path) -> None:
    assert engine.start_profile(output_dir=str(tmp_path))["success"]
    engine.generate(PROMPT, GREEDY)
    path = engine.stop_profile()["path"]

    with gzip.open(path) as file:
        kinds = {event.get("cat") for event in json.load(file)["traceEvents"]}
    assert {"kernel", "cpu_op"} <= kinds
