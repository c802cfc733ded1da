"""Backlog: the prompts that wait, by when their first token is due, and by rank and arrival."""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt that waits for a launch to take it up, or the rest of a half-filled one.

    new: tokens to compute. cached: those before them that are computed already or were found in
    the prefix cache. due_s: when its first token is due. deferred: most of `new` is also being
    computed for another prompt, and will soon be cached. begun: half filled; it holds memory.
    rank: lower ones go first.
    """

    key: str
    new: int
    cached: int
    arrival_s: float
    due_s: float
    deferred: bool = False
    begun: bool = False
    rank: int = 0


class Backlog:
    """Prompts by key. Adding and removing take O(log n) comparisons, looking at k prompts O(k)."""

    def __init__(self) -> None:
        self._prompts: dict[str, Prompt] = {}
        # Keys are distinct, so prompts themselves are never compared.
        self._by_due: list[tuple[float, float, str, Prompt]] = []
        self._by_rank: list[tuple[int, float, str, Prompt]] = []
        self.new_tokens = 0  # of all of them
        self._begun: str | None = None

    def __len__(self) -> int:
        return len(self._prompts)

    def __contains__(self, key: str) -> bool:
        return key in self._prompts

    def __getitem__(self, key: str) -> Prompt:
        return self._prompts[key]

    def add(self, prompt: Prompt) -> None:
        """Takes the prompt, in place of one with the same key."""
        if prompt.key in self._prompts:
            self.remove(prompt.key)
        self._prompts[prompt.key] = prompt
        insort(self._by_due, (prompt.due_s, prompt.arrival_s, prompt.key, prompt))
        insort(self._by_rank, (prompt.rank, prompt.arrival_s, prompt.key, prompt))
        self.new_tokens += prompt.new
        if prompt.begun:
            self._begun = prompt.key

    def remove(self, key: str) -> None:
        prompt = self._prompts.pop(key)
        del self._by_due[bisect_left(self._by_due, (prompt.due_s, prompt.arrival_s, key))]
        del self._by_rank[bisect_left(self._by_rank, (prompt.rank, prompt.arrival_s, key))]
        self.new_tokens -= prompt.new
        if key == self._begun:
            self._begun = None

    @property
    def begun(self) -> Prompt | None:
        """The half-filled prompt, if there is one."""
        return None if self._begun is None else self._prompts[self._begun]

    def first_due(self, after_s: float, limit: int) -> list[Prompt]:
        """Up to `limit` prompts due at `after_s` or later, the most urgent first."""
        start = bisect_left(self._by_due, (after_s,))
        return [entry[-1] for entry in self._by_due[start : start + limit]]

    def oldest(self, limit: int) -> list[Prompt]:
        """Up to `limit` prompts of the lowest ranks, of equal ones in order of arrival."""
        return [entry[-1] for entry in self._by_rank[:limit]]
