"""Request ids: the client's names for its requests and the ids that travel inside.

Inside the server an abort goes by prefix, so an id must never be the beginning of another one.
A client may choose "1" and "10"; inside they become "00000005:1" and "00000006:10".
"""

from __future__ import annotations

from collections.abc import Sequence

from sglang.srt.errors import RequestError


def public_ids(rid: str | Sequence[str], answers: Sequence[int]) -> list[str]:
    """One id for each answer, prompt by prompt; `answers[i]` is how many prompt i asks for.

    A string names a lone answer and is the prefix of several. A list names each prompt.
    Raises RequestError naming `rid`.
    """
    total = sum(answers)
    if isinstance(rid, str):
        _check(rid)
        return [rid] if total == 1 else [f"{rid}_{i}" for i in range(total)]
    if len(rid) != len(answers):
        raise RequestError(f"rid: got {len(rid)} ids for {len(answers)} prompts", "rid")
    ids: list[str] = []
    for name, n in zip(rid, answers, strict=True):
        _check(name)
        ids += [name] if n == 1 else [f"{name}_{j}" for j in range(n)]
    if len(set(ids)) != len(ids):
        raise RequestError("rid: the same id is given twice", "rid")
    return ids


class WireIds:
    """Makes ids of which none is the beginning of another."""

    def __init__(self) -> None:
        self._made = 0

    def make(self, public_id: str) -> str:
        self._made += 1
        return f"{self._made:08x}:{public_id}"


def _check(rid: str) -> None:
    if not rid:
        raise RequestError("rid: must not be empty", "rid")
