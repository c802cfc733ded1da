"""SlotAllocator: who may use which slot of the KV pool, kept on the host in numpy.

A slot holds the keys and values of one token. Slots are handed out in pages of `page_size`
consecutive ones, and a page has one owner at a time: a sequence being computed or the prefix
tree. Page 0, slots [0, page_size), is scratch for padding and is never handed out.

Free pages form a stack: the group of pages freed last is used first, in the order in which it was
freed, so that a sequence's slots tend to lie together in the pool.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

SlotIds = npt.NDArray[np.int32]


class SlotAllocator:
    """Hands out slots [page_size, num_slots) of a KV pool.

    Three outcomes are kept apart: None means that there is no room and nothing has changed,
    ValueError is a call that makes no sense, AssertionError is a broken account (a page freed
    twice, a slot that does not exist) and names the numbers.
    """

    def __init__(self, num_slots: int, page_size: int) -> None:
        if page_size < 1 or num_slots % page_size or num_slots < 2 * page_size:
            raise ValueError(
                f"num_slots={num_slots} must be a multiple of page_size={page_size} "
                "and hold the scratch page and at least one more"
            )
        self.page_size = page_size
        self._num_pages = num_slots // page_size
        # The top of the stack is at the end: the lowest pages go first.
        self._stack = np.arange(self._num_pages - 1, -1, -1, dtype=np.int32)
        self._num_free = self._num_pages - 1
        self._is_free = np.ones(self._num_pages, dtype=np.bool_)
        self._is_free[0] = False
        self._seen_at = np.empty(self._num_pages, dtype=np.int64)  # scratch of _distinct

    @property
    def total(self) -> int:
        """Slots that can be handed out at all, the scratch page left aside."""
        return (self._num_pages - 1) * self.page_size

    @property
    def available(self) -> int:
        """Slots in free pages."""
        return self._num_free * self.page_size

    def pages_needed(self, length: int, count: int) -> int:
        """New pages that `count` more tokens take behind `length` tokens."""
        return -(-(length + count) // self.page_size) + -length // self.page_size

    def alloc_extend(self, last_slot: int | None, length: int, count: int) -> SlotIds | None:
        """Slots for tokens length..length+count-1 of one sequence; None if there is no room.

        `last_slot` is the slot of token length-1, None for an empty sequence. The rest of its
        page belongs to the sequence already and is filled first; whole new pages follow.
        """
        if length < 0 or count < 0 or (last_slot is None) != (length == 0):
            raise ValueError(f"alloc_extend(last_slot={last_slot}, length={length}, count={count})")
        pages = self._pop(self.pages_needed(length, count))
        if pages is None:
            return None
        in_page = np.arange(self.page_size, dtype=np.int32)
        fresh = (pages[:, None] * self.page_size + in_page).reshape(-1)
        used_of_page = length % self.page_size
        if last_slot is None or used_of_page == 0:
            return fresh[:count]
        assert last_slot % self.page_size == used_of_page - 1, (
            f"token {length - 1} sits at slot {last_slot}, not at offset {used_of_page - 1} "
            f"of a page of {self.page_size}"
        )
        rest = last_slot + 1 + in_page[: min(count, self.page_size - used_of_page)]
        return np.concatenate((rest, fresh))[:count]

    def alloc_decode(self, last_slots: SlotIds, lengths: npt.NDArray[np.integer]) -> SlotIds | None:
        """One slot for the next token of each of many sequences; None if there is no room.

        last_slots [reqs] i32 and lengths [reqs] have the meaning they have in `alloc_extend`,
        with every length at least 1.
        """
        if self.page_size == 1:
            return self._pop(len(last_slots))
        opens_page = lengths % self.page_size == 0
        pages = self._pop(int(np.count_nonzero(opens_page)))
        if pages is None:
            return None
        slots = last_slots + np.int32(1)
        slots[opens_page] = pages * self.page_size
        return slots

    def free(self, slots: SlotIds) -> None:
        """Gives back every page that one of `slots` lies in.

        A page is freed as a whole, so all used slots of a page must come in one call; how many
        of them are used does not matter.
        """
        if len(slots) == 0:
            return
        pages = slots // self.page_size
        assert 1 <= pages.min() <= pages.max() < self._num_pages, (
            f"slots {slots.min()}..{slots.max()} freed, the pool has "
            f"{self.page_size}..{self._num_pages * self.page_size - 1}"
        )
        pages = self._distinct(pages)
        twice = pages[self._is_free[pages]]
        assert len(twice) == 0, f"{len(twice)} pages freed twice, the first is page {twice[0]}"
        assert self.page_size > 1 or len(pages) == len(slots), (
            f"{len(slots) - len(pages)} of {len(slots)} slots occur twice in one call"
        )
        self._is_free[pages] = True
        self._stack[self._num_free : self._num_free + len(pages)] = pages[::-1]
        self._num_free += len(pages)

    def check(self) -> None:
        """Asserts that the stack and the free marks tell the same story."""
        on_stack = np.sort(self._stack[: self._num_free])
        marked = np.flatnonzero(self._is_free)
        assert np.array_equal(on_stack, marked), (
            f"{len(on_stack)} pages on the stack, {len(marked)} marked free"
        )
        assert not self._is_free[0], "the scratch page is marked free"

    def is_free(self, slots: SlotIds) -> npt.NDArray[np.bool_]:
        """For each slot, whether its page is free."""
        free: npt.NDArray[np.bool_] = self._is_free[slots // self.page_size]
        return free

    def _distinct(self, pages: SlotIds) -> SlotIds:
        """Each page once, in the order given; linear, where a sort would be felt."""
        index = np.arange(len(pages))
        self._seen_at[pages] = index
        distinct: SlotIds = pages[self._seen_at[pages] == index]
        return distinct

    def _pop(self, count: int) -> SlotIds | None:
        """Takes `count` pages off the stack, in the order in which they should be filled."""
        if count > self._num_free:
            return None
        first = self._num_free - count
        pages = self._stack[first : self._num_free][::-1].copy()
        self._is_free[pages] = False
        self._num_free = first
        return pages
