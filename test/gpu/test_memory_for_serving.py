"""Once the largest batches and parts of them have run, no batch of any size needs more memory.

To ask the driver for it makes the host wait for lanes at work.

An engine of a small model with a large vocabulary and wide layers, so that what grows with a
batch is what grows in serving: logits, and the activations of long prompts.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")
pytest.importorskip("cuda.core", reason="needs cuda-core (extra: cuda)")

from drift_scheduler.lane import Phase
from sglang.srt.model_executor import bring_up as bringing_up
from sglang.srt.model_executor.bring_up import bring_up
from sglang.srt.model_executor.made_up_batches import GREEDY, SORTING, batch_of
from sglang.srt.observability.driver_memory import driver_allocations
from sglang.srt.server_args import ServerArgs

LIMIT_S = 120.0
CONTEXT = 8192
MAX_REQS = 64
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 1024,
    "intermediate_size": 7168,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "vocab_size": 128256,
    "max_position_embeddings": CONTEXT,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}


@pytest.fixture
def start(device, tmp_path):
    """start() brings up an engine with two splits; it is closed at the end of the test."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    started = []

    def start():
        args = ServerArgs(
            model_path=str(tmp_path),
            load_format="dummy",
            max_total_tokens=3 * CONTEXT,
            max_running_requests=MAX_REQS,
            enable_pdmux=True,
            pd_multiplex_policy="table",
            sm_group_num=4,
        )
        args.check()
        started.append(bring_up(args))
        return started[-1]

    yield start
    for executor in started:
        executor.close()
    torch.cuda.empty_cache()


def serve(executor):
    """Batches of growing and of mixed sizes on every lane, launched as in serving."""
    rng = np.random.default_rng(5)
    lanes, runner = executor.lanes, executor.runner
    counts = [*range(4, MAX_REQS + 1, 4), *rng.integers(1, MAX_REQS, size=20).tolist()]
    lengths = [*range(500, CONTEXT, 900), *rng.integers(100, CONTEXT, size=20).tolist()]
    for index in range(len(lanes.table)):
        share = lanes.table[index]
        for length in lengths:
            launch(lanes.lane(Phase.PREFILL, share), runner, ([length], 0), sliced=True)
        for count in counts:
            short = rng.integers(1, CONTEXT // MAX_REQS, size=count).tolist()
            launch(lanes.lane(Phase.PREFILL, share), runner, (short, 0), sliced=True)
        for count, wish in itertools.product(counts, (GREEDY, SORTING)):
            launch(lanes.lane(Phase.DECODE, share), runner, ([], count), wish)
    whole = lanes.lane(Phase.DECODE, lanes.table.whole)
    for count, wish in itertools.product(counts, (GREEDY, SORTING)):
        launch(whole, runner, ([int(rng.integers(1, 900))], count), wish)


def blocks():
    """Sizes in MB, by stream, of what the allocator has from the driver."""
    return Counter((b["stream"], b["total_size"] / 2**20) for b in torch.cuda.memory_snapshot())


def launch(lane, runner, shape, wish=GREEDY, *, sliced=False):
    prompts, decode_reqs = shape
    run = runner.start(batch_of(prompts, decode_reqs, wish, CONTEXT))
    layers = runner.num_layers
    step = 1 if sliced and not run.indivisible else layers
    for first in range(0, layers, step):
        lane.launch(run.slice_work(lane, first, first + step)).wait(LIMIT_S)


def test_a_warm_engine_has_all_the_memory_it_needs(start):
    executor = start()
    before, held = driver_allocations(), blocks()
    serve(executor)
    assert driver_allocations() == before, f"new blocks, MB: {blocks() - held}"


def test_without_the_largest_batches_it_would_ask_for_more(start, monkeypatch):
    monkeypatch.setattr(bringing_up, "take_memory", lambda *args, **sizes: None)
    executor = start()
    before = driver_allocations()["device"]
    serve(executor)
    assert driver_allocations()["device"] > before + 10
