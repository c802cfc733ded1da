"""Waiting requests and the order in which they are tried."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from sglang.srt.requests import Request

# Ranking by matched prefix walks the tree once per request; past this many it costs more than
# it gains, and arrival order is used.
LPM_MAX_WAITING = 128


class WaitingQueue:
    """Requests that hold no device memory, by id.

    policy "fcfs": in order of arrival, retracted requests keeping their place. "lpm": longest
    cached prefix first, as `cached_prefix(request)` tells, ties by arrival. Under either, requests
    of a lower rank go in front of others.
    """

    def __init__(self, policy: str, cached_prefix: Callable[[Request], int]) -> None:
        self._policy = policy
        self._cached_prefix = cached_prefix
        self._requests: dict[str, Request] = {}
        self.tokens = 0  # of all of them

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[Request]:
        return iter(list(self._requests.values()))

    def add(self, request: Request) -> None:
        assert request.rid not in self._requests, f"{request.rid} is already waiting"
        self._requests[request.rid] = request
        self.tokens += request.num_tokens

    def remove(self, request: Request) -> None:
        del self._requests[request.rid]
        self.tokens -= request.num_tokens

    def get(self, rid: str) -> Request | None:
        return self._requests.get(rid)

    def in_order(self) -> list[Request]:
        by_arrival = sorted(self._requests.values(), key=lambda request: request.arrival_s)
        if self._policy == "lpm" and len(by_arrival) <= LPM_MAX_WAITING:
            by_arrival.sort(key=self._cached_prefix, reverse=True)
        by_arrival.sort(key=lambda request: request.rank)
        return by_arrival
