"""Matrix products tuned on real lanes: right at every number of tokens, and remembered."""

from __future__ import annotations

import pytest
import torch

from drift_scheduler.lane import Phase
from sglang.srt.layers.linear import Linear
from sglang.srt.layers.matmul.base import TorchMatmul
from sglang.srt.layers.matmul.choice import Backend, Choice, installed, supports
from sglang.srt.layers.matmul.lane_matmul import LaneMatmul
from sglang.srt.layers.matmul.table import LaneTable, Shape
from sglang.srt.layers.matmul.tune_lanes import tune_lanes

pytest.importorskip("cuda.core", reason="needs cuda-core (extra: cuda)")

LIMIT_S = 60.0
DTYPE = torch.bfloat16
TOKENS = (1, 5, 16, 33, 128, 200, 256, 257, 700, 1023)


@pytest.fixture(scope="module")
def lanes(device):
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a Hopper GPU")
    from drift_scheduler.lane_cuda import CudaLanes

    lanes = CudaLanes(device, decode_shares=[32])
    yield lanes
    lanes.close()


def linear(n: int, k: int, device: torch.device, *, bias: bool = False) -> Linear:
    weight = torch.randn((n, k), device=device) / k**0.5
    added = torch.randn(n, device=device).to(DTYPE) if bias else None
    return Linear(weight.to(DTYPE), added)


def relative_error(out: torch.Tensor, expected: torch.Tensor) -> float:
    return float((out.float() - expected.float()).norm() / expected.float().norm())


def test_every_lane_computes_what_torch_computes_and_tunes_once(lanes, device, tmp_path):
    qkv, gate_up = linear(1536, 1024, device, bias=True), linear(4096, 1024, device)
    torch.cuda.synchronize()

    def tune():
        return tune_lanes(
            lanes,
            [qkv, gate_up],
            gate_ups=[gate_up],
            max_prefill_tokens=512,
            max_decode_reqs=64,
            dtype=DTYPE,
            device=device,
            allowed=[Backend.TORCH, Backend.TRITON],
            cache_folder=tmp_path,
        )

    matmuls = tune()
    (file,) = tmp_path.iterdir()
    written = file.read_bytes(), file.stat().st_mtime_ns
    plain = TorchMatmul()
    results = []
    for (phase, index), matmul in matmuls.items():
        for m in TOKENS:
            x = torch.randn((m, 1024), device=device).to(DTYPE)
            torch.cuda.synchronize()

            def work(x=x, matmul=matmul):
                results.append((matmul(x, qkv), plain(x, qkv)))
                results.append((matmul.gate_up_silu(x, gate_up), plain.gate_up_silu(x, gate_up)))

            lanes.lane(phase, lanes.table[index]).launch(work).wait(LIMIT_S)
    assert len(results) == 2 * len(TOKENS) * len(matmuls) == 8 * len(TOKENS)
    for out, expected in results:
        assert relative_error(out, expected) < 1e-2
    assert set(tune()) == set(matmuls)
    assert (file.read_bytes(), file.stat().st_mtime_ns) == written


def test_deep_gemm_runs_whole_pieces_on_the_lane(lanes, device):
    if not installed(Backend.DEEP_GEMM) or not supports(Backend.DEEP_GEMM, DTYPE, device):
        pytest.skip("needs DeepGEMM (extra: deep-gemm)")
    layer = linear(1024, 512, device)
    table = LaneTable({Shape(1024, 512): {2048: Choice(Backend.DEEP_GEMM)}}, {})
    split = lanes.table[1]
    matmul = LaneMatmul(split.prefill_sms, table, DTYPE)
    x = torch.randn((2048 + 300, 512), device=device).to(DTYPE)
    torch.cuda.synchronize()
    results = []
    lane = lanes.lane(Phase.PREFILL, split)
    lane.launch(lambda: results.append(matmul(x, layer))).wait(LIMIT_S)
    assert relative_error(results[0], layer(x)) < 1e-2
