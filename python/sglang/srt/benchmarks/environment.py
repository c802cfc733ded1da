"""Where a measurement was made: machine, commit and versions, for the JSON of a result."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
# Where this folder lies in our repository, as `git rev-parse --show-prefix` says it.
PLACE = "python/sglang/srt/benchmarks/"
PACKAGES = ("torch", "triton", "transformers", "cuda-core", "flashinfer-python", "sgl-deep-gemm")


def describe() -> dict[str, Any]:
    """Keys gpu, gpu_count, driver (None without a GPU), cpu, cores, commit, python, versions.

    The commit is git's, with "+" for uncommitted changes; where the code does not run from a git
    checkout, the variable COMMIT, else None.
    """
    import torch

    on_gpu = torch.cuda.is_available()
    return {
        "gpu": torch.cuda.get_device_name(0) if on_gpu else None,
        "gpu_count": torch.cuda.device_count() if on_gpu else 0,
        "driver": _command("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        if on_gpu
        else None,
        "cpu": platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "commit": _commit(),
        "python": platform.python_version(),
        "versions": {name: version for name in PACKAGES if (version := _version(name))},
    }


def recorded_flags(command: Sequence[str]) -> list[str]:
    """The command line without --result-filename: where a result lies says nothing of the run."""
    flags: list[str] = []
    words = iter(command)
    for word in words:
        if word == "--result-filename":
            next(words, None)
        elif not word.startswith("--result-filename="):
            flags.append(word)
    return flags


def _commit() -> str | None:
    # Installed inside somebody else's repository, git would tell that one's commit.
    if _command("git", "rev-parse", "--show-prefix") != PLACE:
        return os.environ.get("COMMIT")
    head = _command("git", "rev-parse", "--short=12", "HEAD")
    if head is None:
        return os.environ.get("COMMIT")
    return head + ("+" if _command("git", "status", "--porcelain", "-uno") else "")


def _command(*words: str) -> str | None:
    try:
        done = subprocess.run(words, cwd=FOLDER, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = done.stdout.strip().splitlines()
    if done.returncode != 0:
        return None
    return lines[0] if lines else ""


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
