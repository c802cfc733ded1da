"""What a model looks like to the runtime: layers that can be run in slices."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple, Protocol

import torch

from sglang.srt.model_config import ModelConfig

# attend(layer, q [tokens, q_heads, head_dim], k, v [tokens, kv_heads, head_dim]) -> like q
Attend = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class HiddenState(NamedTuple):
    """What flows from one layer to the next: both [tokens, hidden_size], model dtype.

    The residual is kept apart so that its addition fuses with the next norm; None before layer 0.
    """

    hidden: torch.Tensor
    residual: torch.Tensor | None


class CausalLM(Protocol):
    """A decoder-only model whose forward pass can stop and go on at any layer boundary."""

    config: ModelConfig

    def embed(self, input_ids: torch.Tensor) -> HiddenState:
        """input_ids [tokens] i64."""
        ...

    def run_layers(
        self,
        state: HiddenState,
        positions: torch.Tensor,
        attend: Attend,
        first: int,
        last: int,
    ) -> HiddenState:
        """Runs layers first..last-1. positions [tokens] i64."""
        ...

    def logits(self, state: HiddenState, tokens: torch.Tensor) -> torch.Tensor:
        """Final norm and LM head at the given token indices [n] i64 -> [n, vocab_size] f32."""
        ...

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Takes (Hugging Face parameter name, tensor) pairs, one at a time, any order.

        Raises ConfigError naming parameters that are missing or do not fit.
        """
        ...
