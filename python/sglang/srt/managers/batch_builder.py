"""BatchBuilder: the integers of a launch, gathered from the requests that take part in it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from sglang.srt.managers.jobs import Fill
from sglang.srt.mem_cache.sequence_cache import CachedSequence
from sglang.srt.model_executor.host_batch import HostBatch, Ints, SampleRow
from sglang.srt.requests import Request


class BatchBuilder:
    """Sequences already have the slots of their new tokens, which are their last ones."""

    def __init__(self, context_length: int) -> None:
        self._context_length = context_length

    def prefill(self, fills: Sequence[Fill]) -> HostBatch:
        last_tokens = np.cumsum([fill.end - fill.start for fill in fills]) - 1
        sampled = [i for i, fill in enumerate(fills) if fill.samples]
        requests = [fill.request for fill in fills]
        input_ids = [fill.request.tokens()[fill.start : fill.end] for fill in fills]
        for i in sampled:
            requests[i].launched_output += 1
        return self._build(
            requests,
            new_lens=[fill.end - fill.start for fill in fills],
            input_ids=np.concatenate(input_ids),
            sampled=sampled,
            sample_tokens=last_tokens[sampled],
            decode_reqs=0,
        )

    def decode(self, members: Sequence[Request]) -> HostBatch:
        everyone = list(range(len(members)))
        return self._build(
            members,
            new_lens=[1] * len(members),
            input_ids=np.empty(0, dtype=np.int64),
            sampled=everyone,
            sample_tokens=np.asarray(everyone),
            decode_reqs=len(members),
        )

    def _build(
        self,
        requests: Sequence[Request],
        *,
        new_lens: Sequence[int],
        input_ids: npt.NDArray[Any],
        sampled: Sequence[int],
        sample_tokens: npt.NDArray[Any],
        decode_reqs: int,
    ) -> HostBatch:
        positions, token_slots, table_index, table_slots = [], [], [], []
        width = self._context_length
        for request, count in zip(requests, new_lens, strict=True):
            slots = sequence_of(request).slots
            length = len(slots)
            positions.append(np.arange(length - count, length))
            token_slots.append(slots[length - count :])
            table_index.append(np.arange(request.table_valid, length) + row_of(request) * width)
            table_slots.append(slots[request.table_valid :])
            request.table_valid = length
        rows = [row_of(request) for request in requests]
        samples = tuple(
            SampleRow(
                sampling=requests[i].sampling,
                seed=requests[i].seed,
                position=sequence_of(requests[i]).length,
                withheld_ids=requests[i].stop_ids if requests[i].sampling.min_new_tokens else (),
                withheld_until=len(requests[i].prompt) + requests[i].sampling.min_new_tokens,
            )
            for i in sampled
        )
        return HostBatch(
            decode_reqs=decode_reqs,
            input_ids=_i64(input_ids),
            positions=_i64(np.concatenate(positions)),
            token_slots=_i64(np.concatenate(token_slots)),
            rows=_i64(np.asarray(rows)),
            seq_lens=_i64(np.asarray([sequence_of(request).length for request in requests])),
            new_lens=_i64(np.asarray(new_lens)),
            table_index=_i64(np.concatenate(table_index)),
            table_slots=_i64(np.concatenate(table_slots)),
            samples=samples,
            sample_tokens=_i64(sample_tokens),
            sample_rows=_i64(np.asarray([rows[i] for i in sampled])),
        )


def sequence_of(request: Request) -> CachedSequence:
    assert request.sequence is not None, f"{request.rid} holds no sequence"
    return request.sequence


def row_of(request: Request) -> int:
    assert request.row is not None, f"{request.rid} holds no row"
    return request.row


def _i64(values: npt.NDArray[Any]) -> Ints:
    return values.astype(np.int64, copy=False)
