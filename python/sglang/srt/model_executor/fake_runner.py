"""FakeRunner: a Runner without a model, whose work takes virtual time.

It keeps what a device keeps: the slot table, the relay table, and for every slot a record of what
was computed there. Launches are applied in their order, which is the order in which a device may
run them, and each one checks what it reads when it starts, at every slice and when its tokens are
taken: a slot that was given away too early, a stale line of the table, a wrong position or a
prefix that is not computed yet fails there.

The next token is a function of the records of the whole prefix, so that whatever the checks miss
changes the answer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from drift_scheduler.lane import Lane, Work
from drift_scheduler.lane_virtual import TimedWork
from sglang.srt.logprobs import NO_SCORES, BatchScores, LogprobWish, TokenScores
from sglang.srt.model_executor.host_batch import HostBatch, SampleWish, TokenMask

# Seconds that so many layers of a batch take on a lane.
Cost = Callable[[HostBatch, int, Lane], float]
# The token that follows a prefix, given its hash.
# (hash of the sequence so far, how to choose, position of the token to be chosen) -> token
Choose = Callable[[int, SampleWish, int], int]

_HASH_MODULUS = 2**31 - 1
_HASH_FACTOR = 48271


def prefix_hash(tokens: Sequence[int], before: int = 0) -> int:
    """Hash of a token sequence; `before` is the hash of what precedes it."""
    for token in tokens:
        before = (before * _HASH_FACTOR + token + 1) % _HASH_MODULUS
    return before


def choose_by_hash(vocab_size: int) -> Choose:
    """Any token of the vocabulary, withheld ones passed over."""

    def choose(hash_of_prefix: int, wish: SampleWish, position: int) -> int:
        withheld = wish.withheld_ids if position < wish.withheld_until else ()
        for step in range(vocab_size):
            token = (hash_of_prefix + step) % vocab_size
            if token not in withheld:
                return token
        raise AssertionError(f"all {vocab_size} tokens are withheld")

    return choose


def logprob_by_hash(hash_of_prefix: int, token: int) -> float:
    """What the fake device says of a token behind a prefix."""
    return -((hash_of_prefix + 31 * token) % 997) / 128


def scores_by_hash(hashes: Sequence[int], tokens: Sequence[int], wish: LogprobWish) -> TokenScores:
    """Of each token behind the prefix of that hash; the "likeliest" are 0, 1, 2, ..."""
    top, listed = range(wish.top), wish.token_ids or []

    def rows(ids: Sequence[int]) -> npt.NDArray[np.float32]:
        values = [[logprob_by_hash(before, token) for token in ids] for before in hashes]
        return np.array(values, np.float32).reshape(len(hashes), len(ids))

    return TokenScores(
        chosen=np.array(list(map(logprob_by_hash, hashes, tokens)), np.float32),
        top_values=rows(top),
        top_ids=np.tile(np.arange(wish.top, dtype=np.int32), (len(hashes), 1)),
        listed=rows(listed),
    )


def cost_by_tokens(batch: HostBatch, layers: int, lane: Lane) -> float:
    """A launch has a fixed part and one for each token, divided among the lane's SMs."""
    return layers * (20e-6 + 4e-6 * len(batch.token_slots)) / lane.sms


@dataclass(frozen=True, slots=True)
class _Part:
    """One request's part of a batch. slots [seq_len] i32 are those of the launch."""

    row: int
    slots: npt.NDArray[np.int32]
    new: slice
    cached_len: int


class FakeRunner:
    """See the module. Launches must stay inside num_slots, num_rows and context_length."""

    def __init__(
        self,
        *,
        num_layers: int,
        num_slots: int,
        num_rows: int,
        context_length: int,
        choose: Choose,
        cost: Cost = cost_by_tokens,
    ) -> None:
        self._num_layers = num_layers
        self.choose = choose
        self.cost = cost
        self.slot_table = np.zeros((num_rows, context_length), dtype=np.int32)
        self.relay = np.zeros(num_rows, dtype=np.int64)
        self.slot_tokens = np.zeros(num_slots, dtype=np.int64)
        self.slot_positions = np.full(num_slots, -1, dtype=np.int64)
        self.slot_hashes = np.zeros(num_slots, dtype=np.int64)
        self.slot_layers = np.zeros(num_slots, dtype=np.int64)  # layers computed
        self.launched: list[HostBatch] = []

    @property
    def num_layers(self) -> int:
        return self._num_layers

    def start(self, batch: HostBatch) -> FakeRun:
        return FakeRun(self, batch)

    def forget(self, wish: SampleWish) -> None:
        """Its tokens follow from the prefix alone."""


