"""Penalties for tokens that a request has had: counts on the device, kept up as tokens are chosen.

The next step is launched before the host has seen the last token, so that only the device can
count. Each penalised request has a line of a table: for every token of the vocabulary how often it
is in the output, and IN_PROMPT if it is in the prompt. Whoever fills the request's prompt, again
after a retraction, writes the line anew; each sample adds to it.

Lines lie in blocks that are taken when needed and given back when nobody uses them. A block's
tensor never moves, for lanes of either phase may be at work on lines of it.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from sglang.srt.layers.on_device import on_device
from sglang.srt.sampling_params import SamplingParams

IN_PROMPT = 1 << 30
BLOCK_LINES = 16


class History(NamedTuple):
    """What a penalised request consists of when it is to have its next token: ids [n] i64."""

    owner: Hashable
    prompt: npt.NDArray[np.int64]
    output: npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class _Block:
    counts: torch.Tensor  # [BLOCK_LINES, vocab_size] i32
    free: list[int]


@dataclass(frozen=True, slots=True)
class PenalisedRows:
    """Rows of a batch whose counts lie in one block; tensors on the device.

    rows [R] i64: of the batch; lines [R] i64: of counts, where they lie. frequency, presence,
    repetition [R, 1] f32.
    """

    counts: torch.Tensor
    rows: torch.Tensor
    lines: torch.Tensor
    frequency: torch.Tensor
    presence: torch.Tensor
    repetition: torch.Tensor

    def apply(self, logits: torch.Tensor) -> None:
        """Changes its rows of logits [B, vocab_size] f32.

        First what the output has is made less by its penalties, then repeated tokens of prompt
        and output by theirs, which divides what is positive and multiplies what is negative.
        """
        had = self.counts.index_select(0, self.lines)
        times = had & (IN_PROMPT - 1)
        mine = logits.index_select(0, self.rows)
        mine -= self.frequency * times
        mine -= self.presence * (times > 0)
        scaled = torch.where(mine > 0, mine / self.repetition, mine * self.repetition)
        logits.index_copy_(0, self.rows, torch.where(had > 0, scaled, mine))

    def count(self, tokens: torch.Tensor) -> None:
        """Adds the tokens chosen for the batch, [B] i64."""
        self.counts[self.lines, tokens.index_select(0, self.rows)] += 1


class PenaltyTable:
    """Where each request's counts lie. `take` and `forget` belong to the engine thread, the rest
    to lanes, which see only requests that have been taken."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._device = device
        self._blocks: list[_Block] = []
        self._lines: dict[Hashable, tuple[_Block, int]] = {}

    @property
    def num_blocks(self) -> int:
        return len(self._blocks)

    def take(self, owner: Hashable) -> None:
        """Gives it a line, whose contents are not defined yet, unless it has one."""
        if owner in self._lines:
            return
        block = next((block for block in self._blocks if block.free), None)
        if block is None:
            shape = (BLOCK_LINES, self._vocab_size)
            # Not filled: this thread's stream is in no order with those of the lanes.
            counts = torch.empty(shape, dtype=torch.int32, device=self._device)
            block = _Block(counts, list(range(BLOCK_LINES)))
            self._blocks.append(block)
        self._lines[owner] = block, block.free.pop()

    def forget(self, owner: Hashable) -> None:
        """Nothing that was launched reads its line any more, if it ever had one."""
        block, line = self._lines.pop(owner, (None, 0))
        if block is None:
            return
        block.free.append(line)
        if len(block.free) == BLOCK_LINES:
            self._blocks.remove(block)

    def begin(self, history: History) -> None:
        """Writes a line anew."""
        block, line = self._lines[history.owner]
        counts = block.counts[line]
        counts.zero_()
        counts.index_fill_(0, self._upload(history.prompt), IN_PROMPT)
        output = self._upload(history.output)
        counts.index_add_(0, output, torch.ones_like(output, dtype=torch.int32))

    def rows_of(
        self, owners: Sequence[Hashable], params: Sequence[SamplingParams]
    ) -> tuple[PenalisedRows, ...]:
        """For a batch in which row i is owners[i], with the parameters params[i]."""
        by_block: dict[int, list[int]] = {}
        for row, (owner, wish) in enumerate(zip(owners, params, strict=True)):
            if wish.penalises:
                by_block.setdefault(id(self._lines[owner][0]), []).append(row)
        return tuple(
            PenalisedRows(
                counts=self._lines[owners[rows[0]]][0].counts,
                rows=self._upload(np.array(rows)),
                lines=self._upload(np.array([self._lines[owners[row]][1] for row in rows])),
                frequency=self._column([params[row].frequency_penalty for row in rows]),
                presence=self._column([params[row].presence_penalty for row in rows]),
                repetition=self._column([params[row].repetition_penalty for row in rows]),
            )
            for rows in by_block.values()
        )

    def _column(self, values: Sequence[float]) -> torch.Tensor:
        return on_device(np.array(values, dtype=np.float32)[:, None], self._device)

    def _upload(self, ids: npt.NDArray[np.int64]) -> torch.Tensor:
        return on_device(ids, self._device)
