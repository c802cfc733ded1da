"""KvPool: the tokens of a KV pool, some of them cached prefix blocks.

The serving engine's prefix tree works token by token; here a prefix is shared in whole blocks, of
BLOCK_TOKENS as traces describe it, or of fewer where prompts are known more closely. A block's id
stands for its content and for all before it, so a prompt's ids are a path and equal ids are equal
prefixes.

    free | cached, nobody reads it (evictable) | cached, read by requests | requests' own
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

BLOCK_TOKENS = 512


def _ignore(block: int) -> None:
    return None


class KvPool:
    """Counts of `capacity` tokens. cached, evicted: called with each block that comes or goes.

    block_tokens: of a cached block.
    """

    def __init__(
        self,
        capacity: int,
        cached: Callable[[int], None] = _ignore,
        evicted: Callable[[int], None] = _ignore,
        block_tokens: int = BLOCK_TOKENS,
    ) -> None:
        self.capacity = capacity
        self.block_tokens = block_tokens
        self._cached = cached
        self._evicted = evicted
        self._readers: dict[int, int] = {}  # of every cached block
        # Blocks without readers, the next to go first. A path is let go from its end, so that
        # a block never goes before those that continue it.
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._own = 0

    @property
    def free_tokens(self) -> int:
        return self.capacity - self._own - self.block_tokens * len(self._readers)

    @property
    def available_tokens(self) -> int:
        """What `take` can give: free ones and those of evictable blocks."""
        return self.free_tokens + self.block_tokens * len(self._idle)

    def available_beside(self, blocks: Sequence[int]) -> int:
        """available_tokens once these cached blocks are read."""
        idle = sum(block in self._idle for block in blocks)
        return self.available_tokens - self.block_tokens * idle

    def match(self, blocks: Sequence[int]) -> int:
        """How many of them are cached, from the first on."""
        readers = self._readers
        for position, block in enumerate(blocks):
            if block not in readers:
                return position
        return len(blocks)

    def read(self, blocks: Sequence[int]) -> None:
        """Keeps cached blocks from being evicted until `let_go`."""
        for block in blocks:
            self._readers[block] += 1
            self._idle.pop(block, None)

    def let_go(self, blocks: Sequence[int]) -> None:
        for block in reversed(blocks):
            self._readers[block] -= 1
            if self._readers[block] == 0:
                self._idle[block] = None

    def take(self, tokens: int) -> bool:
        """Tokens of one's own, of evicted blocks if need be; False, and nothing, without room."""
        missing = tokens - self.free_tokens
        if missing > self.block_tokens * len(self._idle):
            return False
        while missing > 0:
            block, _ = self._idle.popitem(last=False)
            del self._readers[block]
            self._evicted(block)
            missing -= self.block_tokens
        self._own += tokens
        return True

    def give_back(self, tokens: int) -> None:
        assert 0 <= tokens <= self._own, f"{tokens} tokens given back of {self._own}"
        self._own -= tokens

    def publish(self, blocks: Sequence[int]) -> None:
        """Own tokens become cached blocks, which are read from now on.

        Where a block has been cached meanwhile, that one is read and the own tokens are free.
        """
        self.give_back(self.block_tokens * len(blocks))
        for block in blocks:
            if block not in self._readers:
                self._readers[block] = 0
                self._cached(block)
            self._readers[block] += 1
            self._idle.pop(block, None)

    def check(self, own: int) -> None:
        """Asserts that the counts agree; own: tokens that the requests know to hold."""
        assert self._own == own, f"{self._own} own tokens, requests hold {own}"
        assert self.free_tokens >= 0, f"{-self.free_tokens} tokens more than there are"
        idle = {block for block, readers in self._readers.items() if readers == 0}
        assert idle == set(self._idle), "idle blocks are those without readers"
