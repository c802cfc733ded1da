"""`launch`: the main process. Starts the children, serves HTTP, ends everything in order.

SIGTERM   refuses new requests (503), finishes those in flight, exits 0
SIGINT    ends requests in flight, exits 0; a second one kills without ceremony
a death   of any child fails requests in flight and exits 1 within seconds
"""

from __future__ import annotations

import asyncio
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import uvloop

from sglang.srt.entrypoints.app import build_app
from sglang.srt.entrypoints.lifecycle import HttpServer, Lifecycle
from sglang.srt.entrypoints.process_group import ProcessGroup, StartFailed
from sglang.srt.entrypoints.server_state import ServerState
from sglang.srt.entrypoints.start_up import Parts, default_parts, start_children
from sglang.srt.errors import ConfigError
from sglang.srt.ipc import IpcNames, ipc_directory
from sglang.srt.logs import configure_logging
from sglang.srt.server_args import ServerArgs


class _Interrupted(BaseException):
    """SIGINT or SIGTERM before there was a server to stop."""


def launch(args: ServerArgs, parts: Parts | None = None) -> int:
    """Runs the server until it is told to stop or breaks; returns the exit code.

    Call it from the main thread. Raises ConfigError for a flag that cannot be served.
    """
    configure_logging(args.log_level)
    if parts is None:
        parts = default_parts()
    started_s = time.monotonic()
    group = ProcessGroup()
    try:
        with _interruptible(), _listening(args) as listener, ipc_directory() as ipc:
            try:
                return _run(args, parts, group, listener, ipc, started_s)
            finally:
                group.kill()
    except _Interrupted:
        return 0
    except StartFailed as error:
        print(f"sglang: error: {error}", file=sys.stderr)
        return 1


def _run(
    args: ServerArgs,
    parts: Parts,
    group: ProcessGroup,
    listener: socket.socket,
    ipc: IpcNames,
    started_s: float,
) -> int:
    state = start_children(args, parts, group, ipc)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_serve(state, group, listener, ipc, started_s))


async def _serve(
    state: ServerState,
    group: ProcessGroup,
    listener: socket.socket,
    ipc: IpcNames,
    started_s: float,
) -> int:
    await state.manager.start()
    server = HttpServer(build_app(state), state.args.log_level_http or state.args.log_level)
    return await Lifecycle(state, group, server, listener, ipc, started_s).run()


@contextmanager
def _listening(args: ServerArgs) -> Iterator[socket.socket]:
    """The bound socket, taken before anything slow: a port in use is known at once."""
    family = socket.AF_INET6 if ":" in args.host else socket.AF_INET
    with socket.socket(family) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((args.host, args.port))
        except OSError as error:
            raise ConfigError(
                f"--host {args.host} --port {args.port} cannot be listened on: {error.strerror}"
            ) from None
        yield listener


@contextmanager
def _interruptible() -> Iterator[None]:
    """Both signals raise _Interrupted inside, so that nothing is left behind; the event loop
    takes them over while it runs."""

    def interrupt(signum: int, frame: object) -> None:
        raise _Interrupted

    numbers = (signal.SIGINT, signal.SIGTERM)
    previous = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