class FakeRun:
    """One batch. Slices must come in order and without gaps."""

    indivisible = False

    def __init__(self, runner: FakeRunner, batch: HostBatch) -> None:
        self._runner = runner
        self._batch = batch
        self._parts: list[_Part] = []
        self._layers_launched = 0
        self._tokens: list[int] = []
        self._scores = NO_SCORES

    def slice_work(self, lane: Lane, first: int, last: int) -> Work:
        runner, batch = self._runner, self._batch
        assert first == self._layers_launched < last <= runner.num_layers, (
            f"slice {first}..{last} after {self._layers_launched} of {runner.num_layers} layers"
        )
        if first == 0:
            runner.launched.append(batch)
            self._begin()
        self._check(layers_of_new=first)
        runner.slot_layers[batch.token_slots] = last
        self._layers_launched = last
        if last == runner.num_layers:
            self._sample()
        return TimedWork(runner.cost(batch, last - first, lane))

    def tokens(self) -> list[int]:
        self._check(layers_of_new=self._runner.num_layers)
        return self._tokens

    def scores(self) -> BatchScores:
        return self._scores

    def _begin(self) -> None:
        """Brings the slot table up to date and writes the records of the new tokens."""
        runner, batch = self._runner, self._batch
        width = runner.slot_table.shape[1]
        foreign = set((batch.table_index // width).tolist()) - set(batch.rows.tolist())
        assert not foreign, f"the launch writes rows {foreign} of the slot table, which it lacks"
        runner.slot_table.reshape(-1)[batch.table_index] = batch.table_slots
        decoding = batch.rows[: batch.decode_reqs]
        ids = np.concatenate([runner.relay[decoding], batch.input_ids])
        assert len(ids) == len(batch.token_slots) == len(batch.positions) == batch.new_lens.sum()
        assert _distinct(batch.rows), f"a row occurs twice: {batch.rows}"
        assert _distinct(batch.token_slots), f"two tokens in one slot: {batch.token_slots}"
        assert batch.rows.min() > 0 and batch.token_slots.min() > 0, "scratch is used for a request"
        start = 0
        for row, seq_len, new_len in zip(batch.rows, batch.seq_lens, batch.new_lens, strict=True):
            new = slice(start, start + int(new_len))
            start = new.stop
            slots = runner.slot_table[row, :seq_len].copy()
            cached_len = int(seq_len - new_len)
            self._parts.append(_Part(int(row), slots, new, cached_len))
            assert np.array_equal(batch.token_slots[new], slots[cached_len:]), (
                f"row {row} stores at {batch.token_slots[new]}, its table says {slots[cached_len:]}"
            )
            assert np.array_equal(batch.positions[new], np.arange(cached_len, seq_len)), (
                f"row {row} of {seq_len} tokens, {new_len} new: positions {batch.positions[new]}"
            )
            before = int(runner.slot_hashes[slots[cached_len - 1]]) if cached_len else 0
            for slot, token in zip(slots[cached_len:], ids[new].tolist(), strict=True):
                before = prefix_hash([token], before)
                runner.slot_hashes[slot] = before
        runner.slot_tokens[batch.token_slots] = ids
        runner.slot_positions[batch.token_slots] = batch.positions
        runner.slot_layers[batch.token_slots] = 0

    def _check(self, layers_of_new: int) -> None:
        """Asserts that every slot read still holds its token behind the right prefix."""
        runner = self._runner
        for part in self._parts:
            row, slots, cached_len = part.row, part.slots, part.cached_len
            assert np.array_equal(runner.slot_table[row, : len(slots)], slots), (
                f"row {row} of the slot table changed under a launch"
            )
            positions = runner.slot_positions[slots]
            assert np.array_equal(positions, np.arange(len(slots))), (
                f"row {row} reads tokens of positions {positions}"
            )
            hashes = runner.slot_hashes[slots]
            before = np.concatenate(([0], hashes[:-1]))
            chained = (before * _HASH_FACTOR + runner.slot_tokens[slots] + 1) % _HASH_MODULUS
            assert np.array_equal(hashes, chained), f"row {row} reads a mix of two sequences"
            layers = runner.slot_layers[slots]
            assert (layers[:cached_len] == runner.num_layers).all(), (
                f"row {row} reads a prefix of which {layers[:cached_len].min()} layers are computed"
            )
            assert (layers[cached_len:] == layers_of_new).all(), (
                f"row {row}: {layers[cached_len:]} layers computed, {layers_of_new} launched"
            )

    def _sample(self) -> None:
        runner, batch = self._runner, self._batch
        allowed = _allowed_tokens(batch.mask)
        hashes = runner.slot_hashes[batch.token_slots]
        samples: dict[int, TokenScores] = {}
        for i, (wish, token_index, position) in enumerate(
            zip(batch.samples, batch.sample_tokens, batch.sample_positions, strict=True)
        ):
            hash_of_prefix = int(hashes[token_index])
            token = runner.choose(hash_of_prefix, wish, int(position))
            if i in allowed:
                token = allowed[i][token % len(allowed[i])]
            self._tokens.append(token)
            if wish.logprobs is not None:
                samples[i] = scores_by_hash([hash_of_prefix], [token], wish.logprobs)
        prompts = []
        for first, next_ids, asked in batch.scored:
            before = hashes[first : first + len(next_ids)].tolist()
            prompts.append(scores_by_hash(before, next_ids.tolist(), asked))
        self._scores = BatchScores(samples, prompts)
        runner.relay[batch.sample_rows] = self._tokens


def _allowed_tokens(mask: TokenMask | None) -> dict[int, list[int]]:
    """By sample, for those that the mask names."""
    if mask is None:
        return {}
    bits = np.unpackbits(mask.words.view(np.uint8), axis=1, bitorder="little")
    tokens = [np.flatnonzero(row).tolist() for row in bits]
    return dict(zip(mask.rows.tolist(), tokens, strict=True))


def _distinct(values: npt.NDArray[np.int64]) -> bool:
    return len(np.unique(values)) == len(values)
