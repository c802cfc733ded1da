"""The seam between models and matrix products: a lane brings the kernels that fit its SMs."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch

from sglang.srt.layers.activation import silu_and_mul
from sglang.srt.layers.linear import Linear
from sglang.srt.layers.matmul.scratch import NO_SCRATCH, Scratch


class Matmul(Protocol):
    """One lane's matrix products."""

    def __call__(self, x: torch.Tensor, linear: Linear) -> torch.Tensor:
        """x [tokens, in] -> [tokens, out], in x's dtype."""
        ...

    def gate_up_silu(self, x: torch.Tensor, linear: Linear) -> torch.Tensor:
        """x [tokens, in], linear of 2 * width rows, gate first -> silu(gate) * up
        [tokens, width], valid until the next call."""
        ...


class ScratchMatmul(Matmul, Protocol):
    """A Matmul whose largest results may lie in memory that is there already."""

    def gate_up_silu(
        self, x: torch.Tensor, linear: Linear, scratch: Scratch = NO_SCRATCH
    ) -> torch.Tensor:
        """See Matmul; the result, and what leads to it, are in scratch where they fit it."""
        ...


class WithScratch(NamedTuple):
    """A Matmul for lanes that share scratch: of those only one runs at a time."""

    matmul: ScratchMatmul
    scratch: Scratch

    def __call__(self, x: torch.Tensor, linear: Linear) -> torch.Tensor:
        """See Matmul."""
        return self.matmul(x, linear)

    def gate_up_silu(self, x: torch.Tensor, linear: Linear) -> torch.Tensor:
        """See Matmul."""
        return self.matmul.gate_up_silu(x, linear, self.scratch)


class TorchMatmul:
    """Whatever torch takes: cuBLAS, or a CPU's library."""

    def __call__(self, x: torch.Tensor, linear: Linear) -> torch.Tensor:
        """See Matmul."""
        return linear(x)

    def gate_up_silu(
        self, x: torch.Tensor, linear: Linear, scratch: Scratch = NO_SCRATCH
    ) -> torch.Tensor:
        """See ScratchMatmul."""
        weight, bias = linear
        if scratch is NO_SCRATCH or bias is not None:
            return silu_and_mul(linear(x))
        gate_up = torch.mm(x, weight.t(), out=scratch.gate_up(x, weight))
        return silu_and_mul(gate_up, scratch.activated(x, weight))
