"""ProfileKey of this process: all that its timings depend on, and where they are kept."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
from pathlib import Path

import msgspec
import torch

from drift_scheduler.profile import ProfileKey
from sglang.srt.cache_folder import default_folder
from sglang.srt.model_config import ModelConfig
from sglang.srt.server_args import ServerArgs
from sglang.version import __version__

# Packages that bring kernels. The driver is left out: it is updated more often than it matters.
PACKAGES = ("torch", "triton", "flashinfer-python", "sgl-deep-gemm")


def profile_key(
    args: ServerArgs,
    config: ModelConfig,
    device: torch.device,
    *,
    total_sms: int,
    attention_backend: str,
) -> ProfileKey:
    """total_sms: of the lanes' table. attention_backend: what the flag came down to."""
    versions = {"sglang": __version__, **_installed()}
    if torch.version.cuda:
        versions["cuda"] = torch.version.cuda
    # Kernels that a flag exchanges for others are another version of the program to a clock.
    versions["attention_backend"] = attention_backend
    versions["matmul_backend"] = args.matmul_backend
    versions["cuda_graph"] = "off" if args.disable_cuda_graph else "on"
    return ProfileKey(
        gpu=_device_name(device),
        sms=total_sms,
        model=model_shape(config),
        tp=args.tp_size,
        dtype=str(config.dtype).removeprefix("torch."),
        versions=versions,
    )


def model_shape(config: ModelConfig) -> str:
    """The sizes that decide how long a layer takes, and how many layers there are."""
    return (
        f"{config.num_layers} layers of {config.hidden_size}, "
        f"{config.num_heads}/{config.num_kv_heads} heads of {config.head_dim}, "
        f"mlp {config.intermediate_size}, vocab {config.vocab_size}"
    )


def cache_path(key: ProfileKey, *, brief: bool, folder: Path | None = None) -> Path:
    """Where a profile of this key is kept; a brief one beside the full one.

    folder: default_folder() if None.
    """
    text = msgspec.json.encode(key, order="deterministic")
    digest = hashlib.sha256(text).hexdigest()[:16]
    suffix = ".brief.json" if brief else ".json"
    return (folder or default_folder()) / f"latency-{digest}{suffix}"


def _installed() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
