"""RadixCache: a tree over token ids that remembers which slots hold their keys and values.

Each edge of the tree is a run of whole pages. Two children of one node differ in their first
page, so a page decides where to descend. Requests of different namespaces never share: every
namespace has a tree of its own.

The tree owns the slots it names. `lock` keeps a path from eviction while a request reads it;
what is not locked may go at any `evict`, least recently used leaf first, from its tail.
Nothing here knows devices or wall time: recency is a counter of look-ups and insertions.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sglang.srt.mem_cache.slot_allocator import SlotAllocator, SlotIds

TokenIds = npt.NDArray[np.int32]
PageKey = int | bytes  # a page of one token is its id, a longer one its bytes

_NO_IDS = np.empty(0, dtype=np.int32)
_NO_IDS.flags.writeable = False


class Node:
    """A run of tokens and the slots that hold them. Callers keep nodes only to lock them."""

    __slots__ = (
        "children",
        "last_access",
        "locks",
        "namespace",
        "parent",
        "queued",
        "serial",
        "slots",
        "tokens",
    )

    def __init__(
        self,
        parent: Node | None,
        tokens: TokenIds,
        slots: SlotIds,
        *,
        namespace: str,
        last_access: int,
        serial: int,
    ) -> None:
        self.parent = parent  # None for the root of a namespace, which holds no tokens
        self.tokens = tokens
        self.slots = slots
        self.namespace = namespace
        self.last_access = last_access
        self.serial = serial  # breaks ties in the eviction heap
        self.children: dict[PageKey, Node] = {}
        self.locks = 0  # of this node and of everything below it
        self.queued = False  # has an entry in the eviction heap

    @property
    def evictable(self) -> bool:
        return self.parent is not None and not self.children and self.locks == 0


@dataclass(frozen=True, slots=True)
class Match:
    """The longest cached prefix: slots [length] i32 and the node it ends at.

    Lock the node before the next call that could evict.
    """

    length: int
    slots: SlotIds
    node: Node


@dataclass(frozen=True, slots=True)
class Inserted:
    """What the tree made of an insertion, by token position:

        [ the tree had it: existing | taken over | left to the caller ]
        0                           existing     length

    The tree now owns the caller's slots of [existing, length). Of [0, existing) it keeps its own,
    `existing_slots`; where the caller's slot differs, the caller still owns a duplicate and frees
    it. What lies at or behind `length` (an unfinished page; everything if caching is off) stays
    the caller's. `node` is where the prefix of `length` tokens ends.
    """

    length: int
    existing: int
    existing_slots: SlotIds
    node: Node


@dataclass(slots=True)
class CacheStats:
    """Counters since the start; `reset` of the tree leaves them alone."""

    looked_up_tokens: int = 0
    matched_tokens: int = 0
    evicted_tokens: int = 0


class RadixCache:
    """The prefix tree. `on_free` receives the slots [n] i32 that eviction and reset give up.

    With `enabled=False` nothing ever matches and insertions are declined, so that callers need
    no second code path.
    """

    def __init__(
        self, page_size: int, on_free: Callable[[SlotIds], None], *, enabled: bool = True
    ) -> None:
        if page_size < 1:
            raise ValueError(f"page_size={page_size} must be at least 1")
        self.page_size = page_size
        self.enabled = enabled
        self.evictable = 0  # tokens in nodes without locks
        self.protected = 0  # tokens in locked nodes
        self.total_nodes = 0  # roots left aside
        self.stats = CacheStats()
        self._on_free = on_free
        self._roots: dict[str, Node] = {}  # namespaces that hold something
        self._clock = 0
        self._serials = itertools.count()
        # Every evictable node has one entry. Recency only grows, so an entry's time is a lower
        # bound: `evict` puts an outdated entry back with its present time and looks further.
        self._heap: list[tuple[int, int, Node]] = []

    def match(self, tokens: TokenIds, namespace: str, limit: int | None = None) -> Match:
        """The longest cached prefix of tokens [n] i32, in whole pages, of at most `limit` tokens.

        Counts as a use of it. A node that matches in part is split there.
        """
        self.stats.looked_up_tokens += len(tokens)
        path = list(self._descend(_head(tokens, limit), namespace))
        nodes = self._claim(path)
        slots = np.concatenate([node.slots for node in nodes]) if nodes else _NO_IDS
        self.stats.matched_tokens += len(slots)
        return Match(len(slots), slots, nodes[-1] if nodes else self._root(namespace))

    def peek_length(self, tokens: TokenIds, namespace: str, limit: int | None = None) -> int:
        """The length that `match` would find, without a trace of having asked."""
        return sum(shared for _, shared in self._descend(_head(tokens, limit), namespace))

    def insert(self, tokens: TokenIds, slots: SlotIds, namespace: str) -> Inserted:
        """Offers the whole pages of tokens [n] i32, held in slots [n] i32. See Inserted.

        Both arrays are copied.
        """
        if len(tokens) != len(slots):
            raise ValueError(f"{len(tokens)} tokens with {len(slots)} slots")
        length = len(tokens) // self.page_size * self.page_size if self.enabled else 0
        path = list(self._descend(tokens[:length], namespace))
        nodes = self._claim(path)
        existing = sum(shared for _, shared in path)
        existing_slots = np.concatenate([node.slots for node in nodes]) if nodes else _NO_IDS
        node = nodes[-1] if nodes else self._root(namespace)
        if existing < length:
            node = self._attach(node, tokens[existing:length].copy(), slots[existing:length].copy())
        return Inserted(length, existing, existing_slots, node)

    def lock(self, node: Node) -> None:
        """Keeps the prefix that ends at `node` until the matching `unlock`."""
        for step in _path_to_root(node):
            if step.locks == 0:
                self.evictable -= len(step.tokens)
                self.protected += len(step.tokens)
            step.locks += 1

    def unlock(self, node: Node) -> None:
        """Takes back one `lock` of the same node."""
        for step in _path_to_root(node):
            assert step.locks > 0, f"node of {len(step.tokens)} tokens unlocked without a lock"
            step.locks -= 1
            if step.locks == 0:
                self.protected -= len(step.tokens)
                self.evictable += len(step.tokens)
        self._queue_for_eviction(node)

    def evict(self, count: int) -> int:
        """Gives up at least `count` tokens if so many are evictable; returns how many it gave up.

        The least recently used leaf goes first, from its tail and in whole pages; a parent becomes
        a leaf when its last child is gone.
        """
        given_up: list[SlotIds] = []
        missing = count
        while missing > 0 and self._heap:
            queued_access, _, node = heapq.heappop(self._heap)
            node.queued = False
            if not node.evictable:
                continue  # queued again when its last lock or child goes
            if node.last_access > queued_access:
                self._queue_for_eviction(node)
                continue
            kept = max(0, len(node.tokens) - missing) // self.page_size * self.page_size
            given_up.append(node.slots[kept:])
            missing -= len(node.tokens) - kept
            if kept:
                node.tokens, node.slots = node.tokens[:kept], node.slots[:kept]
                self._queue_for_eviction(node)
            else:
                self._detach(node)
        if not given_up:
            return 0
        slots = np.concatenate(given_up)
        self.evictable -= len(slots)
        self.stats.evicted_tokens += len(slots)
        self._on_free(slots)
        return len(slots)

    def reset(self) -> None:
        """Forgets and frees everything. Nothing may be locked."""
        assert self.protected == 0, f"reset with {self.protected} tokens locked"
        slots = [node.slots for node in self._nodes()]
        self._roots.clear()
        self._heap.clear()
        self.evictable = 0
        self.total_nodes = 0
        if slots:
            self._on_free(np.concatenate(slots))

    def held_slots(self) -> SlotIds:
        """Every slot that the tree owns, in no particular order."""
        return np.concatenate([_NO_IDS, *(node.slots for node in self._nodes())])

    def check(self, allocator: SlotAllocator, in_flight: int) -> None:
        """Recounts the tree and asserts that every slot is accounted for exactly once.

        in_flight: slots in pages that neither the tree nor the allocator's free list holds.
        """
        evictable = protected = nodes = 0
        for node in self._nodes():
            nodes += 1
            if node.locks:
                protected += len(node.tokens)
            else:
                evictable += len(node.tokens)
            self._check_node(node)
        for namespace, root in self._roots.items():
            assert root.children, f"namespace {namespace!r} holds nothing and has a root"
        assert (self.evictable, self.protected, self.total_nodes) == (
            evictable,
            protected,
            nodes,
        ), (
            f"evictable, protected, nodes: counted {evictable}, {protected}, {nodes}, "
            f"kept {self.evictable}, {self.protected}, {self.total_nodes}"
        )
        held = self.held_slots()
        times = np.bincount(held, minlength=1)
        assert times.max() <= 1, f"slot {times.argmax()} occurs {times.max()} times in the tree"
        assert not allocator.is_free(held).any(), "the tree holds a slot that is free"
        free = allocator.available
        assert free + evictable + protected + in_flight == allocator.total, (
            f"free {free} + evictable {evictable} + protected {protected} + in flight {in_flight} "
            f"!= total {allocator.total}"
        )

    def _check_node(self, node: Node) -> None:
        size, page = len(node.tokens), self.page_size
        parent = node.parent
        assert parent is not None, "a root occurs below a root"
        assert size > 0, "node without tokens"
        assert size % page == 0, f"node of {size} tokens, page size {page}"
        assert len(node.slots) == size, f"node of {size} tokens and {len(node.slots)} slots"
        assert parent.children.get(self._page_key(node.tokens, 0)) is node, (
            f"node of {size} tokens hangs at a wrong key"
        )
        by_page = node.slots.reshape(-1, page)
        assert (by_page == by_page[:, :1] // page * page + np.arange(page)).all(), (
            f"node of {size} tokens with a page that is not {page} slots in order"
        )
        below = sum(child.locks for child in node.children.values())
        assert node.locks >= below, f"node with {node.locks} locks above {below}"
        assert node.queued or not node.evictable, "an evictable leaf is not queued for eviction"

    def _descend(self, tokens: TokenIds, namespace: str) -> Iterator[tuple[Node, int]]:
        """Nodes along `tokens` with the number of tokens, in whole pages, each one shares."""
        assert tokens.dtype == np.int32, f"tokens are {tokens.dtype}, not int32"
        node = self._roots.get(namespace)
        start = 0
        while node is not None and len(tokens) - start >= self.page_size:
            node = node.children.get(self._page_key(tokens, start))
            if node is None:
                return
            shared = _common_length(node.tokens, tokens[start:]) // self.page_size * self.page_size
            yield node, shared
            if shared < len(node.tokens):
                return
            start += shared

    def _claim(self, path: list[tuple[Node, int]]) -> list[Node]:
        """The nodes of a finished descent, marked as used now, the last one split if need be."""
        self._clock += 1
        nodes = [node for node, _ in path]
        if path:
            last, shared = path[-1]
            if shared < len(last.tokens):
                nodes[-1] = self._split(last, shared)
        for node in nodes:
            node.last_access = self._clock
        return nodes

    def _split(self, node: Node, length: int) -> Node:
        """Puts a new node with the first `length` tokens above `node`, and returns it.

        `node` keeps its tail and its identity: whoever locked it holds the same tokens as before.
        """
        assert node.parent is not None, "a root has nothing to split"
        upper = self._new_node(node.parent, node.tokens[:length], node.slots[:length])
        upper.locks = node.locks
        upper.last_access = node.last_access
        node.parent.children[self._page_key(upper.tokens, 0)] = upper
        node.parent = upper
        node.tokens, node.slots = node.tokens[length:], node.slots[length:]
        upper.children[self._page_key(node.tokens, 0)] = node
        self.total_nodes += 1
        return upper

    def _attach(self, parent: Node, tokens: TokenIds, slots: SlotIds) -> Node:
        """Hangs an unlocked leaf below `parent`."""
        if parent.parent is None:
            self._roots[parent.namespace] = parent
        leaf = self._new_node(parent, tokens, slots)
        parent.children[self._page_key(tokens, 0)] = leaf
        self.total_nodes += 1
        self.evictable += len(tokens)
        self._queue_for_eviction(leaf)
        return leaf

    def _detach(self, leaf: Node) -> None:
        """Takes an evicted leaf out of the tree, and a namespace with nothing left out of sight."""
        parent = leaf.parent
        assert parent is not None, "a root is never evicted"
        del parent.children[self._page_key(leaf.tokens, 0)]
        self.total_nodes -= 1
        if parent.parent is None and not parent.children:
            del self._roots[parent.namespace]
        self._queue_for_eviction(parent)

    def _queue_for_eviction(self, node: Node) -> None:
        if node.evictable and not node.queued:
            node.queued = True
            heapq.heappush(self._heap, (node.last_access, node.serial, node))

    def _root(self, namespace: str) -> Node:
        """The root of a namespace. A new one enters `_roots` with its first child."""
        root = self._roots.get(namespace)
        if root is None:
            root = Node(None, _NO_IDS, _NO_IDS, namespace=namespace, last_access=0, serial=0)
        return root

    def _new_node(self, parent: Node, tokens: TokenIds, slots: SlotIds) -> Node:
        return Node(
            parent,
            tokens,
            slots,
            namespace=parent.namespace,
            last_access=self._clock,
            serial=next(self._serials),
        )

    def _page_key(self, tokens: TokenIds, start: int) -> PageKey:
        if self.page_size == 1:
            return int(tokens[start])
        return tokens[start : start + self.page_size].tobytes()

    def _nodes(self) -> Iterator[Node]:
        """Every node but the roots, parents first."""
        waiting = [child for root in self._roots.values() for child in root.children.values()]
        while waiting:
            node = waiting.pop()
            waiting.extend(node.children.values())
            yield node


def _head(tokens: TokenIds, limit: int | None) -> TokenIds:
    if limit is not None and limit < 0:
        raise ValueError(f"limit={limit} must be at least 0")
    return tokens[:limit]


def _path_to_root(node: Node) -> Iterator[Node]:
    """`node` and its ancestors below the root."""
    step = node
    while step.parent is not None:
        yield step
        step = step.parent


def _common_length(a: TokenIds, b: TokenIds) -> int:
    """How many leading tokens a and b share."""
    shorter = min(len(a), len(b))
    differs = a[:shorter] != b[:shorter]
    first = int(differs.argmax()) if shorter else 0
    return first if shorter and differs[first] else shorter
