"""Prefill through FlashInfer, in two ways that do the same.

LanePrefill    Hopper: its SM90 kernels with work lists of ours, made for the lane's SM count
WrapperPrefill every other GPU, and versions of FlashInfer that we cannot call directly
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from sglang.srt.layers.attention.base import KVPool
from sglang.srt.layers.attention.flashinfer_module import (
    DeviceWork,
    Fa3Module,
    tile_rows,
    upload,
)
from sglang.srt.layers.attention.flashinfer_plan import Heads, PrefillShape, deal, max_items, pack
from sglang.srt.model_config import ModelConfig

_MAX_I32 = 2**31 - 1


@dataclass(frozen=True, slots=True)
class PrefillRequests:
    """The requests of a batch that prefill; host lists but rows [reqs] i64 and slot_table.

    Their new tokens are rows first_token.. of the tensors that attend() gets, one request after
    the other.
    """

    rows: torch.Tensor
    new_lens: list[int]
    seq_lens: list[int]
    slot_table: torch.Tensor
    first_token: int = 0


class Prefill(Protocol):
    def plan(self, requests: PrefillRequests) -> None:
        """Called on the lane's stream before the first layer; reads the device nowhere."""
        ...

    def attend(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor
    ) -> None:
        """Writes the requests' rows of out. q, out [tokens, q_heads, head_dim] contiguous; k, v of
        the new tokens [tokens, kv_heads, head_dim], which lie in the pool too."""
        ...


class LanePrefill:
    """Work lists belong to the plan, or to the object once memory for them is reserved: there is
    no workspace, and lanes share nothing.

    A batch without cached tokens takes keys and values straight from the projection, through TMA;
    with cached ones they are gathered from the pool, their slots read in the slot table itself.

    Without cached tokens the last keys of a request share a tile with the first of the next one,
    at weight 0: where a request's values are not finite, its neighbour's results are not either.
    """

    def __init__(
        self, kv_pool: KVPool, config: ModelConfig, num_sms: int, module: Fa3Module
    ) -> None:
        keys, _ = kv_pool.layer(0)
        self._kv_pool = kv_pool
        self._heads = Heads(
            config.num_heads, config.num_kv_heads, 2 * config.head_dim * keys.itemsize
        )
        self._tile_rows = tile_rows(config.head_dim)
        self._num_sms = num_sms
        self._device = keys.device
        self._device_sms = torch.cuda.get_device_properties(keys.device).multi_processor_count
        self._module = module
        self._work: DeviceWork | None = None
        self._slots: torch.Tensor | None = None  # None: no request has cached tokens
        self._reserved: torch.Tensor | None = None
        self._capacity = 0

    def reserve(self, max_tokens: int, max_reqs: int) -> None:
        """From now on launches of any planned batch within these bounds take the same arguments,
        so that a graph of them serves all; keys are always read in the pool."""
        self._capacity = max_items(max_tokens, max_reqs, self._heads.num_heads, self._tile_rows)
        nothing = deal(
            PrefillShape([], [], []),
            self._heads,
            tile_rows=self._tile_rows,
            num_sms=self._num_sms,
            num_ctas=self._device_sms,
        )
        packed = pack(nothing, self._capacity)
        self._reserved = torch.zeros(len(packed.ints), dtype=torch.int32, device=self._device)

    def plan(self, requests: PrefillRequests) -> None:
        """See Prefill.plan. Under 1 ms for 8,192 tokens of 32 heads, most of it dealing."""
        ragged = self._reserved is None and requests.new_lens == requests.seq_lens
        first = requests.first_token
        kv_starts = [0] * len(requests.new_lens)
        if ragged:
            kv_starts = [first + start for start in _starts(requests.new_lens)]
        packed = pack(
            deal(
                PrefillShape(requests.new_lens, requests.seq_lens, kv_starts, first),
                self._heads,
                tile_rows=self._tile_rows,
                num_sms=self._num_sms,
                num_ctas=self._device_sms,
            ),
            self._capacity,
        )
        work = upload(packed, self._device if self._reserved is None else self._reserved)
        self._work, self._slots = work, None
        if ragged:
            return
        table = requests.slot_table
        assert table.numel() <= _MAX_I32, "the kernel finds slots through 32-bit offsets"
        # The host does not know the requests' rows; the device fills in where their slots start.
        starts = (requests.rows * table.stride(0)).to(torch.int32)
        torch.index_select(starts, 0, work.ints[packed.requests], out=work.ints[packed.kv_starts])
        self._slots = table.view(-1)

    def attend(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor
    ) -> None:
        """See Prefill.attend."""
        assert self._work is not None, "plan() must be called before attend()"
        if self._slots is None:
            self._module.ragged(self._work, q, k, v, out)
            return
        keys, values = self._kv_pool.layer(layer)
        self._module.paged(self._work, q, keys, values, self._slots, out)


class WrapperPrefill:
    """FlashInfer's public wrapper for paged prefill.

    workspace [bytes] u8 may be shared by lanes that never run at the same time.
    """

    def __init__(
        self, kv_pool: KVPool, config: ModelConfig, workspace: torch.Tensor, backend: str
    ) -> None:
        """backend: FlashInfer's name of the kernels, fa2 or fa3."""
        prefill = importlib.import_module("flashinfer.prefill")
        self._wrapper: Any = prefill.BatchPrefillWithPagedKVCacheWrapper(
            workspace, "NHD", backend=backend
        )
        self._kv_pool = kv_pool
        self._config = config
        self._plan_copied = torch.cuda.Event()
        self._first_token = 0

    def plan(self, requests: PrefillRequests) -> None:
        """See Prefill.plan."""
        # The wrapper has one pinned buffer for all its plans, and writes to it at once.
        self._plan_copied.synchronize()
        self._first_token = requests.first_token
        config = self._config
        self._wrapper.plan(
            _pinned([*_starts(requests.new_lens), sum(requests.new_lens)]),
            _pinned([*_starts(requests.seq_lens), sum(requests.seq_lens)]),
            self._slots(requests),
            _pinned([1] * len(requests.seq_lens)),  # tokens in the last page, of one token each
            config.num_heads,
            config.num_kv_heads,
            config.head_dim,
            1,
            causal=True,
            q_data_type=config.dtype,
            kv_data_type=config.dtype,
            non_blocking=True,
        )
        self._plan_copied.record()

    def attend(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor
    ) -> None:
        """See Prefill.attend."""
        keys, values = self._kv_pool.layer(layer)
        first = self._first_token
        self._wrapper.run(q[first:], (keys.unsqueeze(1), values.unsqueeze(1)), out=out[first:])

    def _slots(self, requests: PrefillRequests) -> torch.Tensor:
        """Slots of all requests' tokens, one request after the other [tokens] i32."""
        table = requests.slot_table
        total = sum(requests.seq_lens)
        starts, lengths = (
            _pinned(ints).to(table.device, non_blocking=True)
            for ints in (_starts(requests.seq_lens), requests.seq_lens)
        )
        shift = requests.rows * table.stride(0) - starts
        place = torch.repeat_interleave(shift, lengths, output_size=total)
        place += torch.arange(total, device=table.device)
        return table.view(-1).index_select(0, place)


def _starts(lengths: Sequence[int]) -> list[int]:
    """Where each run begins if they follow one another."""
    ends = np.cumsum(lengths)
    starts: list[int] = (ends - lengths).tolist()
    return starts


def _pinned(ints: Sequence[int]) -> torch.Tensor:
    """[n] i32 on the host, from where a copy does not wait."""
    return torch.tensor(ints, dtype=torch.int32).pin_memory()
