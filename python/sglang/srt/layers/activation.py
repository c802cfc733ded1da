"""Activations."""

from __future__ import annotations

import torch

from sgl_kernel.elementwise_ref import silu_and_mul_ref
from sglang.srt.layers.fused import use_kernels


def silu_and_mul(gate_up: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """gate_up [tokens, 2 * width], gate first -> silu(gate) * up, [tokens, width], in `out` if
    given."""
    if use_kernels(gate_up):
        from sgl_kernel import silu_and_mul as kernels

        return kernels.silu_and_mul(gate_up, out)
    return silu_and_mul_ref(gate_up, out)
