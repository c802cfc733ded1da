"""Router: to which of many replicas a request goes."""

from __future__ import annotations

from collections.abc import Sequence

# A replica has fewer than a million requests, so tokens and requests compare as one number.
_REQUESTS_BITS = 20


class Router:
    """Prefix-aware and load-aware.

    A request goes to the replica with the longest cached prefix of it, the least loaded one of
    several; but if that replica has over `slack_tokens` more prompt tokens to fill than the least
    loaded replica, it goes to the latter. Load: prompt tokens to fill, then requests.

    It knows what replicas hold, as a router does that hears of every block cached and evicted;
    prefixes that are still being computed are not known yet.
    """

    def __init__(self, replicas: int, slack_tokens: int) -> None:
        if replicas < 1 or slack_tokens < 0:
            raise ValueError(f"replicas={replicas}, slack_tokens={slack_tokens}")
        self._slack_tokens = slack_tokens
        self._loads = [0] * replicas
        # Replicas by block, a dict for its order: the same run makes the same choices.
        self._holders: dict[int, dict[int, None]] = {}

    def load(self, replica: int, tokens: int, requests: int) -> None:
        """What it has to do from now on."""
        self._loads[replica] = (tokens << _REQUESTS_BITS) + requests

    def cached(self, replica: int, block: int) -> None:
        self._holders.setdefault(block, {})[replica] = None

    def evicted(self, replica: int, block: int) -> None:
        holders = self._holders[block]
        del holders[replica]
        if not holders:
            del self._holders[block]

    def choose(self, blocks: Sequence[int]) -> int:
        """blocks: ids of the request's full prompt blocks; each stands for all before it."""
        loads = self._loads
        lowest = min(loads)
        # A replica keeps a block only as long as those before it, so the last block that any
        # has is the longest prefix.
        for block in reversed(blocks):
            holders = self._holders.get(block)
            if holders:
                best = min(holders, key=loads.__getitem__)
                if self._tokens(loads[best]) - self._tokens(lowest) <= self._slack_tokens:
                    return best
                break
        return loads.index(lowest)

    @staticmethod
    def _tokens(load: int) -> int:
        return load >> _REQUESTS_BITS
