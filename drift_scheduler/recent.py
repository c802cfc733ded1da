"""Recent: the newest entries of a stream, read page by page while it grows."""

from __future__ import annotations

import itertools
from bisect import bisect_left
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Recent(Generic[T]):
    """A ring. A cursor is the number of entries that were added before the one it points at."""

    def __init__(self, capacity: int) -> None:
        self._entries: deque[T] = deque(maxlen=capacity)
        self.added = 0
        """Since the start; also the cursor of the next entry."""

    def add(self, entry: T) -> None:
        self._entries.append(entry)
        self.added += 1

    @property
    def first(self) -> int:
        """Cursor of the oldest entry that is still here."""
        return self.added - len(self._entries)

    def find(self, time_s: float, time_of: Callable[[T], float]) -> int:
        """Cursor of the first entry at or after `time_s`; entries must be in order of time."""
        return self.first + bisect_left(self._entries, time_s, key=time_of)

    def page(self, cursor: int, limit: int) -> list[T]:
        """Up to `limit` entries from the cursor on, or from the oldest if that one is gone."""
        start = max(cursor - self.first, 0)
        return list(itertools.islice(self._entries, start, start + limit))
