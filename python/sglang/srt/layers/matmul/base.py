"""The seam between models and matrix products: a lane brings the kernels that fit its SMs."""

from __future__ import annotations

from typing import Protocol

import torch

from sglang.srt.layers.activation import silu_and_mul
from sglang.srt.layers.linear import Linear


class Matmul(Protocol):
    """One lane's matrix products."""

    def __call__(self, x: torch.Tensor, linear: Linear) -> torch.Tensor:
        """x [tokens, in] -> [tokens, out], in x's dtype."""
        ...

    def gate_up_silu(self, x: torch.Tensor, linear: Linear) -> torch.Tensor:
        """x [tokens, in], linear of 2 * width rows, gate first -> silu(gate) * up
        [tokens, width]."""
        ...


class TorchMatmul:
    """Whatever torch takes: cuBLAS, or a CPU's library."""

    def __call__(self, x: torch.Tensor, linear: Linear) -> torch.Tensor:
        """See Matmul."""
        return linear(x)

    def gate_up_silu(self, x: torch.Tensor, linear: Linear) -> torch.Tensor:
        """See Matmul."""
        return silu_and_mul(linear(x))
