"""ForwardBatch: the tensors of one launch, built on the host and read by model and attention.

Index spaces:
    row    a request's line in the request table; fixed while the request is on the device
    slot   where one token's keys and values live in the KV pool; slot 0 is scratch
    token  position inside the flattened batch, requests one after the other

For request i of a batch:  [ cached: prefix_lens[i] | new: new_lens[i] ]  = seq_lens[i]
Requests that decode, one new token each, come before those that prefill.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class ForwardBatch:
    """Tensors are on the model's device unless a `_host` suffix says otherwise.

    decode_reqs: how many requests decode. The others may have any number of new tokens.
    token_slots [tokens] i64: where each new token's keys and values are stored.
    positions [tokens] i64: index of each new token in its sequence.
    rows [reqs] i64: line of each request in slot_table.
    seq_lens [reqs] i32: cached + new tokens. new_lens [reqs] i32.
    new_starts [reqs + 1] i32: prefix sums of new_lens.
    slot_table [rows, context] i32: slots of every request's tokens, the new ones included.
    new_lens_host, seq_lens_host: the same lengths for code that loops on the host.
    """

    decode_reqs: int
    token_slots: torch.Tensor
    positions: torch.Tensor
    rows: torch.Tensor
    seq_lens: torch.Tensor
    new_lens: torch.Tensor
    new_starts: torch.Tensor
    slot_table: torch.Tensor
    new_lens_host: list[int]
    seq_lens_host: list[int]

    @property
    def num_tokens(self) -> int:
        return int(self.token_slots.shape[0])

    @property
    def num_reqs(self) -> int:
        return int(self.rows.shape[0])
