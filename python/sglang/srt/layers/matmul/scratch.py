"""Scratch: memory for the two largest results of a layer."""

from __future__ import annotations

import torch


class Scratch:
    """For lanes of which one runs at a time: torch keeps memory for each stream, and every lane
    would keep as much for its largest batch.

    What is taken is uninitialised, and valid until it is taken again; it is new memory where it
    does not fit.
    """

    def __init__(
        self, max_tokens: int, width: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        """width: of an activation; results of up to max_tokens fit."""
        self._memory = torch.empty(3 * max_tokens * width, dtype=dtype, device=device)

    def activated(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """x [tokens, in], weight [2 * width, in] -> [tokens, width]."""
        return self._take(0, x, weight.shape[0] // 2)

    def gate_up(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """x [tokens, in], weight [2 * width, in] -> [tokens, 2 * width], beside the activated."""
        width = weight.shape[0] // 2
        return self._take(x.shape[0] * width, x, 2 * width)

    def _take(self, start: int, x: torch.Tensor, columns: int) -> torch.Tensor:
        tokens = x.shape[0]
        end = start + tokens * columns
        if end > self._memory.numel() or x.dtype != self._memory.dtype:
            return x.new_empty((tokens, columns))
        return self._memory[start:end].view(tokens, columns)


NO_SCRATCH = Scratch(0, 0, torch.float32, torch.device("cpu"))
