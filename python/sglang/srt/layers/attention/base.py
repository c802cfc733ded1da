"""The seam between models and attention kernels.

A lane owns one backend, so that scratch memory is never shared between the two workers.
"""

from __future__ import annotations

from typing import Protocol

import torch

from sglang.srt.model_executor.forward_batch import ForwardBatch


class KVPool(Protocol):
    """Keys and values of every slot, per layer."""

    def layer(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(keys, values) of one layer, each [slots, kv_heads, head_dim], views of the pool."""
        ...


class AttentionBackend(Protocol):
    """Causal attention of new tokens over their cached prefix and each other."""

    name: str
    planned: ForwardBatch | None
    """The batch of the last plan."""

    def plan(self, batch: ForwardBatch) -> None:
        """Called before layer 0 of a batch's first slice, on the lane's stream.

        The plan serves all slices of the batch until another batch is planned: then it is made
        again, from whatever layer the batch goes on.
        """
        ...

    def attend(
        self,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        batch: ForwardBatch,
    ) -> torch.Tensor:
        """Attends; k and v lie in the pool at batch.token_slots already.

        q [tokens, q_heads, head_dim] contiguous; k, v [tokens, kv_heads, head_dim], strided over
        tokens, for who can use the new ones as they are. All of the model's dtype.
        Returns [tokens, q_heads, head_dim] contiguous. Never synchronises with the host.
        """
        ...
