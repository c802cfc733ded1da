"""Which tensors go to the fused Triton kernels; all others take the plain torch path."""

from __future__ import annotations

import functools
import importlib.util

import torch


def use_kernels(x: torch.Tensor) -> bool:
    """Whether x is on a GPU and Triton is installed."""
    return x.is_cuda and _triton_is_installed()


@functools.cache
def _triton_is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None
