"""PromptBacklog: keeps what a dispatcher may know of the waiting prompts in step with them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

from drift_scheduler.backlog import Backlog, Prompt
from sglang.srt.managers.batch_builder import sequence_of
from sglang.srt.mem_cache.radix_cache import RadixCache, TokenIds
from sglang.srt.requests import Request

# Walks through the prefix tree each time that it has grown.
REFRESHED_PROMPTS = 16
# Prompts compared with those in flight each time that these change.
COMPARED_PROMPTS = 32
# A prompt waits for another one that computes so many of its tokens, and such a share of them.
DEFER_MIN_TOKENS = 256
DEFER_MIN_SHARE = 0.25


class PromptBacklog:
    """Requests enter with `add` and leave with `remove`; in between they may begin.

    How much of a prompt is cached is looked up when it arrives; what the tree learns later shows
    after `refresh_cached`.
    """

    def __init__(self, radix: RadixCache) -> None:
        self.backlog = Backlog()
        self._radix = radix
        self._requests: dict[str, Request] = {}
        self._deferred: set[str] = set()
        self._compared_with: list[Request] = []

    def add(self, request: Request) -> None:
        """The request waits, new or retracted; sets when its next token is due."""
        cached = self._cached(request)
        if request.output:
            request.due_s = request.next_token_due_s
        else:
            request.uncached_at_arrival = request.num_tokens - cached
            limit_s = request.slo.ttft_limit_s(request.uncached_at_arrival)
            request.due_s = request.arrival_s + limit_s
        self._requests[request.rid] = request
        self.backlog.add(
            Prompt(
                key=request.rid,
                new=request.num_tokens - cached,
                cached=cached,
                arrival_s=request.arrival_s,
                due_s=request.due_s,
                rank=request.rank,
            )
        )

    def begin(self, request: Request) -> None:
        """The prompt is half filled: what its sequence has no slots for yet is left of it."""
        computed = sequence_of(request).length
        self._deferred.discard(request.rid)
        self.backlog.add(
            replace(
                self.backlog[request.rid],
                new=request.num_tokens - computed,
                cached=computed,
                deferred=False,
                begun=True,
            )
        )

    def remove(self, request: Request) -> None:
        del self._requests[request.rid]
        self._deferred.discard(request.rid)
        self.backlog.remove(request.rid)

    def refresh_cached(self) -> None:
        """The tree has changed: looks again how much of the most urgent prompts it has."""
        for prompt in self.backlog.first_due(-math.inf, REFRESHED_PROMPTS):
            request = self._requests[prompt.key]
            if prompt.begun or (cached := self._cached(request)) == prompt.cached:
                continue
            self.backlog.add(replace(prompt, cached=cached, new=request.num_tokens - cached))

    def defer_behind(self, filling: Sequence[Request]) -> None:
        """Marks the most urgent prompts that had better wait for those being filled, no others."""
        if filling == self._compared_with or not self._radix.enabled:
            return
        self._compared_with = list(filling)
        others = [(request.namespace, request.tokens()) for request in filling]
        deferred: set[str] = set()
        if others:
            urgent = self.backlog.first_due(-math.inf, COMPARED_PROMPTS)
            deferred = {prompt.key for prompt in urgent if self._waits_for_one(prompt, others)}
        for key in deferred ^ self._deferred:
            self.backlog.add(replace(self.backlog[key], deferred=key in deferred))
        self._deferred = deferred

    def defer_arrival(self, request: Request, filling: Iterable[Request]) -> None:
        """Marks one prompt that has just been added, if it had better wait."""
        prompt = self.backlog[request.rid]
        others = [(other.namespace, other.tokens()) for other in filling]
        if self._radix.enabled and self._waits_for_one(prompt, others):
            self._deferred.add(prompt.key)
            self.backlog.add(replace(prompt, deferred=True))

    def check(self, waiting: Iterable[Request], half_filled: Request | None) -> None:
        """Asserts that the backlog holds these and says of them what is true."""
        waiting = list(waiting)
        keys = {request.rid for request in waiting}
        if half_filled is not None:
            waiting.append(half_filled)
        assert len(self.backlog) == len(waiting), f"{len(self.backlog)} kept, {len(waiting)} wait"
        for request in waiting:
            prompt = self.backlog[request.rid]
            assert prompt.new + prompt.cached == request.num_tokens, prompt
            assert prompt.begun == (request.rid not in keys), prompt
            assert prompt.deferred == (request.rid in self._deferred), prompt
            assert prompt.due_s == request.due_s, prompt

    def _cached(self, request: Request) -> int:
        """Of at most those that need not be computed."""
        return self._radix.peek_length(
            request.tokens(), request.namespace, limit=request.reuse_limit
        )

    def _waits_for_one(self, prompt: Prompt, others: Iterable[tuple[str, TokenIds]]) -> bool:
        wanted = max(DEFER_MIN_TOKENS, DEFER_MIN_SHARE * prompt.new)
        if prompt.begun or prompt.new < wanted:
            return False
        request, cached = self._requests[prompt.key], prompt.cached
        tokens = request.tokens()
        if request.reuse_limit - cached < wanted:
            return False
        return any(
            namespace == request.namespace
            and len(theirs) - cached >= wanted
            and theirs[cached] == tokens[cached]  # mostly not: then no more need be compared
            and _common_length(tokens, theirs) - cached >= wanted
            for namespace, theirs in others
        )


def _common_length(a: TokenIds, b: TokenIds) -> int:
    shorter = min(len(a), len(b))
    differs = a[:shorter] != b[:shorter]
    return int(differs.argmax()) if differs.any() else shorter
