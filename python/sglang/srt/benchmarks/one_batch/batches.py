"""Batches of given shape whose tokens lie at random places of the KV pool.

Rows and slots on the device:

    rows   [ 0 padding | decode requests | prefill requests ]
    slots  pages in random order: decode takes them from the front, prefill from the back

so that a decode and a prefill case can run at the same time if the pool holds both, and share the
middle if it does not and they run in turn.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from sglang.srt.benchmarks.one_batch.cases import DecodeCase, PrefillCase
from sglang.srt.model_executor.host_batch import HostBatch, Ints, SampleWish
from sglang.srt.sampling_params import SamplingParams

# One object for all requests: batches of equal wishes are sampled as they are in serving.
GREEDY = SamplingParams(temperature=0.0, ignore_eos=True)


@dataclass(frozen=True, slots=True)
class PlacedRequests:
    """Requests whose slots are in the device's table: rows [reqs], slots [reqs, length] i64."""

    rows: Ints
    slots: Ints
    table_width: int

    def step(self, length: int) -> HostBatch:
        """The decode step that computes token length-1 of every request."""
        requests = len(self.rows)
        empty: Ints = np.empty(0, dtype=np.int64)
        return self._batch(length - 1, length, empty, np.arange(requests), requests)

    def fill(self, first: int, last: int, input_ids: Ints) -> HostBatch:
        """The prefill of tokens first..last-1 of every request; input_ids [reqs * new]."""
        ends = np.arange(1, len(self.rows) + 1) * (last - first) - 1
        return self._batch(first, last, input_ids, ends, decode_reqs=0)

    def _batch(
        self,
        first: int,
        last: int,
        input_ids: Ints,
        sample_tokens: npt.NDArray[np.int64],
        decode_reqs: int,
    ) -> HostBatch:
        requests = len(self.rows)
        positions = np.arange(first, last)
        new_slots = self.slots[:, first:last].reshape(-1)
        return HostBatch(
            decode_reqs=decode_reqs,
            input_ids=input_ids,
            positions=np.tile(positions, requests),
            token_slots=new_slots,
            rows=self.rows,
            seq_lens=np.full(requests, last),
            new_lens=np.full(requests, last - first),
            table_index=(self.rows[:, None] * self.table_width + positions).reshape(-1),
            table_slots=new_slots,
            samples=tuple(SampleWish(GREEDY, seed=int(row)) for row in self.rows),
            sample_tokens=sample_tokens,
            sample_rows=self.rows,
        )


class Placement:
    """Gives cases their rows and slots and writes them to `slot_table` [rows, width] i32.

    num_slots: of the pool, the scratch page included. decode_rows: kept for decode requests.
    Only while no launched work reads the table.
    """

    def __init__(
        self,
        slot_table: torch.Tensor,
        *,
        num_slots: int,
        page_size: int,
        decode_rows: int,
        vocab_size: int,
        seed: int,
    ) -> None:
        self._slot_table = slot_table
        self._page_size = page_size
        self._first_prefill_row = 1 + decode_rows
        self._vocab_size = vocab_size
        self._rng = np.random.default_rng(seed)
        self._pages = 1 + self._rng.permutation(num_slots // page_size - 1)

    def decode(self, case: DecodeCase) -> HostBatch:
        """A step that may be repeated: it computes the last of the case's tokens anew."""
        return self._place(case.requests, case.length, 1, self._pages).step(case.length)

    def prefill(self, case: PrefillCase) -> HostBatch:
        """A prefill that may be repeated."""
        placed = self._place(case.requests, case.length, self._first_prefill_row, self._pages[::-1])
        return placed.fill(
            case.cached_tokens, case.length, self.draw_ids(case.requests * case.new_tokens)
        )

    def sequences(self, requests: int, length: int) -> PlacedRequests:
        """Requests to be prefilled and decoded, on the rows of decode."""
        return self._place(requests, length, 1, self._pages)

    def draw_ids(self, count: int) -> Ints:
        return self._rng.integers(0, self._vocab_size, size=count)

    def _place(
        self, requests: int, length: int, first_row: int, pages: npt.NDArray[np.int64]
    ) -> PlacedRequests:
        each = -(-length // self._page_size)
        mine = pages[: requests * each].reshape(requests, each, 1)
        slots = mine * self._page_size + np.arange(self._page_size)
        slots = slots.reshape(requests, -1)[:, :length]
        rows = np.arange(first_row, first_row + requests)
        table = self._slot_table
        table[first_row : first_row + requests, :length] = torch.from_numpy(slots).to(table)
        if table.is_cuda:
            torch.cuda.synchronize(table.device)
        return PlacedRequests(rows, slots, table.shape[1])
