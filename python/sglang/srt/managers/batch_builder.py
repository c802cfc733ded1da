"""BatchBuilder: the integers of a launch, gathered from the requests that take part in it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from sglang.srt.layers.penalties import History
from sglang.srt.managers.jobs import Fill
from sglang.srt.mem_cache.sequence_cache import CachedSequence
from sglang.srt.mem_cache.slot_allocator import SlotIds
from sglang.srt.model_executor.host_batch import HostBatch, Ints, PromptPart, TokenMask
from sglang.srt.requests import Request

_Parts = list[npt.NDArray[Any]]


class BatchBuilder:
    """Sequences already have the slots of their new tokens, which are their last ones.

    A step of many requests is built for every token, so loops over them do one thing each.
    """

    def __init__(self, context_length: int) -> None:
        self._context_length = context_length

    def step(
        self, members: Sequence[Request], fills: Sequence[Fill], new_slots: SlotIds | None = None
    ) -> HostBatch:
        """A launch in which `members` decode and `fills` are computed, in this order.

        new_slots [members] i32: of the members' new tokens; looked up if not given.
        """
        decode_reqs = len(members)
        requests = [*members, *[fill.request for fill in fills]]
        held = [request.sequence for request in requests]
        assert None not in held, "a request without slots is launched"
        sequences = cast("list[CachedSequence]", held)
        rows = _ints([request.row for request in requests])
        seq_lens = _ints([sequence.length for sequence in sequences])
        new_lens = _ints([1] * decode_reqs + [fill.tokens for fill in fills])

        prompts = [fill.request.tokens()[fill.start : fill.end] for fill in fills]
        positions: _Parts = [seq_lens[:decode_reqs] - 1]
        positions += [np.arange(fill.start, fill.end) for fill in fills]
        token_slots: _Parts = [sequence.slots[-1:] for sequence in sequences[:decode_reqs]]
        if new_slots is not None:
            token_slots = [new_slots]
        token_slots += [sequence_of(fill.request).slots[fill.start :] for fill in fills]

        # The slot table gets the new tokens, and what changed before them: a prefix that was in
        # the cache, or slots that were given up for those of the prefix tree.
        table_index: _Parts = [_join(positions) + np.repeat(rows, new_lens) * self._context_length]
        table_slots = [*token_slots]
        table_valid = _ints([request.table_valid for request in requests])
        for i in np.flatnonzero(table_valid < seq_lens - new_lens):
            stale = slice(table_valid[i], seq_lens[i] - new_lens[i])
            table_index.append(np.arange(stale.start, stale.stop) + rows[i] * self._context_length)
            table_slots.append(sequences[i].slots[stale])
        for request, sequence in zip(requests, sequences, strict=True):
            request.table_valid = sequence.length

        sampled = [*range(decode_reqs)]
        sampled += [i for i, fill in enumerate(fills, decode_reqs) if fill.samples]
        return HostBatch(
            decode_reqs=decode_reqs,
            input_ids=_join(prompts),
            positions=_join(positions),
            token_slots=_join(token_slots),
            rows=rows,
            seq_lens=seq_lens,
            new_lens=new_lens,
            table_index=_join(table_index),
            table_slots=_join(table_slots),
            samples=tuple([requests[i].wish for i in sampled]),
            sample_tokens=(np.cumsum(new_lens) - 1)[sampled],
            sample_rows=rows[sampled],
            mask=_mask([requests[i] for i in sampled]),
            scored=_scored(decode_reqs, fills),
            histories=tuple(
                [
                    _history(fill.request)
                    for fill in fills
                    if fill.samples and fill.request.sampling.penalises
                ]
            ),
        )


def _scored(decode_reqs: int, fills: Sequence[Fill]) -> tuple[PromptPart, ...]:
    parts = []
    begin = decode_reqs
    for fill in fills:
        wish = fill.request.wish.logprobs
        if fill.scored:
            assert wish is not None, f"{fill.request.rid} wants no log-probabilities"
            next_ids = fill.request.prompt[fill.scored.start + 1 : fill.scored.stop + 1]
            first = begin + fill.scored.start - fill.start
            parts.append(PromptPart(first, next_ids.astype(np.int64), wish))
        begin += fill.tokens
    return tuple(parts)


def _history(request: Request) -> History:
    output = np.array(request.output, dtype=np.int64)
    return History(request.wish, request.prompt.astype(np.int64), output)


def sequence_of(request: Request) -> CachedSequence:
    assert request.sequence is not None, f"{request.rid} holds no sequence"
    return request.sequence


def row_of(request: Request) -> int:
    assert request.row is not None, f"{request.rid} holds no row"
    return request.row


def _mask(sampled: Sequence[Request]) -> TokenMask | None:
    rows = [i for i, request in enumerate(sampled) if request.constraint is not None]
    if not rows:
        return None
    words = []
    for i in rows:
        constraint = sampled[i].constraint
        assert constraint is not None
        words.append(constraint.allowed(len(sampled[i].output)))
    return TokenMask(_ints(rows), np.stack(words))


def _ints(values: Sequence[int | None]) -> Ints:
    return np.array(values, dtype=np.int64)


def _join(parts: _Parts) -> Ints:
    if not parts:
        return np.empty(0, dtype=np.int64)
    return np.concatenate(parts, dtype=np.int64)
