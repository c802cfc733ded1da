"""Log-probabilities on the device: a few numbers of each row of logits, in one small tensor.

A packed row holds, all as f32 or the bits of i32:

    [ chosen token | listed ids | likeliest, descending | ids of the likeliest (i32) ]
      1              K            top                     top

What is computed takes bounded memory whatever the number of rows, and is copied to pinned memory
behind the work that made it: nothing waits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from sglang.srt.layers.on_device import on_device
from sglang.srt.logprobs import LogprobWish, TokenScores

# Logits at a time: 64 MiB in f32, and a second copy for the sum of their exponents.
_PIECE_ELEMENTS = 1 << 24


class PackedScores(NamedTuple):
    """Packed rows on the host, [n, 1 + K + 2 * top] f32; complete when their work is."""

    rows: torch.Tensor
    top: int

    def of(self, first: int, last: int, wish: LogprobWish) -> TokenScores:
        """Rows first..last-1, as much of them as the wish asks for."""
        rows = self.rows[first:last].numpy().copy()  # pinned memory is given back at once
        listed = rows.shape[1] - 1 - 2 * self.top
        top_at = 1 + listed
        ids_at = top_at + self.top
        return TokenScores(
            chosen=rows[:, 0],
            top_values=rows[:, top_at : top_at + wish.top],
            top_ids=rows[:, ids_at : ids_at + wish.top].view(np.int32),
            listed=rows[:, 1 : 1 + len(wish.token_ids or ())],
        )


@dataclass(frozen=True, slots=True)
class SampleScores:
    """Which of a batch's samples are to tell their log-probabilities; tensors on the device.

    rows [W] i64: their places in the batch, None if they are all of it. temperatures [W, 1] f32,
    1 for greedy ones. listed [W, K] i64 padded, None if nobody has any.
    """

    rows: torch.Tensor | None
    temperatures: torch.Tensor
    top: int
    listed: torch.Tensor | None

    @classmethod
    def of(
        cls,
        wishes: Sequence[LogprobWish | None],
        temperatures: Sequence[float],
        device: torch.device,
    ) -> SampleScores | None:
        """None if no wish is one. temperatures: what logits are divided by, 1 for greedy ones."""
        asked = {place: wish for place, wish in enumerate(wishes) if wish is not None}
        if not asked:
            return None
        places = tuple(asked)
        return cls(
            rows=None
            if len(asked) == len(wishes)
            else on_device(np.array(places, dtype=np.int64), device),
            temperatures=on_device(
                np.array([[temperatures[place]] for place in places], dtype=np.float32), device
            ),
            top=max(wish.top for wish in asked.values()),
            listed=_padded([wish.token_ids or [] for wish in asked.values()], device),
        )

    def compute(self, logits: torch.Tensor, tokens: torch.Tensor) -> PackedScores:
        """Of the chosen tokens [samples] i64, from the logits [samples, vocab_size] that they
        were chosen by, not yet divided by the temperature."""
        if self.rows is not None:
            tokens = tokens.index_select(0, self.rows)
        step = max(1, _PIECE_ELEMENTS // logits.shape[1])
        pieces = []
        for start in range(0, len(self.temperatures), step):
            span = slice(start, start + step)
            part = logits[span] if self.rows is None else logits.index_select(0, self.rows[span])
            listed = None if self.listed is None else self.listed[span]
            scaled = part.float() / self.temperatures[span]
            pieces.append(_packed(scaled, tokens[span], self.top, listed))
        return PackedScores(_to_host(torch.cat(pieces)), self.top)


def prompt_scores(
    logits_of: Callable[[torch.Tensor], torch.Tensor],
    first: int,
    next_ids: npt.NDArray[np.int64],
    wish: LogprobWish,
    vocab_size: int,
    device: torch.device,
) -> PackedScores:
    """Of prompt tokens, each from the logits at the token before it.

    logits_of: flattened token indices [n] i64 of the launch -> [n, vocab_size]. next_ids [n]: the
    tokens that follow the flattened tokens `first` and on.
    """
    targets = on_device(next_ids, device)
    indices = torch.arange(first, first + len(next_ids), device=device)
    listed = _padded([wish.token_ids or []], device)
    step = max(1, _PIECE_ELEMENTS // vocab_size)
    pieces = [
        _packed(logits_of(part).float(), ids, wish.top, listed)
        for part, ids in zip(indices.split(step), targets.split(step), strict=True)
    ]
    return PackedScores(_to_host(torch.cat(pieces)), wish.top)


def _packed(
    logits: torch.Tensor, tokens: torch.Tensor, top: int, listed: torch.Tensor | None
) -> torch.Tensor:
    """Of logits [n, vocab_size] f32 and tokens [n] i64; listed [n or 1, K] i64."""
    columns = [logits.gather(1, tokens[:, None])]
    if listed is not None:
        columns.append(logits.gather(1, listed.expand(len(logits), -1)))
    best = logits.topk(top, dim=-1) if top else None
    if best is not None:
        columns.append(best.values)
    rows = torch.cat(columns, dim=1) - logits.logsumexp(dim=-1, keepdim=True)
    if best is None:
        return rows
    return torch.cat([rows, best.indices.to(torch.int32).view(torch.float32)], dim=1)


def _padded(lists: Sequence[Sequence[int]], device: torch.device) -> torch.Tensor | None:
    """[lists, longest] i64, None if all are empty."""
    longest = max(map(len, lists))
    if not longest:
        return None
    padded = [[*ids, *[0] * (longest - len(ids))] for ids in lists]
    return on_device(np.array(padded, dtype=np.int64), device)


def _to_host(values: torch.Tensor) -> torch.Tensor:
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=values.is_cuda)
    return host.copy_(values, non_blocking=True)
