"""Splits a byte stream into the payloads of its server-sent events."""

from __future__ import annotations

DONE = b"[DONE]"


class SseSplitter:
    """Feed it reads of any size; it returns the payloads of the `data:` lines now complete.

    One payload a line is all that the servers we speak to send, so events are not joined.
    """

    __slots__ = ("_rest",)

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, chunk: bytes) -> list[bytes]:
        lines = (self._rest + chunk).split(b"\n") if self._rest else chunk.split(b"\n")
        self._rest = lines.pop()
        return [line[5:].strip() for line in lines if line.startswith(b"data:")]
