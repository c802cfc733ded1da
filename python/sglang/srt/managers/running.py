"""RunningRequests: who wants another decode step, and what that step would be."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from drift_scheduler.gang import DecodeLoad
from drift_scheduler.shapes import DecodeShape
from sglang.srt.managers.batch_builder import sequence_of
from sglang.srt.requests import Request


class RunningRequests:
    """Requests in the order in which they joined. `members` is never changed in place, so that a
    launch can keep it.

    The load is asked for at every turn, so sums are kept: a request counts for the tokens that it
    attends to in its next step, which are those that have a slot and one more.
    """

    def __init__(self) -> None:
        self.members: Sequence[Request] = []
        self._context = 0
        self._tbt_s: float | None = math.inf  # None: to be looked up
        # Those that have joined since the last launch.
        self._joined: list[Request] = []
        # Those whose next token depends on the one before it.
        self._constrained: list[Request] = []

    def __len__(self) -> int:
        return len(self.members)

    def __contains__(self, request: Request) -> bool:
        return request in self.members

    @property
    def awaits_tokens(self) -> bool:
        """Whether the next step cannot be launched yet: the host does not know a token on which
        the one behind it depends."""
        return any(r.launched_output > len(r.output) for r in self._constrained)

    def join(self, requests: Iterable[Request]) -> None:
        joined = list(requests)
        if not joined:
            return
        self.members = [*self.members, *joined]
        self._joined += joined
        self._constrained += [r for r in joined if r.constraint is not None]
        for request in joined:
            self._context += sequence_of(request).length + 1
            if self._tbt_s is not None:
                self._tbt_s = min(self._tbt_s, request.slo.tbt_s)

    def remove(self, request: Request) -> None:
        """Only while it holds its sequence."""
        self.members = [other for other in self.members if other is not request]
        if request in self._joined:
            self._joined.remove(request)
        if request in self._constrained:
            self._constrained.remove(request)
        self._forget(request)

    def launched(self) -> DecodeShape:
        """A step of all members is, with a slot for the new token of each; who wants no further
        one leaves. Returns the shape of the step."""
        members = self.members
        shape = DecodeShape(len(members), self._context)
        self._joined = []
        self._context += len(members)
        leaving = [r for r in members if r.launched_output >= r.max_new_tokens]
        if leaving:
            self.members = [request for request in members if request.wants_step]
            self._constrained = [request for request in self._constrained if request.wants_step]
            for request in leaving:
                self._forget(request)
        return shape

    def load(self) -> DecodeLoad:
        if self._tbt_s is None:
            self._tbt_s = min((request.slo.tbt_s for request in self.members), default=math.inf)
        due_s = math.inf
        for request in self._joined:
            if request.jobs_in_flight == 0 and request.pace.tokens == len(request.output):
                due_s = min(due_s, request.next_token_due_s)
        shape = DecodeShape(len(self.members), self._context)
        return DecodeLoad(shape, self._tbt_s, due_s, self.awaits_tokens)

    def check(self) -> None:
        """Asserts that what is kept of the members is true of them."""
        constrained = [request for request in self.members if request.constraint is not None]
        assert self._constrained == constrained, f"{len(constrained)} members are constrained"
        context = sum(sequence_of(request).length + 1 for request in self.members)
        assert self._context == context, f"context {self._context} kept, {context} counted"

    def _forget(self, request: Request) -> None:
        self._context -= sequence_of(request).length + 1
        if request.slo.tbt_s == self._tbt_s:
            self._tbt_s = None
