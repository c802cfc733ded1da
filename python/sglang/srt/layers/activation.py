"""Activations."""

from __future__ import annotations

import torch
from torch.nn.functional import silu


def silu_and_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """gate_up [tokens, 2 * width], gate first -> silu(gate) * up, [tokens, width]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return silu(gate) * up
