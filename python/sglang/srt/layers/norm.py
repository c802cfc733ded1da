"""RMS normalisation: in float32 inside, scaled in the model's dtype, as the models were trained."""

from __future__ import annotations

import torch

from sgl_kernel.elementwise_ref import add_rms_norm_ref, rms_norm_ref
from sglang.srt.layers.fused import use_kernels


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Normalises every row. x [tokens, width], weight [width] -> like x."""
    if use_kernels(x):
        from sgl_kernel import rms_norm as kernels

        return kernels.rms_norm(x, weight, eps)
    return rms_norm_ref(x, weight, eps)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(rms_norm(x + residual), x + residual); all [tokens, width]. Changes neither input."""
    if use_kernels(x):
        from sgl_kernel import rms_norm as kernels

        return kernels.add_rms_norm(x, residual, weight, eps)
    return add_rms_norm_ref(x, residual, weight, eps)
