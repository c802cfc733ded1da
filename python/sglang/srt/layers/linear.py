"""A matrix and its optional bias."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn.functional import linear


class Linear(NamedTuple):
    """weight [out, in]; bias [out] or None."""

    weight: torch.Tensor
    bias: torch.Tensor | None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [tokens, in] -> [tokens, out]."""
        return linear(x, self.weight, self.bias)


def empty_linear(
    out_features: int, in_features: int, *, bias: bool, dtype: torch.dtype, device: torch.device
) -> Linear:
    """An uninitialised layer, to be filled by a loader."""
    weight = torch.empty((out_features, in_features), dtype=dtype, device=device)
    return Linear(weight, torch.empty(out_features, dtype=dtype, device=device) if bias else None)
