"""How often a process had to ask the driver for memory, which holds up whoever asks."""

from __future__ import annotations

import torch


def driver_allocations() -> dict[str, int] | None:
    """Since the start: device, pinned: blocks taken of either kind; retries: after giving back
    what was cached. None without a GPU in use.

    Under load none of them should rise: see model_executor.memory_for_serving.
    """
    if not torch.cuda.is_initialized():
        return None
    device = torch.cuda.memory_stats()
    return {
        "device": device["num_device_alloc"],
        "pinned": torch.cuda.host_memory_stats()["num_host_alloc"],
        "retries": device["num_alloc_retries"],
    }
