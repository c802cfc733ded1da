"""SlotAllocator and RowPool: exact slots, outcomes kept apart, accounts that always balance."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang.srt.mem_cache.slot_allocator import SlotAllocator, SlotIds
from sglang.srt.mem_cache.slot_table import RowPool


def _slots(*values: int) -> SlotIds:
    return np.array(values, dtype=np.int32)


def test_scratch_page_is_never_handed_out() -> None:
    allocator = SlotAllocator(num_slots=12, page_size=4)
    assert (allocator.total, allocator.available) == (8, 8)
    slots = allocator.alloc_extend(None, 0, 8)
    assert slots is not None
    assert slots.tolist() == [4, 5, 6, 7, 8, 9, 10, 11]
    assert slots.dtype == np.int32
    assert allocator.available == 0


def test_extend_fills_the_open_page_before_it_takes_new_ones() -> None:
    allocator = SlotAllocator(num_slots=24, page_size=4)
    first = allocator.alloc_extend(None, 0, 6)
    assert first is not None
    assert first.tolist() == [4, 5, 6, 7, 8, 9]
    other = allocator.alloc_extend(None, 0, 1)
    assert other is not None
    assert other.tolist() == [12]
    more = allocator.alloc_extend(9, 6, 4)
    assert more is not None
    assert more.tolist() == [10, 11, 16, 17]
    inside = allocator.alloc_extend(17, 10, 2)
    assert inside is not None
    assert inside.tolist() == [18, 19]
    assert allocator.available == 4
    allocator.check()


def test_no_room_is_none_and_changes_nothing() -> None:
    allocator = SlotAllocator(num_slots=12, page_size=4)
    assert allocator.alloc_extend(None, 0, 9) is None
    assert allocator.available == 8
    assert allocator.alloc_extend(None, 0, 8) is not None
    assert allocator.alloc_extend(7, 4, 1) is None
    assert allocator.alloc_decode(_slots(7, 5), np.array([4, 6])) is None
    assert allocator.available == 0
    allocator.check()


def test_decode_opens_pages_only_where_the_last_one_is_full() -> None:
    allocator = SlotAllocator(num_slots=40, page_size=4)
    assert allocator.alloc_extend(None, 0, 4) is not None
    assert allocator.alloc_extend(None, 0, 2) is not None
    assert allocator.alloc_extend(None, 0, 8) is not None
    slots = allocator.alloc_decode(_slots(7, 9, 19), np.array([4, 2, 8]))
    assert slots is not None
    assert slots.tolist() == [20, 10, 24]
    assert slots.dtype == np.int32
    assert allocator.available == 3 * 4


def test_decode_with_pages_of_one_token() -> None:
    allocator = SlotAllocator(num_slots=6, page_size=1)
    assert allocator.alloc_extend(None, 0, 2) is not None
    slots = allocator.alloc_decode(_slots(1, 2), np.array([1, 1]))
    assert slots is not None
    assert slots.tolist() == [3, 4]
    assert allocator.alloc_decode(_slots(3, 4), np.array([2, 2])) is None
    assert allocator.available == 1


def test_pages_freed_last_are_used_first_in_the_order_given() -> None:
    allocator = SlotAllocator(num_slots=8, page_size=1)
    assert allocator.alloc_extend(None, 0, 7) is not None
    allocator.free(_slots(6, 2))
    allocator.free(_slots(5, 4))
    slots = allocator.alloc_extend(None, 0, 4)
    assert slots is not None
    assert slots.tolist() == [5, 4, 6, 2]


def test_partly_used_pages_are_freed_whole() -> None:
    allocator = SlotAllocator(num_slots=16, page_size=4)
    slots = allocator.alloc_extend(None, 0, 6)
    assert slots is not None
    allocator.free(slots)
    assert allocator.available == allocator.total
    allocator.free(_slots())
    allocator.check()


def test_freeing_twice_names_the_page() -> None:
    allocator = SlotAllocator(num_slots=16, page_size=4)
    slots = allocator.alloc_extend(None, 0, 8)
    assert slots is not None
    allocator.free(slots[:4])
    with pytest.raises(AssertionError, match="1 pages freed twice, the first is page 1"):
        allocator.free(slots)
    single = SlotAllocator(num_slots=8, page_size=1)
    assert single.alloc_extend(None, 0, 3) is not None
    with pytest.raises(AssertionError, match="1 of 3 slots occur twice"):
        single.free(_slots(1, 2, 1))


@pytest.mark.parametrize("slot", [0, 3, 16, -1])
def test_freeing_outside_the_pool_is_an_assertion(slot: int) -> None:
    allocator = SlotAllocator(num_slots=16, page_size=4)
    with pytest.raises(AssertionError, match=r"the pool has 4\.\.15"):
        allocator.free(_slots(slot))


def test_calls_that_make_no_sense_are_value_errors() -> None:
    for num_slots, page_size in ((10, 4), (4, 4), (0, 1), (8, 0)):
        with pytest.raises(ValueError, match="num_slots"):
            SlotAllocator(num_slots, page_size)
    allocator = SlotAllocator(num_slots=16, page_size=4)
    for last_slot, length, count in ((None, 3, 1), (5, 0, 1), (None, 0, -1)):
        with pytest.raises(ValueError, match="alloc_extend"):
            allocator.alloc_extend(last_slot, length, count)
    with pytest.raises(AssertionError, match="token 4 sits at slot 7"):
        allocator.alloc_extend(7, 5, 1)


@given(page_size=st.sampled_from([1, 2, 16]), data=st.data())
def test_sequences_grow_and_end_in_any_order(page_size: int, data: st.DataObject) -> None:
    """Slots stay exclusive, keep page order, and the count of free pages is always right."""
    allocator = SlotAllocator(num_slots=12 * page_size, page_size=page_size)
    sequences: list[list[int]] = []
    for _ in range(data.draw(st.integers(1, 25))):
        action = data.draw(st.sampled_from(["open", "extend", "decode", "free"]))
        if action == "open":
            sequences.append([])
        elif action == "extend" and sequences:
            sequence = data.draw(st.sampled_from(sequences))
            count = data.draw(st.integers(0, 4 * page_size))
            last = sequence[-1] if sequence else None
            needed = allocator.pages_needed(len(sequence), count)
            had = allocator.available
            got = allocator.alloc_extend(last, len(sequence), count)
            assert (got is None) == (needed * page_size > had)
            if got is not None:
                assert len(got) == count
                sequence.extend(got.tolist())
        elif action == "decode":
            chosen = [sequence for sequence in sequences if sequence]
            last_slots = _slots(*(sequence[-1] for sequence in chosen))
            got = allocator.alloc_decode(last_slots, np.array([len(s) for s in chosen], dtype=int))
            if got is not None:
                for sequence, slot in zip(chosen, got.tolist(), strict=True):
                    sequence.append(slot)
        elif action == "free" and sequences:
            allocator.free(_slots(*sequences.pop(data.draw(st.integers(0, len(sequences) - 1)))))
        allocator.check()
        used = [slot for sequence in sequences for slot in sequence]
        assert len(set(used)) == len(used)
        assert not used or page_size <= min(used) <= max(used) < 12 * page_size
        for sequence in sequences:
            assert [slot % page_size for slot in sequence] == [
                index % page_size for index in range(len(sequence))
            ]
        pages = sum(-(-len(sequence) // page_size) for sequence in sequences)
        assert allocator.available == allocator.total - pages * page_size
        owned = {(i, slot // page_size) for i, seq in enumerate(sequences) for slot in seq}
        assert len(owned) == pages


def test_rows_start_behind_the_padding_row_and_run_out() -> None:
    pool = RowPool(4)
    assert [pool.alloc() for _ in range(4)] == [1, 2, 3, None]
    assert (pool.total, pool.available) == (3, 0)
    pool.free(1)
    pool.free(3)
    assert pool.available == 2
    pool.check(in_use=1)
    assert pool.alloc() == 3


def test_row_accounts_are_checked() -> None:
    with pytest.raises(ValueError, match="num_rows=1"):
        RowPool(1)
    pool = RowPool(4)
    row = pool.alloc()
    assert row is not None
    with pytest.raises(AssertionError, match="1 rows taken, 0 in use"):
        pool.check(in_use=0)
    pool.free(row)
    for wrong in (row, 0, 9):
        with pytest.raises(AssertionError, match=f"row {wrong} is freed but not taken"):
            pool.free(wrong)
