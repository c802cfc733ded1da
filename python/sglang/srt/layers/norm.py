"""RMS normalisation: in float32 inside, scaled in the model's dtype, as the models were trained."""

from __future__ import annotations

import torch
from torch.nn import functional


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Normalises the last dimension. x [..., width], weight [width] -> like x."""
    return functional.rms_norm(x.float(), weight.shape, eps=eps).to(x.dtype) * weight


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(rms_norm(x + residual), x + residual); all [tokens, width]. Changes neither input."""
    total = x + residual
    return rms_norm(total, weight, eps), total
