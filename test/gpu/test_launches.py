"""A launch does not wait for what other lanes are doing.

The driver loads a kernel when it is first launched, and to do so it waits until the device is
idle. In a process of its own each: one where a kernel was loaded before knows nothing of that.
"""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")
pytest.importorskip("cuda.core", reason="needs cuda-core (extra: cuda)")

from drift_scheduler.lane import Phase
from sglang.srt.model_executor import bring_up as bringing_up
from sglang.srt.model_executor.made_up_batches import ALL_WISHES, batch_of, with_all_wishes
from sglang.srt.observability.driver_memory import driver_allocations
from sglang.srt.sampling_params import SamplingParams
from sglang.srt.server_args import ServerArgs

LIMIT_S = 120.0
START_LIMIT_S = 400.0
BUSY_CYCLES = 200_000_000  # 0.1 s
CONTEXT = 8192
LAYERS = 2
VOCAB = 32768
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 7168,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "vocab_size": VOCAB,
    "max_position_embeddings": CONTEXT,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}


def prompt(length, **sampling):
    return batch_of([length], 0, SamplingParams(**sampling), CONTEXT)


BATCHES = {
    "greedy": lambda length: prompt(length, temperature=0),
    "top_p": lambda length: prompt(length, temperature=1, top_p=0.9),
    "top_k=5": lambda length: prompt(length, temperature=1, top_k=5),
    "top_k=70": lambda length: prompt(length, temperature=1, top_k=70),
    "top_k=900": lambda length: prompt(length, temperature=1, top_k=900),
    "all": lambda length: with_all_wishes(prompt(length, temperature=0), VOCAB),
}


def launches_that_waited(model_path, loads_kernels):
    """Prompts whose launches came back only when the other lane's work was done, of 60: length,
    sampling, and what memory the driver was asked for meanwhile."""
    if not loads_kernels:
        for name in ("load_products", "load_sampling"):
            setattr(bringing_up, name, lambda *args, **sizes: None)
    args = ServerArgs(
        model_path=model_path,
        load_format="dummy",
        max_total_tokens=3 * CONTEXT,
        max_running_requests=32,
        enable_pdmux=True,
        pd_multiplex_policy="table",
        sm_group_num=3,
        matmul_backend="torch",
    )
    args.check()
    executor = bringing_up.bring_up(args)
    lanes, runner = executor.lanes, executor.runner
    (split,) = lanes.table.splits
    decode, prefill = (lanes.lane(phase, split) for phase in (Phase.DECODE, Phase.PREFILL))
    rng = np.random.default_rng(7)
    waited = []
    for length in rng.integers(1, CONTEXT, size=60).tolist():
        name = str(rng.choice(list(BATCHES)))
        before = driver_allocations()
        run = runner.start(BATCHES[name](length))
        slices = [(0, LAYERS)] if run.indivisible else [(0, 1), (1, LAYERS)]
        busy = decode.launch(lambda: torch.cuda._sleep(BUSY_CYCLES))
        tickets = [prefill.launch(run.slice_work(prefill, *layers)) for layers in slices]
        for ticket in tickets:
            ticket.wait_launched(LIMIT_S)
        if busy.done():
            after = driver_allocations()
            waited.append((length, name, {kind: after[kind] - before[kind] for kind in after}))
        for ticket in (busy, *tickets):
            ticket.wait(LIMIT_S)
        runner.forget(ALL_WISHES)
    executor.close()
    return waited


@pytest.fixture
def elsewhere(device, tmp_path):
    """elsewhere(loads_kernels): what waited in a new process."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))

    def elsewhere(loads_kernels):
        command = [sys.executable, __file__, str(tmp_path), json.dumps(loads_kernels)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=START_LIMIT_S)
        assert done.returncode == 0, done.stderr[-2000:]
        return json.loads(done.stdout.splitlines()[-1])

    return elsewhere


def test_no_launch_of_a_warm_engine_waits(elsewhere):
    assert elsewhere(True) == []


def test_without_loading_kernels_some_would(elsewhere):
    assert elsewhere(False)


if __name__ == "__main__":
    print(json.dumps(launches_that_waited(sys.argv[1], json.loads(sys.argv[2]))))
