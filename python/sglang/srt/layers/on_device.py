"""on_device: arrays of the host, copied to where the model is."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch


def on_device(values: npt.NDArray[Any], device: torch.device) -> torch.Tensor:
    """The array as a tensor on the device, copied asynchronously on the current stream from pinned
    memory that is the copy's own; on a CPU it shares the array's memory.

    NumPy fills that memory: torch divides copies of 32,768 numbers and more among threads, which
    have to be woken, and waits for the last of them.
    """
    if device.type != "cuda":
        return torch.from_numpy(values)
    return pinned_copy(values).to(device, non_blocking=True)


def pinned_copy(values: npt.NDArray[Any]) -> torch.Tensor:
    """In pinned memory of its own."""
    dtype = torch.from_numpy(np.empty(0, dtype=values.dtype)).dtype
    pinned = torch.empty(values.shape, dtype=dtype, pin_memory=True)
    pinned.numpy()[...] = values
    return pinned
