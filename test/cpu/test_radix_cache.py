"""RadixCache: exact matches, splits, eviction order, locks; then random use against a dict."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from sglang.srt.mem_cache.radix_cache import Inserted, Match, RadixCache, TokenIds
from sglang.srt.mem_cache.slot_allocator import SlotAllocator


def _ids(*values: int) -> TokenIds:
    return np.array(values, dtype=np.int32)


@dataclass
class Pool:
    """A tree over an allocator, with the insertion that a prefill without reuse would make."""

    page_size: int = 1
    num_slots: int = 64
    freed: list[list[int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.allocator = SlotAllocator(self.num_slots, self.page_size)
        self.tree = RadixCache(self.page_size, self._free)

    def _free(self, slots: TokenIds) -> None:
        self.freed.append(slots.tolist())
        self.allocator.free(slots)

    def insert(self, *tokens: int, namespace: str = "") -> Inserted:
        slots = self.allocator.alloc_extend(None, 0, len(tokens))
        assert slots is not None
        inserted = self.tree.insert(_ids(*tokens), slots, namespace)
        self.allocator.free(slots[: inserted.existing])
        self.allocator.free(slots[inserted.length :])
        return inserted

    def match(self, *tokens: int, namespace: str = "", limit: int | None = None) -> Match:
        return self.tree.match(_ids(*tokens), namespace, limit)

    def check(self, in_flight: int = 0) -> None:
        self.allocator.check()
        self.tree.check(self.allocator, in_flight)


def test_empty_tree_matches_nothing() -> None:
    pool = Pool()
    match = pool.match(1, 2, 3)
    assert match.length == 0
    assert match.slots.tolist() == []
    assert pool.tree.peek_length(_ids(1, 2), "") == 0
    assert pool.tree.evict(10) == 0
    pool.check()


def test_match_returns_the_slots_of_the_longest_prefix() -> None:
    pool = Pool()
    pool.insert(1, 2, 3, 4)  # slots 1..4
    assert pool.match(1, 2, 3, 4, 5).slots.tolist() == [1, 2, 3, 4]
    assert pool.match(1, 2, 9).slots.tolist() == [1, 2]
    assert pool.match(2, 3).length == 0
    assert pool.match(1, 2, 3, 4, limit=3).slots.tolist() == [1, 2, 3]
    assert pool.match(1, 2, limit=0).length == 0
    pool.check()


def test_a_partial_match_splits_the_node_and_a_peek_does_not() -> None:
    pool = Pool()
    pool.insert(1, 2, 3, 4)
    assert pool.tree.peek_length(_ids(1, 2, 9), "") == 2
    assert pool.tree.total_nodes == 1
    assert pool.match(1, 2, 9).length == 2
    assert pool.tree.total_nodes == 2
    assert pool.match(1, 2, 3, 4).slots.tolist() == [1, 2, 3, 4]
    assert pool.tree.total_nodes == 2
    pool.check()


def test_insert_tells_what_the_tree_had() -> None:
    pool = Pool()
    assert pool.insert(1, 2, 3).existing == 0
    second = pool.insert(1, 2, 7, 8)
    assert (second.length, second.existing) == (4, 2)
    assert second.existing_slots.tolist() == [1, 2]
    third = pool.insert(1, 2)
    assert (third.length, third.existing) == (2, 2)
    assert pool.tree.evictable == 5
    assert pool.tree.total_nodes == 3
    pool.check()


def test_pages_match_whole_or_not_at_all() -> None:
    pool = Pool(page_size=2)
    inserted = pool.insert(1, 2, 3, 4, 5)  # the fifth token's page is unfinished
    assert inserted.length == 4
    assert pool.match(1, 2, 3, 9).slots.tolist() == [2, 3]
    assert pool.match(1, 9).length == 0
    assert pool.match(1, 2, 3, 4, limit=3).length == 2
    assert pool.tree.peek_length(_ids(1, 2, 3, 4), "", limit=3) == 2
    pool.insert(1, 9)  # shares a first token but no page
    assert pool.match(1, 9, 9).length == 2
    pool.check()


def test_namespaces_share_nothing_and_vanish_when_empty() -> None:
    pool = Pool()
    pool.insert(1, 2, namespace="a")
    assert pool.match(1, 2, namespace="b").length == 0
    assert pool.insert(1, 2, namespace="b").existing == 0
    assert pool.tree.evict(2) == 2
    assert pool.match(1, 2, namespace="a").length == 0
    assert pool.match(1, 2, namespace="b").length == 2
    pool.check()
    assert pool.tree.evict(2) == 2
    assert pool.tree.total_nodes == 0
    pool.check()


def test_eviction_takes_the_least_recently_used_leaf_first() -> None:
    pool = Pool()
    pool.insert(1, 2)  # slots 1 2
    pool.insert(3, 4)  # slots 3 4
    pool.insert(5, 6)  # slots 5 6
    pool.match(1, 2)
    assert pool.tree.evict(2) == 2
    assert pool.tree.evict(2) == 2
    assert pool.tree.evict(2) == 2
    assert pool.freed == [[3, 4], [5, 6], [1, 2]]
    assert pool.tree.stats.evicted_tokens == 6


def test_a_peek_does_not_count_as_use() -> None:
    pool = Pool()
    pool.insert(1)
    pool.insert(2)
    pool.tree.peek_length(_ids(1), "")
    pool.tree.evict(1)
    assert pool.freed == [[1]]


def test_a_parent_goes_after_its_children() -> None:
    pool = Pool()
    pool.insert(1, 2, 3)  # slots 1 2 3
    pool.insert(1, 2, 4)  # token 4 at slot 6; splits behind 1, 2
    pool.insert(9)  # slot 4, which was a duplicate a moment ago
    for count in (1, 1, 1, 2):
        assert pool.tree.evict(count) == count
    assert pool.freed == [[3], [6], [2], [1, 4]]
    assert pool.tree.evictable == 0


def test_a_leaf_is_evicted_from_its_tail_and_no_further_than_asked() -> None:
    pool = Pool(page_size=2)
    pool.insert(1, 2, 3, 4, 5, 6)  # slots 2..7
    assert pool.tree.evict(1) == 2
    assert pool.freed == [[6, 7]]
    assert pool.match(1, 2, 3, 4, 5, 6).length == 4
    assert pool.tree.evict(100) == 4
    pool.check()


def test_locked_prefixes_stay() -> None:
    pool = Pool()
    pool.insert(1, 2, 3, 4)
    prefix = pool.match(1, 2).node
    pool.tree.lock(prefix)
    assert (pool.tree.protected, pool.tree.evictable) == (2, 2)
    assert pool.tree.evict(4) == 2
    assert pool.match(1, 2, 3).length == 2
    pool.tree.lock(prefix)
    pool.tree.unlock(prefix)
    assert pool.tree.evict(4) == 0
    pool.tree.unlock(prefix)
    assert (pool.tree.protected, pool.tree.evictable) == (0, 2)
    assert pool.tree.evict(4) == 2
    pool.check()


def test_a_lock_outlives_a_split_of_its_node() -> None:
    pool = Pool()
    node = pool.insert(1, 2, 3, 4).node
    pool.tree.lock(node)
    pool.insert(1, 2, 7)
    assert (pool.tree.protected, pool.tree.evictable) == (4, 1)
    assert pool.tree.evict(5) == 1
    pool.tree.unlock(node)
    assert (pool.tree.protected, pool.tree.evictable) == (0, 4)
    pool.check()


def test_unlock_without_lock_and_reset_under_lock_are_assertions() -> None:
    pool = Pool()
    node = pool.insert(1, 2).node
    with pytest.raises(AssertionError, match="2 tokens unlocked without a lock"):
        pool.tree.unlock(node)
    pool.tree.lock(node)
    with pytest.raises(AssertionError, match="2 tokens locked"):
        pool.tree.reset()
    pool.tree.unlock(node)
    pool.tree.reset()
    assert pool.allocator.available == pool.allocator.total
    assert pool.match(1, 2).length == 0
    pool.check()


def test_check_notices_a_leak_and_a_double_owner() -> None:
    pool = Pool()
    pool.insert(1, 2)
    pool.check()
    with pytest.raises(AssertionError, match="free 61"):
        pool.check(in_flight=1)
    pool.allocator.free(_ids(2))
    with pytest.raises(AssertionError, match="slot that is free"):
        pool.check()


def test_wrong_calls_are_refused() -> None:
    pool = Pool()
    with pytest.raises(ValueError, match="3 tokens with 2 slots"):
        pool.tree.insert(_ids(1, 2, 3), _ids(1, 2), "")
    with pytest.raises(ValueError, match="limit=-1"):
        pool.match(1, limit=-1)
    with pytest.raises(AssertionError, match="int64"):
        pool.tree.match(np.array([1, 2]), "")


def test_a_disabled_tree_declines_everything() -> None:
    tree = RadixCache(1, lambda slots: None, enabled=False)
    inserted = tree.insert(_ids(1, 2), _ids(5, 6), "")
    assert (inserted.length, inserted.existing) == (0, 0)
    assert tree.match(_ids(1, 2), "").length == 0
    tree.lock(inserted.node)
    tree.unlock(inserted.node)
    assert (tree.evictable, tree.protected, tree.total_nodes) == (0, 0, 0)


def test_inserted_arrays_are_copied() -> None:
    pool = Pool()
    tokens, slots = _ids(1, 2, 3), _ids(7, 8, 9)
    pool.tree.insert(tokens, slots, "")
    tokens[:] = 0
    slots[:] = 0
    assert pool.match(1, 2, 3).slots.tolist() == [7, 8, 9]


def test_a_tree_deeper_than_the_recursion_limit() -> None:
    depth = 3 * sys.getrecursionlimit()
    pool = Pool(num_slots=depth + 1)
    tokens = np.arange(depth, dtype=np.int32)
    pool.insert(*tokens.tolist())
    for length in range(depth - 1, 0, -1):
        assert pool.tree.match(tokens, "", limit=length).length == length
    assert pool.tree.total_nodes == depth
    node = pool.tree.match(tokens, "").node
    pool.tree.lock(node)
    assert pool.tree.protected == depth
    pool.tree.unlock(node)
    pool.check()
    assert pool.tree.evict(depth) == depth
    assert pool.allocator.available == pool.allocator.total


def test_hit_counters() -> None:
    pool = Pool()
    pool.insert(1, 2)
    pool.match(1, 2, 3, 4)
    pool.match(5)
    assert (pool.tree.stats.matched_tokens, pool.tree.stats.looked_up_tokens) == (2, 5)


@dataclass(frozen=True)
class Text:
    """Letters that become one page each. Letters 2k and 2k + 1 differ in the last token only."""

    letters: list[int]
    cut: int  # tokens that the last page lacks, modulo the page size

    def tokens(self, page_size: int) -> TokenIds:
        tokens = [
            token for letter in self.letters for token in [letter // 2] * (page_size - 1) + [letter]
        ]
        return _ids(*tokens[: max(0, len(tokens) - self.cut % page_size)])


_TEXTS = st.builds(Text, st.lists(st.integers(0, 3), max_size=8), st.integers(0, 15))
_NAMESPACES = st.sampled_from(["", "tenant"])


class RadixModel(RuleBasedStateMachine):
    """The tree against a dict: (namespace, tokens of a prefix in whole pages) -> its last page."""

    @initialize(page_size=st.sampled_from([1, 2, 16]))
    def start(self, page_size: int) -> None:
        self.page = page_size
        self.allocator = SlotAllocator(24 * page_size, page_size)
        self.tree = RadixCache(page_size, self.on_free)
        self.cached: dict[tuple[str, tuple[int, ...]], int] = {}
        self.locked: list[Match] = []

    def on_free(self, slots: TokenIds) -> None:
        gone = {slot // self.page for slot in slots.tolist()}
        assert len(gone) * self.page == len(slots)
        assert gone <= set(self.cached.values())
        for match in self.locked:
            assert not set(slots.tolist()) & set(match.slots.tolist()), "evicted under a lock"
        self.cached = {key: page for key, page in self.cached.items() if page not in gone}
        self.allocator.free(slots)

    def expected(self, namespace: str, tokens: TokenIds) -> list[int]:
        """The slots of the longest prefix of whole pages that is in the dict."""
        slots: list[int] = []
        for end in range(self.page, len(tokens) + 1, self.page):
            page = self.cached.get((namespace, tuple(tokens[:end].tolist())))
            if page is None:
                break
            slots.extend(range(page * self.page, (page + 1) * self.page))
        return slots

    @rule(namespace=_NAMESPACES, text=_TEXTS)
    def insert(self, namespace: str, text: Text) -> None:
        tokens = text.tokens(self.page)
        pages = self.allocator.pages_needed(0, len(tokens))
        missing = pages * self.page - self.allocator.available
        if missing > self.tree.evictable:
            return
        if missing > 0:
            assert self.tree.evict(missing) == missing
        slots = self.allocator.alloc_extend(None, 0, len(tokens))
        assert slots is not None
        had = self.expected(namespace, tokens)
        inserted = self.tree.insert(tokens, slots, namespace)
        assert inserted.existing == len(had)
        assert inserted.existing_slots.tolist() == had
        assert inserted.length == len(tokens) // self.page * self.page
        for end in range(inserted.existing + self.page, inserted.length + 1, self.page):
            self.cached[namespace, tuple(tokens[:end].tolist())] = int(slots[end - 1]) // self.page
        self.allocator.free(slots[: inserted.existing])
        self.allocator.free(slots[inserted.length :])

    @rule(namespace=_NAMESPACES, text=_TEXTS, limit=st.none() | st.integers(0, 40))
    def match(self, namespace: str, text: Text, limit: int | None) -> None:
        tokens = text.tokens(self.page)
        expected = self.expected(namespace, tokens[:limit])
        assert self.tree.peek_length(tokens, namespace, limit) == len(expected)
        match = self.tree.match(tokens, namespace, limit)
        assert match.slots.tolist() == expected
        assert match.length == len(expected)

    @rule(namespace=_NAMESPACES, text=_TEXTS)
    def lock(self, namespace: str, text: Text) -> None:
        match = self.tree.match(text.tokens(self.page), namespace)
        self.tree.lock(match.node)
        self.locked.append(match)

    @precondition(lambda self: self.locked)
    @rule(data=st.data())
    def unlock(self, data: st.DataObject) -> None:
        self.tree.unlock(self.locked.pop(data.draw(st.integers(0, len(self.locked) - 1))).node)

    @rule(pages=st.integers(0, 24), less=st.integers(0, 1))
    def evict(self, pages: int, less: int) -> None:
        count = max(0, pages * self.page - less)
        in_pages = -(-count // self.page) * self.page
        expected = min(in_pages, self.tree_tokens_unlocked())
        assert self.tree.evict(count) == expected

    @precondition(lambda self: not self.locked)
    @rule()
    def reset(self) -> None:
        self.tree.reset()
        assert not self.cached

    def tree_tokens_unlocked(self) -> int:
        locked = {slot for match in self.locked for slot in match.slots.tolist()}
        return len(self.cached) * self.page - len(locked)

    @precondition(lambda self: hasattr(self, "tree"))
    @invariant()
    def balanced(self) -> None:
        self.allocator.check()
        self.tree.check(self.allocator, in_flight=0)
        assert self.tree.evictable == self.tree_tokens_unlocked()
        assert self.tree.evictable + self.tree.protected == len(self.cached) * self.page


TestRadixModel = RadixModel.TestCase
TestRadixModel.settings = settings(max_examples=80, stateful_step_count=30)


class LruModel(RuleBasedStateMachine):
    """Eviction order on flat sequences, where least recently used is plain to say."""

    @initialize()
    def start(self) -> None:
        self.pool = Pool(num_slots=1024)
        self.by_use: list[int] = []

    @rule(token=st.integers(0, 7))
    def use(self, token: int) -> None:
        if token in self.by_use:
            assert self.pool.match(token).length == 1
            self.by_use.remove(token)
        else:
            self.pool.insert(token)
        self.by_use.append(token)

    @precondition(lambda self: self.by_use)
    @rule()
    def evict_one(self) -> None:
        assert self.pool.tree.evict(1) == 1
        gone = self.by_use.pop(0)
        assert self.pool.tree.peek_length(_ids(gone), "") == 0
        assert all(self.pool.tree.peek_length(_ids(token), "") == 1 for token in self.by_use)


TestLruModel = LruModel.TestCase
TestLruModel.settings = settings(max_examples=30, stateful_step_count=40)
