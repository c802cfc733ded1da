"""What a model looks like to the runtime: layers that can be run in slices."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from sglang.srt.layers.attention.base import AttentionBackend, KVPool
from sglang.srt.layers.linear import Linear
from sglang.srt.layers.matmul.base import Matmul
from sglang.srt.model_config import ModelConfig
from sglang.srt.model_executor.forward_batch import ForwardBatch


@dataclass(frozen=True, slots=True)
class LayerContext:
    """What a layer needs beside its weights and its input: the batch, and a lane's kernels."""

    batch: ForwardBatch
    kv_pool: KVPool
    attention: AttentionBackend
    matmul: Matmul


class HiddenState(NamedTuple):
    """What flows from one layer to the next: both [tokens, hidden_size], model dtype.

    The residual is kept apart so that its addition fuses with the next norm; None before layer 0.
    """

    hidden: torch.Tensor
    residual: torch.Tensor | None


class LayerLinears(NamedTuple):
    """Matrices of a layer: one of every shape, and those whose product goes through a gate."""

    all: tuple[Linear, ...]
    gate_ups: tuple[Linear, ...]


class CausalLM(Protocol):
    """A decoder-only model whose forward pass can stop and go on at any layer boundary."""

    config: ModelConfig

    def embed(self, input_ids: torch.Tensor) -> HiddenState:
        """input_ids [tokens] i64."""
        ...

    def run_layers(
        self,
        state: HiddenState,
        context: LayerContext,
        first: int,
        last: int,
    ) -> HiddenState:
        """Runs layers first..last-1. context.attention is planned for context.batch."""
        ...

    def logits(
        self, state: HiddenState, tokens: torch.Tensor | None, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Final norm and LM head at the given token indices [n] i64, None for all of them ->
        [n, vocab_size] in the model's dtype, in `out` if given."""
        ...

    def layer_linears(self) -> LayerLinears:
        """What the layers multiply with, for measuring kernels on the like."""
        ...

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Takes (Hugging Face parameter name, tensor) pairs, one at a time, any order.

        Raises ConfigError naming parameters that are missing or do not fit.
        """
        ...
