"""DeviceKVPool: the keys and values of every slot."""

from __future__ import annotations

import math

import numpy as np
import torch


class DeviceKVPool:
    """One allocation for keys and one for values, each [layers, slots, kv_heads, head_dim].

    It only holds bytes: who owns a slot is the allocator's business. Slots start as zeros, so that
    reading one that was never written (the scratch slot of a padded batch) yields finite numbers.
    """

    def __init__(
        self,
        num_slots: int,
        num_layers: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        shape = (num_layers, num_slots, kv_heads, head_dim)
        self.num_slots = num_slots
        self._shape, self._dtype, self._device = shape, dtype, torch.device(device)
        self.restore()

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes

    def release(self) -> None:
        """Gives the memory back. No launch may run, and no graph that holds its address, until
        `restore` has taken other memory in its place."""
        nothing = torch.empty(0, dtype=self._dtype, device=self._device)
        self.keys = self.values = nothing
        self._layers: list[tuple[torch.Tensor, torch.Tensor]] = []

    def restore(self) -> None:
        """Memory for all slots, of zeros."""
        self.keys = _zeros(self._shape, self._dtype, self._device)
        self.values = _zeros(self._shape, self._dtype, self._device)
        self._layers = list(zip(self.keys.unbind(), self.values.unbind(), strict=True))

    def layer(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(keys, values) of one layer, each [slots, kv_heads, head_dim], views of the pool."""
        return self._layers[index]


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # numpy asks the system for zeroed pages and does not touch them: a pool of many gigabytes is
    # there at once, and takes memory as it fills.
    buffer = np.zeros(math.prod(shape) * dtype.itemsize, dtype=np.uint8)
    return torch.from_numpy(buffer).view(dtype).view(shape)
