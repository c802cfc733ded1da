"""The sockets between our processes: one-way ZMQ PUSH/PULL over ipc, one message type a direction.

Queues have no limit: the number of messages in flight is bounded by the number of requests in
flight, and a sender that blocked would stop a lane.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Generic, TypeVar

import zmq
import zmq.asyncio

from sglang.srt.messages import Message, Ready, decoder_for, encode

M = TypeVar("M")

_LAST_WORDS_MS = 500  # how long a closing sender may take to hand over what it still holds


@dataclass(frozen=True, slots=True)
class IpcNames:
    """The address that each process listens on, `ipc:///path`."""

    tokenizer: str
    scheduler: str
    detokenizer: str


@contextmanager
def ipc_directory() -> Iterator[IpcNames]:
    """Addresses in a fresh private directory, which is removed with its sockets on the way out."""
    directory = Path(tempfile.mkdtemp(prefix="sglang-ipc-"))
    ipc = IpcNames(
        tokenizer=f"ipc://{directory / 'tokenizer'}",
        scheduler=f"ipc://{directory / 'scheduler'}",
        detokenizer=f"ipc://{directory / 'detokenizer'}",
    )
    try:
        yield ipc
    finally:
        remove_ipc_directory(ipc)


def remove_ipc_directory(ipc: IpcNames) -> None:
    """Removes what `ipc_directory` made; for a process that will not leave its block."""
    shutil.rmtree(Path(ipc.tokenizer.removeprefix("ipc://")).parent, ignore_errors=True)


class Sender:
    """The PUSH end. `send` never blocks; the receiver may start later."""

    def __init__(self, context: zmq.Context[Any], address: str) -> None:
        self._socket: zmq.Socket[bytes] = zmq.Socket(context, zmq.PUSH)
        self._socket.set(zmq.SNDHWM, 0)
        self._socket.set(zmq.LINGER, _LAST_WORDS_MS)
        self._socket.connect(address)

    def send(self, message: Message) -> None:
        self._socket.send(encode(message), zmq.NOBLOCK)

    def close(self) -> None:
        self._socket.close()


class Receiver(Generic[M]):
    """The PULL end of messages of one union, e.g. `Receiver(context, address, ToScheduler)`."""

    def __init__(self, context: zmq.Context[Any], address: str, union: Any) -> None:
        self._socket: zmq.Socket[bytes] = zmq.Socket(context, zmq.PULL)
        self._decode = decoder_for(union).decode
        _listen(self._socket, address)

    def drain(self) -> list[M]:
        """Everything that has arrived; never blocks."""
        return [self._decode(frame) for frame in _arrived(self._socket)]

    def has_messages(self) -> bool:
        events = self._socket.getsockopt(zmq.EVENTS)  # cheaper than a poll
        assert isinstance(events, int), type(events)
        return bool(events & zmq.POLLIN)

    def wait(self, timeout_ms: int, other_fd: int | None = None) -> None:
        """Returns once a message has arrived, `other_fd` is readable, or time is up."""
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        if other_fd is not None:
            poller.register(other_fd, zmq.POLLIN)
        poller.poll(timeout_ms)

    def recv_all(self, timeout_ms: int | None = None) -> list[M]:
        """Waits for a message, then takes all that have arrived; empty after `timeout_ms`."""
        if not self._socket.poll(timeout_ms, zmq.POLLIN):
            return []
        return self.drain()

    def close(self) -> None:
        self._socket.close()


class AsyncReceiver(Generic[M]):
    """A Receiver for the running event loop."""

    def __init__(self, address: str, union: Any) -> None:
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.PULL)
        self._decode = decoder_for(union).decode
        self._plain: zmq.Socket[bytes] = zmq.Socket.shadow(self._socket)
        _listen(self._plain, address)

    async def recv_all(self) -> list[M]:
        """Waits for a message, then takes all that have arrived."""
        first = await self._socket.recv()
        return [self._decode(frame) for frame in (first, *_arrived(self._plain))]

    def close(self) -> None:
        self._socket.close()
        self._context.term()


def announce_ready(pipe: Connection, info: dict[str, Any]) -> None:
    """A child's last word of the start-up handshake; `info` ends up in /server_info."""
    pipe.send_bytes(encode(Ready(info=info)))


def _listen(socket: zmq.Socket[bytes], address: str) -> None:
    socket.set(zmq.RCVHWM, 0)
    socket.set(zmq.LINGER, 0)
    socket.bind(address)


def _arrived(socket: zmq.Socket[bytes]) -> Iterator[bytes]:
    while True:
        try:
            yield socket.recv(zmq.NOBLOCK)
        except zmq.Again:
            return
