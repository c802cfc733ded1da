"""SequenceCache: who owns which slot over a request's life; then random lives over a fake pool."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from sglang.srt.mem_cache.radix_cache import RadixCache, TokenIds
from sglang.srt.mem_cache.sequence_cache import CachedSequence, SequenceCache
from sglang.srt.mem_cache.slot_allocator import SlotAllocator


def _ids(*values: int) -> TokenIds:
    return np.array(values, dtype=np.int32)


def _cache(num_slots: int = 32, page_size: int = 1, *, enabled: bool = True) -> SequenceCache:
    allocator = SlotAllocator(num_slots, page_size)
    return SequenceCache(RadixCache(page_size, allocator.free, enabled=enabled), allocator)


def _start(cache: SequenceCache, *tokens: int) -> CachedSequence:
    seq = cache.open(_ids(*tokens), "", reuse_limit=len(tokens) - 1)
    assert cache.extend(seq, len(tokens) - seq.length) is not None
    return seq


def test_a_conversation_reuses_its_first_turn() -> None:
    cache = _cache()
    first = _start(cache, 1, 2, 3)
    assert first.cached_len == 0
    assert cache.publish(first, _ids(1, 2, 3)) == range(0)
    cache.extend(first, 1)
    cache.close(first, _ids(1, 2, 3, 4))
    cache.check()
    assert (cache.num_open, cache.in_flight_slots) == (0, 0)
    second = _start(cache, 1, 2, 3, 4, 9)
    assert second.cached_len == 4
    assert second.slots.tolist() == [1, 2, 3, 4, 5]
    assert second.last_slot == 5
    assert (cache.radix.protected, cache.in_flight_slots) == (4, 1)
    cache.check()


def test_the_last_prompt_token_is_computed_again() -> None:
    cache = _cache()
    cache.close(_start(cache, 1, 2, 3), _ids(1, 2, 3))
    again = _start(cache, 1, 2, 3)
    assert again.cached_len == 2
    assert again.slots.tolist() == [1, 2, 4]
    assert cache.publish(again, _ids(1, 2, 3)) == range(2, 3)
    assert again.slots.tolist() == [1, 2, 3]
    cache.check()


def test_the_second_to_publish_goes_on_from_the_slots_of_the_first() -> None:
    cache = _cache(page_size=2)
    first = _start(cache, 1, 2, 3, 4, 5)
    second = _start(cache, 1, 2, 3, 4, 7)
    assert second.slots.tolist() == [8, 9, 10, 11, 12]
    available = cache.allocator.available
    assert cache.publish(first, _ids(1, 2, 3, 4, 5)) == range(0)
    assert cache.publish(second, _ids(1, 2, 3, 4, 7)) == range(4)
    assert second.slots.tolist() == [2, 3, 4, 5, 12]
    assert cache.allocator.available == available + 4
    assert second.shared_len == 4
    cache.check()
    more = cache.extend(second, 2)
    assert more is not None
    assert more.tolist() == [13, 8]
    cache.check()


def test_publishing_in_chunks_shares_each_chunk() -> None:
    cache = _cache(page_size=2)
    tokens = _ids(1, 2, 3, 4, 5, 6)
    seq = cache.open(tokens, "", reuse_limit=5)
    for computed in (3, 5, 6):
        cache.extend(seq, computed - seq.length)
        assert cache.publish(seq, tokens[:computed]) == range(0)
        assert cache.radix.peek_length(tokens, "") == seq.shared_len == computed // 2 * 2
        assert cache.radix.evictable == 0
        cache.check()


def test_extend_evicts_only_what_is_missing() -> None:
    cache = _cache(num_slots=9)
    cache.close(_start(cache, 1, 2, 3, 4), _ids(1, 2, 3, 4))
    seq = cache.open(_ids(9), "", reuse_limit=0)
    assert cache.available_tokens == 8
    assert cache.extend(seq, 6) is not None
    assert cache.radix.peek_length(_ids(1, 2, 3, 4), "") == 2
    assert cache.available_tokens == 2
    cache.check()


def test_no_room_changes_nothing_and_evicts_nothing() -> None:
    cache = _cache(num_slots=9)
    cache.close(_start(cache, 1, 2, 3, 4), _ids(1, 2, 3, 4))
    seq = cache.open(_ids(1, 2, 3, 9), "", reuse_limit=3)
    assert cache.extend(seq, 6) is None
    assert cache.extend_each([seq] * 0) is not None
    assert cache.radix.peek_length(_ids(1, 2, 3, 4), "") == 4
    assert seq.length == 3
    assert cache.extend(seq, 5) is not None
    assert cache.extend_each([seq]) is None
    assert seq.length == 8
    cache.check()


def test_extend_each_opens_pages_where_needed() -> None:
    cache = _cache(page_size=4)
    seqs = [_start(cache, *range(10 * i, 10 * i + i)) for i in (4, 1, 8)]
    slots = cache.extend_each(seqs)
    assert slots is not None
    assert slots.tolist() == [20, 9, 24]
    assert [seq.last_slot for seq in seqs] == [20, 9, 24]
    cache.check()


def test_buffers_grow_by_single_tokens() -> None:
    cache = _cache(num_slots=512)
    seq = _start(cache, 1)
    for _ in range(300):
        assert cache.extend_each([seq]) is not None
    assert seq.slots.tolist() == list(range(1, 302))


def test_discard_keeps_only_what_was_published() -> None:
    cache = _cache(page_size=2)
    seq = _start(cache, 1, 2, 3, 4, 5)
    cache.publish(seq, _ids(1, 2))
    cache.discard(seq)
    assert cache.radix.peek_length(_ids(1, 2, 3, 4), "") == 2
    assert cache.available_tokens == cache.allocator.total
    cache.check()


def test_close_before_anything_is_computed_keeps_the_reused_prefix() -> None:
    cache = _cache()
    cache.close(_start(cache, 1, 2, 3), _ids(1, 2, 3))
    seq = _start(cache, 1, 2, 3, 4, 5)
    cache.close(seq, _ids())
    assert cache.radix.peek_length(_ids(1, 2, 3, 4), "") == 3
    assert cache.available_tokens == cache.allocator.total
    cache.check()


def test_a_closed_sequence_cannot_be_used() -> None:
    cache = _cache()
    seq = _start(cache, 1, 2)
    cache.discard(seq)
    for use in (
        lambda: cache.extend(seq, 1),
        lambda: cache.extend_each([seq]),
        lambda: cache.publish(seq, _ids(1)),
        lambda: cache.close(seq, _ids(1)),
        lambda: cache.discard(seq),
    ):
        with pytest.raises(AssertionError, match="2 tokens is used after its end"):
            use()
        cache.check()


def test_publishing_more_than_has_slots_is_refused() -> None:
    cache = _cache()
    seq = _start(cache, 1, 2)
    with pytest.raises(ValueError, match="3 tokens published, 2 have slots"):
        cache.publish(seq, _ids(1, 2, 3))


def test_page_sizes_must_agree() -> None:
    allocator = SlotAllocator(8, 2)
    with pytest.raises(ValueError, match="page size 1 of the tree, 2 of the allocator"):
        SequenceCache(RadixCache(1, allocator.free), allocator)


def test_without_a_tree_every_slot_comes_back_at_the_end() -> None:
    cache = _cache(page_size=2, enabled=False)
    seq = _start(cache, 1, 2, 3)
    assert cache.publish(seq, _ids(1, 2, 3)) == range(0)
    assert seq.shared_len == 0
    cache.check()
    cache.close(seq, _ids(1, 2, 3))
    assert cache.allocator.available == cache.allocator.total
    assert _start(cache, 1, 2, 3).cached_len == 0
    cache.check()


def test_check_notices_a_slot_freed_behind_the_sequence() -> None:
    cache = _cache()
    seq = _start(cache, 1, 2)
    cache.allocator.free(seq.slots[:1])
    with pytest.raises(AssertionError, match="free 30"):
        cache.check()


class Life:
    """A request in the model: its whole text, and how much of it is computed."""

    def __init__(self, seq: CachedSequence, text: list[int]) -> None:
        self.seq = seq
        self.text = text
        self.computed = seq.cached_len

    @property
    def tokens(self) -> TokenIds:
        return _ids(*self.text[: self.computed])


class LivesModel(RuleBasedStateMachine):
    """Random lives of requests. kv[slot] names what a real pool would hold there: the namespace
    and all tokens up to that one. Whatever a sequence reads must be its own prefix.
    """

    @initialize(page_size=st.sampled_from([1, 2, 16]), enabled=st.sampled_from([True, True, False]))
    def start(self, page_size: int, enabled: bool) -> None:
        self.page = page_size
        self.cache = _cache(20 * page_size, page_size, enabled=enabled)
        self.kv: dict[int, tuple[str, tuple[int, ...]]] = {}
        self.lives: list[Life] = []
        self.known: set[tuple[str, tuple[int, ...]]] = set()  # whole pages that were ever published

    def compute(self, life: Life, count: int) -> None:
        """A forward pass: writes the pool for `count` more tokens."""
        for index in range(life.computed, life.computed + count):
            content = (life.seq.namespace, tuple(life.text[: index + 1]))
            self.kv[int(life.seq.slots[index])] = content
        life.computed += count

    def share(self, life: Life) -> None:
        for end in range(self.page, life.computed + 1, self.page):
            self.known.add((life.seq.namespace, tuple(life.text[:end])))

    def pick(self, data: st.DataObject) -> Life:
        return self.lives[data.draw(st.integers(0, len(self.lives) - 1))]

    @rule(
        namespace=st.sampled_from(["", "tenant"]),
        letters=st.lists(st.integers(0, 2), min_size=1, max_size=7),
        cut=st.integers(0, 15),
    )
    def open(self, namespace: str, letters: list[int], cut: int) -> None:
        text = [letter for letter in letters for _ in range(self.page)]
        text = text[: len(text) - cut % self.page]
        limit = len(text) - 1
        peeked = self.cache.radix.peek_length(_ids(*text), namespace, limit)
        seq = self.cache.open(_ids(*text), namespace, reuse_limit=limit)
        assert seq.cached_len == peeked == seq.length <= limit
        assert seq.cached_len % self.page == 0
        if seq.cached_len:
            assert (namespace, tuple(text[: seq.cached_len])) in self.known
        self.lives.append(Life(seq, text))

    @precondition(lambda self: self.lives)
    @rule(data=st.data(), count=st.integers(1, 40))
    def prefill(self, data: st.DataObject, count: int) -> None:
        life = self.pick(data)
        count = min(count, len(life.text) - life.seq.length)
        pages = self.cache.allocator.pages_needed(life.seq.length, count)
        fits = pages * self.page <= self.cache.available_tokens
        slots = self.cache.extend(life.seq, count)
        assert (slots is not None) == fits
        if slots is not None:
            assert life.seq.slots[life.seq.length - count :].tolist() == slots.tolist()
            self.compute(life, life.seq.length - life.computed)

    @precondition(lambda self: self.lives)
    @rule(data=st.data(), tokens=st.lists(st.integers(0, 2), min_size=1, max_size=6))
    def decode(self, data: st.DataObject, tokens: list[int]) -> None:
        chosen = data.draw(st.lists(st.sampled_from(self.lives), unique_by=id, max_size=6))
        ready = [life for life in chosen if life.computed == len(life.text)]
        for token in tokens:
            before = [life.seq.slots.tolist() for life in ready]
            slots = self.cache.extend_each([life.seq for life in ready])
            if slots is None:
                assert [life.seq.slots.tolist() for life in ready] == before
                return
            for life in ready:
                life.text.append(token)
                self.compute(life, 1)

    @precondition(lambda self: self.lives)
    @rule(data=st.data())
    def publish(self, data: st.DataObject) -> None:
        life = self.pick(data)
        before = life.seq.slots.copy()
        changed = self.cache.publish(life.seq, life.tokens)
        same = [index for index in range(life.seq.length) if index not in changed]
        assert (before[same] == life.seq.slots[same]).all()
        assert (before[list(changed)] != life.seq.slots[list(changed)]).all()
        self.share(life)
        if self.cache.radix.enabled:
            assert life.seq.shared_len == life.computed // self.page * self.page

    @precondition(lambda self: self.lives)
    @rule(data=st.data())
    def close(self, data: st.DataObject) -> None:
        life = self.pick(data)
        self.lives.remove(life)
        self.cache.close(life.seq, life.tokens)
        self.share(life)
        if self.cache.radix.enabled:
            whole = life.computed // self.page * self.page
            assert self.cache.radix.peek_length(life.tokens, life.seq.namespace) == whole

    @precondition(lambda self: self.lives)
    @rule(data=st.data())
    def discard(self, data: st.DataObject) -> None:
        life = self.pick(data)
        self.lives.remove(life)
        self.cache.discard(life.seq)

    @rule(count=st.integers(0, 40))
    def evict(self, count: int) -> None:
        self.cache.radix.evict(count)

    @precondition(lambda self: not self.lives)
    @rule()
    def reset(self) -> None:
        assert self.cache.available_tokens == self.cache.allocator.total
        self.cache.radix.reset()
        self.known.clear()

    @precondition(lambda self: hasattr(self, "cache"))
    @invariant()
    def every_sequence_reads_its_own_prefix(self) -> None:
        self.cache.check()
        assert self.cache.num_open == len(self.lives)
        for life in self.lives:
            for index, slot in enumerate(life.seq.slots[: life.computed].tolist()):
                assert self.kv[slot] == (life.seq.namespace, tuple(life.text[: index + 1]))


TestLivesModel = LivesModel.TestCase
TestLivesModel.settings = settings(max_examples=100, stateful_step_count=40)
