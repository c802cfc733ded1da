"""Waiting: the prompts of an engine that wait, with what is cached of each and being computed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from drift_scheduler.backlog import Backlog, Prompt
from drift_scheduler.simulation.kv_pool import KvPool
from drift_scheduler.simulation.request import SimRequest

# As in the serving engine: a prompt waits for others that compute so many of its tokens, and such
# a share of them.
DEFER_MIN_TOKENS = 256
DEFER_MIN_SHARE = 0.25


class Waiting:
    """The backlog, kept up to date.

    A prompt is looked up in the cache when it comes, when the first block that it lacks begins or
    ends to be computed, and when it is taken up; in between, blocks may be evicted unnoticed.
    """

    def __init__(self, pool: KvPool) -> None:
        self.backlog = Backlog()
        self._pool = pool
        self._requests: dict[str, SimRequest] = {}
        # Keys of prompts by the first block that they lack; dicts, for sets have no order.
        self._lacking: dict[int, dict[str, None]] = {}
        self._lacks: dict[str, int] = {}
        # Blocks that launched or half-filled prompts will publish, and how many of those.
        self._coming: dict[int, int] = {}

    def __len__(self) -> int:
        """Half-filled prompts are not counted."""
        return len(self._requests)

    def get(self, key: str) -> SimRequest | None:
        return self._requests.get(key)

    def add(self, request: SimRequest) -> None:
        """New or retracted; sets when its next token is due."""
        key, pace = request.key, request.pace
        self._requests[key] = request
        prompt = Prompt(key, request.prompt_tokens, 0, request.arrival_s, due_s=0.0)
        prompt, _ = self._looked_up(request, prompt)
        if pace.tokens:
            request.due_s = pace.last_s + request.slo.tbt_s
        else:
            request.due_s = request.arrival_s + request.slo.ttft_limit_s(prompt.new)
        self.backlog.add(replace(prompt, due_s=request.due_s))

    def remove(self, request: SimRequest) -> None:
        del self._requests[request.key]
        self._forget_lack(request.key)
        self.backlog.remove(request.key)

    def look_up(self, request: SimRequest) -> int:
        """How many blocks of it are cached."""
        known = self.backlog[request.key]
        prompt, found = self._looked_up(request, known)
        if prompt != known:
            self.backlog.add(prompt)
        return found

    def begin(self, request: SimRequest) -> None:
        """The prompt is half filled: the rest of it stays in the backlog."""
        self.backlog.add(
            Prompt(
                request.key,
                request.prompt_tokens - request.filled,
                request.filled,
                request.arrival_s,
                request.due_s,
                begun=True,
            )
        )

    def complete(self, request: SimRequest) -> None:
        """A half-filled prompt is filled."""
        self.backlog.remove(request.key)

    def coming(self, blocks: Iterable[int]) -> None:
        """Their computation has begun."""
        for block in blocks:
            self._coming[block] = self._coming.get(block, 0) + 1
        self._look_up_lacking(blocks)

    def come(self, blocks: Iterable[int]) -> None:
        """They are cached now."""
        for block in blocks:
            if self._coming[block] == 1:
                del self._coming[block]
            else:
                self._coming[block] -= 1
        self._look_up_lacking(blocks)

    def _looked_up(self, request: SimRequest, prompt: Prompt) -> tuple[Prompt, int]:
        blocks = request.sharable_blocks
        found = self._pool.match(blocks)
        cached = found * self._pool.block_tokens
        new = request.prompt_tokens - cached
        coming = 0
        self._forget_lack(request.key)
        if found < len(blocks):
            self._lacks[request.key] = blocks[found]
            self._lacking.setdefault(blocks[found], {})[request.key] = None
            for block in blocks[found:]:
                if block not in self._coming:
                    break
                coming += self._pool.block_tokens
        deferred = coming >= max(DEFER_MIN_TOKENS, DEFER_MIN_SHARE * new)
        return replace(prompt, new=new, cached=cached, deferred=deferred), found

    def _look_up_lacking(self, blocks: Iterable[int]) -> None:
        for block in blocks:
            for key in list(self._lacking.get(block, ())):
                self.look_up(self._requests[key])

    def _forget_lack(self, key: str) -> None:
        block = self._lacks.pop(key, None)
        if block is not None:
            keys = self._lacking[block]
            del keys[key]
            if not keys:
                del self._lacking[block]
