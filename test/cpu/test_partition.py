"""Partitions: what a table accepts, and shares that fit every device."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drift_scheduler.partition import (
    Partition,
    PartitionError,
    PartitionTable,
    even_decode_shares,
)


def test_the_whole_device_comes_first_and_splits_follow():
    splits = (Partition(1, 112, 20), Partition(2, 92, 40))
    table = PartitionTable(132, splits)
    assert len(table) == 3
    assert table[0] == table.whole == Partition(0, 132, 132, exclusive=True)
    assert (table[1], table[2]) == splits
    with pytest.raises(IndexError):
        table[3]


def test_a_device_may_have_no_splits():
    table = PartitionTable(1)
    assert len(table) == 1
    assert table.whole.exclusive


def test_partitions_name_their_shares():
    assert str(Partition(1, 112, 20)) == "p112/d20"
    assert str(PartitionTable(8).whole) == "whole"


@pytest.mark.parametrize(
    ("splits", "reason"),
    [
        ((Partition(2, 2, 2),), "index 2, not 1"),
        ((Partition(1, 0, 4),), "without SMs"),
        ((Partition(1, 4, 0),), "without SMs"),
        ((Partition(1, 2, 2, exclusive=True),), "without SMs"),
        ((Partition(1, 3, 2),), "exceeds the device's 4 SMs"),
        ((Partition(1, 2, 2), Partition(2, 3, 1)), "not strictly increasing"),
        ((Partition(1, 2, 2), Partition(2, 2, 2)), "not strictly increasing"),
    ],
)
def test_a_table_that_makes_no_sense_is_refused(splits, reason):
    with pytest.raises(PartitionError, match=reason):
        PartitionTable(4, splits)


@settings(max_examples=300, derandomize=True)
@given(
    total=st.integers(1, 200),
    splits=st.integers(1, 12),
    minimum=st.integers(1, 20),
    step=st.sampled_from([1, 2, 8]),
)
def test_even_shares_leave_both_phases_their_minimum(total, splits, minimum, step):
    try:
        shares = even_decode_shares(total, splits, minimum=minimum, step=step)
    except PartitionError:
        possible = [s for s in range(minimum, total - minimum + 1) if s % step == 0]
        assert not possible
        return
    assert 1 <= len(shares) <= splits
    assert shares == sorted(set(shares))
    for share in shares:
        assert share % step == 0
        assert minimum <= share <= total - minimum
    PartitionTable(total, tuple(Partition(i + 1, total - d, d) for i, d in enumerate(shares)))


def test_even_shares_of_a_large_gpu_are_evenly_spaced():
    shares = even_decode_shares(132, 6, minimum=8, step=8)
    assert shares == [16, 32, 48, 64, 80, 96]


def test_a_device_too_small_to_divide_is_refused():
    with pytest.raises(PartitionError, match="1 SMs cannot be divided"):
        even_decode_shares(1, 1, minimum=1, step=1)
