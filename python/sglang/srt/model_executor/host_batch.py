"""HostBatch: the integers of one launch, as the engine thread builds them.

All of them cross to the device in one copy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from sglang.srt.layers.on_device import on_device
from sglang.srt.layers.penalties import History
from sglang.srt.logprobs import LogprobWish
from sglang.srt.model_executor.forward_batch import ForwardBatch
from sglang.srt.sampling_params import SamplingParams

Ints = npt.NDArray[np.int64]


class TokenMask(NamedTuple):
    """The tokens that samples `rows` [constrained] i64 of a batch may get, see srt/constrained;
    words [constrained, words] i32, a bit for each token; samples that are not named may get any.
    """

    rows: Ints
    words: npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True, eq=False)
class SampleWish:
    """How a request's tokens are chosen. A request has one object for life, so that the same
    requests in the next launch are told by identity.

    withheld_ids cannot be chosen at positions before withheld_until (min_new_tokens).
    logprobs: what is to be told of each token, None if nothing.
    """

    sampling: SamplingParams
    seed: int
    withheld_ids: tuple[int, ...] = ()
    withheld_until: int = 0
    logprobs: LogprobWish | None = None

    @property
    def takes_likeliest(self) -> bool:
        """Whether the largest logit decides, and nothing else."""
        sampling = self.sampling
        adjusted = self.withheld_ids or sampling.logit_bias or sampling.penalises
        return sampling.greedy and not adjusted


class PromptPart(NamedTuple):
    """Prompt tokens whose log-probabilities a launch is to tell.

    next_ids [n]: the tokens behind the flattened tokens `first` and on.
    """

    first: int
    next_ids: Ints
    wish: LogprobWish


@dataclass(frozen=True, slots=True)
class HostBatch:
    """See ForwardBatch for the index spaces; arrays are i64 on the host.

    decode_reqs: the leading requests that decode. Each has one new token, whose id waits on the
    device in the relay table; the others bring theirs in input_ids.
    input_ids [tokens - decode_reqs].
    table_index, table_slots: flat writes to the slot table that this launch brings up to date.
    samples: a wish for every request that gets a token; sample_tokens [samples], the flattened
    token index whose logits choose it; sample_rows [samples] where it goes in the relay table.
    mask: None if no sample is constrained.
    scored: parts of prompts, beside the samples, that log-probabilities are wanted of.
    histories: of the samples with penalties that do not decode; their owners are their wishes.
    """

    decode_reqs: int
    input_ids: Ints
    positions: Ints
    token_slots: Ints
    rows: Ints
    seq_lens: Ints
    new_lens: Ints
    table_index: Ints
    table_slots: Ints
    samples: tuple[SampleWish, ...]
    sample_tokens: Ints
    sample_rows: Ints
    mask: TokenMask | None = None
    scored: tuple[PromptPart, ...] = ()
    histories: tuple[History, ...] = ()

    @property
    def is_decode(self) -> bool:
        """Whether it is a decode step and nothing else."""
        return self.decode_reqs == len(self.rows)

    @property
    def sample_positions(self) -> Ints:
        """Index in its sequence of every token to be chosen [samples]; seeds its randomness."""
        return self.positions[self.sample_tokens] + 1


class SampleTensors(NamedTuple):
    """Where sampling reads and writes, all [samples] i64: the flattened token whose state is
    used, the relay row, and the position of the token to choose."""

    tokens: torch.Tensor
    rows: torch.Tensor
    positions: torch.Tensor


@dataclass(frozen=True, slots=True)
class DeviceBatch:
    """A HostBatch on the device."""

    forward: ForwardBatch
    input_ids: torch.Tensor
    table_index: torch.Tensor
    table_slots: torch.Tensor
    samples: SampleTensors


def upload(host: HostBatch, slot_table: torch.Tensor) -> DeviceBatch:
    """Copies the batch to slot_table's device, asynchronously on the current stream."""
    starts = np.zeros(len(host.new_lens) + 1, dtype=np.int64)
    np.cumsum(host.new_lens, out=starts[1:])
    (
        input_ids,
        positions,
        token_slots,
        rows,
        seq_lens,
        new_lens,
        new_starts,
        table_index,
        table_slots,
        *samples,
    ) = _to_device(
        [
            host.input_ids,
            host.positions,
            host.token_slots,
            host.rows,
            host.seq_lens,
            host.new_lens,
            starts,
            host.table_index,
            host.table_slots,
            host.sample_tokens,
            host.sample_rows,
            host.sample_positions,
        ],
        slot_table.device,
    )
    forward = ForwardBatch(
        decode_reqs=host.decode_reqs,
        token_slots=token_slots,
        positions=positions,
        rows=rows,
        seq_lens=seq_lens.to(torch.int32),
        new_lens=new_lens.to(torch.int32),
        new_starts=new_starts.to(torch.int32),
        slot_table=slot_table,
        new_lens_host=host.new_lens.tolist(),
        seq_lens_host=host.seq_lens.tolist(),
    )
    return DeviceBatch(forward, input_ids, table_index, table_slots, SampleTensors(*samples))


def upload_table_update(host: HostBatch, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Only table_index and table_slots, both [n] i64."""
    table_index, table_slots = _to_device([host.table_index, host.table_slots], device)
    return table_index, table_slots


def upload_mask(mask: TokenMask, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """rows [constrained] i64 and words [constrained, words] i32, asynchronously."""
    return on_device(mask.rows, device), on_device(mask.words, device)


def _to_device(parts: list[Ints], device: torch.device) -> tuple[torch.Tensor, ...]:
    """One copy for all parts; see on_device."""
    packed = on_device(np.concatenate(parts), device)
    views: tuple[torch.Tensor, ...] = packed.split([len(part) for part in parts])
    return views
