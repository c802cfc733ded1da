"""Which kernels each lane runs with: attention with scratch of its own, and matrix products."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping

import torch

from drift_scheduler.lane import LaneProvider, Phase
from sglang.srt.errors import ConfigError
from sglang.srt.layers.attention.base import AttentionBackend
from sglang.srt.layers.attention.torch_native import TorchNativeAttention
from sglang.srt.layers.matmul.base import Matmul, ScratchMatmul, WithScratch
from sglang.srt.layers.matmul.choice import Backend, supports
from sglang.srt.layers.matmul.scratch import Scratch
from sglang.srt.layers.matmul.tune_lanes import tune_lanes
from sglang.srt.mem_cache.kv_pool import DeviceKVPool
from sglang.srt.model_config import ModelConfig
from sglang.srt.model_executor.model_runner import LaneKernels, LaneKey
from sglang.srt.models.base import CausalLM


def choose_attention_backend(wanted: str, config: ModelConfig, device: torch.device) -> str:
    """What `--attention-backend auto` comes down to here; any other value is left as it is."""
    if wanted != "auto":
        return wanted
    if device.type == "cpu":
        return "torch_native"
    from sglang.srt.layers.attention.flashinfer_backend import is_installed

    half = config.dtype in (torch.bfloat16, torch.float16)
    return "flashinfer" if half and shutil.which("nvcc") and is_installed() else "triton"


def matmuls_by_lane(
    wanted: str,
    lanes: LaneProvider,
    model: CausalLM,
    device: torch.device,
    *,
    max_prefill_tokens: int,
    max_decode_reqs: int,
) -> dict[LaneKey, ScratchMatmul]:
    """What `--matmul-backend` comes down to on every lane; measures what no earlier start has.

    Raises ConfigError if the backend cannot multiply the model's matrices here.
    """
    dtype = model.config.dtype
    backends = set(Backend) if wanted == "auto" else {Backend(wanted)}
    if wanted != "auto" and not supports(Backend(wanted), dtype, device):
        raise ConfigError(
            f"--matmul-backend {wanted} is not installed or does not take {dtype} on {device.type}"
        )
    linears = model.layer_linears()
    return tune_lanes(
        lanes,
        linears.all,
        gate_ups=linears.gate_ups,
        max_prefill_tokens=max_prefill_tokens,
        max_decode_reqs=max_decode_reqs,
        dtype=dtype,
        device=device,
        allowed=backends,
    )


def kernels_by_lane(
    backend: str,
    lanes: LaneProvider,
    pool: DeviceKVPool,
    config: ModelConfig,
    matmuls: Mapping[LaneKey, ScratchMatmul],
    *,
    max_prefill_tokens: int,
) -> dict[LaneKey, LaneKernels]:
    """Kernels of every lane, sized for its SMs. The two phases share no scratch.

    max_prefill_tokens: of a prefill batch. Raises ConfigError if the attention backend cannot run
    the model.
    """
    device = pool.keys.device
    scratch = None
    if device.type == "cuda":
        scratch = Scratch(max_prefill_tokens, config.intermediate_size, config.dtype, device)
    kernels: dict[LaneKey, LaneKernels] = {}
    for phase in Phase:
        make = _attention_maker(backend, pool, config)
        for index in range(len(lanes.table)):
            sms = lanes.lane(phase, lanes.table[index]).sms
            matmul: Matmul = matmuls[phase, index]
            # Slices run in order whatever their lane; decode steps are graphs, which have memory.
            if phase is Phase.PREFILL and scratch is not None:
                matmul = WithScratch(matmuls[phase, index], scratch)
            kernels[phase, index] = LaneKernels(make(sms), matmul)
    return kernels


def _attention_maker(
    backend: str, pool: DeviceKVPool, config: ModelConfig
) -> Callable[[int], AttentionBackend]:
    """Makes the backends of one phase's lanes from their SM counts."""
    if backend == "torch_native":
        return lambda sms: TorchNativeAttention(pool, config)
    if backend == "triton":
        from sglang.srt.layers.attention.triton_backend import TritonAttention

        return lambda sms: TritonAttention(pool, config, num_sms=sms)
    from sglang.srt.layers.attention.flashinfer_backend import (
        WORKSPACE_BYTES,
        FlashInferAttention,
    )

    workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=pool.keys.device)
    return lambda sms: FlashInferAttention(pool, config, sms, workspace)
