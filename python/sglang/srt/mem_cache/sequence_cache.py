"""SequenceCache: who owns the slots of one request from its admission to its end.

A sequence is opened on the longest cached prefix, extended as tokens are computed, published so
that others can share what is computed, and closed. At any time its slots are

    [ the tree's, locked for this sequence | its own        ]
    0                              shared_len              length

and each verb keeps that line, so that no caller handles locks or frees slots by hand.

The verbs change the account on the host only. `publish`, `close` and `discard` give slots back
at once: call them when no launched work may still read or write the sequence's slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from sglang.srt.mem_cache.radix_cache import Node, RadixCache, TokenIds
from sglang.srt.mem_cache.slot_allocator import SlotAllocator, SlotIds

_MIN_CAPACITY = 64


@dataclass(eq=False, slots=True)
class CachedSequence:
    """The slots of one open request. Only SequenceCache changes it.

    cached_len: tokens reused when it was opened; it does not change afterwards.
    shared_len: leading tokens whose slots the tree owns, a multiple of the page size.
    length: tokens that have a slot.
    """

    namespace: str
    cached_len: int
    shared_len: int
    length: int
    _node: Node = field(repr=False)
    _buffer: SlotIds = field(repr=False)

    @property
    def slots(self) -> SlotIds:
        """[length] i32, a view that holds until the next verb; copy it to keep it."""
        return self._buffer[: self.length]

    @property
    def last_slot(self) -> int | None:
        """Slot of the last token, None while there is none."""
        return int(self._buffer[self.length - 1]) if self.length else None

    def _append(self, slots: SlotIds) -> None:
        end = self.length + len(slots)
        if end > len(self._buffer):
            grown = np.empty(max(end, 2 * len(self._buffer), _MIN_CAPACITY), dtype=np.int32)
            grown[: self.length] = self.slots
            self._buffer = grown
        self._buffer[self.length : end] = slots
        self.length = end


class SequenceCache:
    """Opens, extends, publishes and closes sequences over one prefix tree and one allocator.

    `radix` must free into `allocator`.
    """

    def __init__(self, radix: RadixCache, allocator: SlotAllocator) -> None:
        if radix.page_size != allocator.page_size:
            raise ValueError(
                f"page size {radix.page_size} of the tree, {allocator.page_size} of the allocator"
            )
        self.radix = radix
        self.allocator = allocator
        self._open: set[CachedSequence] = set()

    @property
    def available_tokens(self) -> int:
        """Slots that `extend` can reach: free ones and those it may evict."""
        return self.allocator.available + self.radix.evictable

    @property
    def num_open(self) -> int:
        return len(self._open)

    @property
    def in_flight_slots(self) -> int:
        """Slots in the pages that open sequences own themselves, rounded up to whole pages."""
        return self.allocator.page_size * sum(
            self.allocator.pages_needed(0, seq.length - seq.shared_len) for seq in self._open
        )

    def open(self, tokens: TokenIds, namespace: str, *, reuse_limit: int) -> CachedSequence:
        """Starts a sequence on the longest cached prefix of tokens [n] i32.

        At most `reuse_limit` tokens are reused: n - 1 where the last token must be computed for
        its logits. The sequence has slots for `cached_len` tokens; `extend` it for the others.
        """
        match = self.radix.match(tokens, namespace, limit=reuse_limit)
        self.radix.lock(match.node)
        seq = CachedSequence(
            namespace=namespace,
            cached_len=match.length,
            shared_len=match.length,
            length=0,
            _node=match.node,
            _buffer=np.empty(max(len(tokens), _MIN_CAPACITY), dtype=np.int32),
        )
        seq._append(match.slots)
        self._open.add(seq)
        return seq

    def extend(self, seq: CachedSequence, count: int) -> SlotIds | None:
        """Slots [count] i32 for the next tokens, evicting cached prefixes where needed.

        None if there is no room even so; then nothing has changed.
        """
        self._assert_open(seq)
        if not self._make_room(self.allocator.pages_needed(seq.length, count)):
            return None
        slots = self.allocator.alloc_extend(seq.last_slot, seq.length, count)
        assert slots is not None, f"no room for {count} tokens after making room for them"
        seq._append(slots)
        return slots

    def extend_each(self, seqs: Sequence[CachedSequence]) -> SlotIds | None:
        """One slot more for each of `seqs`: [len(seqs)] i32, or None with nothing changed.

        For decode: no sequence may be empty or occur twice.
        """
        if not self._open.issuperset(seqs):
            for seq in seqs:
                self._assert_open(seq)
        lengths = np.array([seq.length for seq in seqs], dtype=np.int64)
        last_slots = np.zeros(len(seqs), dtype=np.int32)
        if self._page > 1:  # else every token opens a page, wherever the one before lies
            last_slots[:] = [seq._buffer[seq.length - 1] for seq in seqs]
        if not self._make_room(int(np.count_nonzero(lengths % self._page == 0))):
            return None
        slots = self.allocator.alloc_decode(last_slots, lengths)
        assert slots is not None, f"no room for {len(seqs)} tokens after making room for them"
        for seq, slot in zip(seqs, slots, strict=True):
            if seq.length < len(seq._buffer):
                seq._buffer[seq.length] = slot
                seq.length += 1
            else:
                seq._append(slot[None])
        return slots

    def publish(self, seq: CachedSequence, tokens: TokenIds) -> range:
        """Shares the computed tokens [n] i32, n <= seq.length, and goes on from the tree's slots.

        Where the tree had them already, the sequence drops its own copies for the tree's. Returns
        the token positions whose slot changed thereby: the device's slot table must be rewritten
        there before the next launch. An unfinished page stays the sequence's own.
        """
        self._assert_open(seq)
        if len(tokens) > seq.length:
            raise ValueError(f"{len(tokens)} tokens published, {seq.length} have slots")
        shared_len = seq.shared_len
        if len(tokens) < shared_len + self.radix.page_size:
            return range(0)
        inserted = self.radix.insert(tokens, seq.slots[: len(tokens)], seq.namespace)
        changed = range(shared_len, max(shared_len, inserted.existing))
        if changed:
            self.allocator.free(seq.slots[changed.start : changed.stop])
            seq.slots[changed.start : changed.stop] = inserted.existing_slots[changed.start :]
        # Lock first: between the two calls the common part of both paths must stay protected.
        self.radix.lock(inserted.node)
        self.radix.unlock(seq._node)
        seq._node = inserted.node
        seq.shared_len = inserted.length
        return changed

    def close(self, seq: CachedSequence, tokens: TokenIds) -> None:
        """Ends a sequence: its computed tokens [n] i32 stay in the tree, all else is freed.

        n <= seq.length: the last sampled token has no keys and values and is not part of it.
        """
        self.publish(seq, tokens)
        self.discard(seq)

    def discard(self, seq: CachedSequence) -> None:
        """Ends a sequence; of what it computed only what it published stays in the tree."""
        self._assert_open(seq)
        self._open.remove(seq)
        self.allocator.free(seq.slots[seq.shared_len :])
        self.radix.unlock(seq._node)

    def check(self) -> None:
        """Asserts that tree, open sequences and free list account for every slot exactly once."""
        self.allocator.check()
        self.radix.check(self.allocator, self.in_flight_slots)
        # One slot of each page: owners hold whole pages, and theirs start at a page's first slot.
        own = [seq.slots[seq.shared_len :: self._page] for seq in self._open]
        slots = np.concatenate([self.radix.held_slots()[:: self._page], *own])
        owners = np.bincount(slots // self._page, minlength=1)
        assert owners.max() <= 1, f"page {owners.argmax()} has {owners.max()} owners"
        assert not self.allocator.is_free(slots).any(), "a page in use is free"

    @property
    def _page(self) -> int:
        return self.allocator.page_size

    def _make_room(self, pages: int) -> bool:
        missing = pages * self._page - self.allocator.available
        if missing <= 0:
            return True
        if missing > self.radix.evictable:
            return False
        self.radix.evict(missing)
        return True

    def _assert_open(self, seq: CachedSequence) -> None:
        assert seq in self._open, f"a sequence of {seq.length} tokens is used after its end"
