"""The children of the server: started together, watched together, ended together.

A child dies with its parent (the kernel sees to it), and the parent learns of a child's death
at once. Children leave SIGINT and SIGTERM to the parent, which ends them in order.
"""

from __future__ import annotations

import ctypes
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import msgspec

from sglang.srt.errors import ConfigError, SglangError
from sglang.srt.logs import configure_logging
from sglang.srt.messages import Handshake, Refused, decoder_for, encode

logger = logging.getLogger(__name__)

_PR_SET_PDEATHSIG = 1
_ENDING = (signal.SIGINT, signal.SIGTERM)
_KILL_LIMIT_S = 1.0


class StartFailed(SglangError):
    """A child ended, or said why it cannot start, before it was ready."""


@dataclass(frozen=True, slots=True)
class ChildSpec:
    """What to run: `main(*args, ready_pipe)` in a process named `name`.

    `main` must be importable by name and report with `announce_ready(ready_pipe, info)`.
    """

    name: str
    main: Callable[..., None]
    args: tuple[Any, ...]
    log_level: str = "info"


@dataclass(frozen=True, slots=True)
class ChildDeath:
    """exit_code is negative for a signal."""

    name: str
    exit_code: int

    def __str__(self) -> str:
        if self.exit_code < 0:
            return f"{self.name} was killed by {signal.Signals(-self.exit_code).name}"
        return f"{self.name} exited with code {self.exit_code}"


class _Child(msgspec.Struct, eq=False):
    name: str
    process: BaseProcess
    pipe: Connection


@contextmanager
def undisturbed() -> Iterator[None]:
    """SIGINT and SIGTERM come at its end, and a process that is started begins with both blocked.

    The main thread's handlers run whichever thread the kernel has chosen: to block a signal there
    is not enough. Another thread is never interrupted by them, so that it only blocks.
    """
    came: list[int] = []
    in_main = threading.current_thread() is threading.main_thread()
    handlers = {number: signal.getsignal(number) for number in _ENDING} if in_main else {}
    for number, handler in handlers.items():
        if handler is not None:  # else not Python's to restore
            signal.signal(number, lambda number, frame: came.append(number))
    signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _ENDING)
        for number, handler in handlers.items():
            if handler is not None:
                signal.signal(number, handler)
        if came:
            signal.raise_signal(came[0])


class ProcessGroup:
    """Starts and ends the children. Start it from a thread that stays, such as the main thread: a
    child's link to its parent is a link to the thread that started it."""

    def __init__(self) -> None:
        self._children: list[_Child] = []
        self._expect_exit = threading.Event()

    def spawn(self, specs: Sequence[ChildSpec]) -> None:
        """Starts the processes; does not wait for them."""
        spawn = multiprocessing.get_context("spawn")
        for spec in specs:
            ours, theirs = spawn.Pipe(duplex=False)
            process = spawn.Process(
                target=_child, args=(spec, theirs, os.getpid()), name=spec.name, daemon=True
            )
            # A child that is being handed its work would find half of it if we left now.
            with undisturbed():
                process.start()
                theirs.close()
                self._children.append(_Child(spec.name, process, ours))

    def wait_ready(self, timeout_s: float | None = None) -> dict[str, dict[str, Any]]:
        """The info of each child by name, once all are ready. Raises StartFailed."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        infos: dict[str, dict[str, Any]] = {}
        waiting = list(self._children)
        while waiting:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            sources = [x for c in waiting for x in (c.pipe, c.process.sentinel)]
            if not wait(sources, left):
                names = ", ".join(child.name for child in waiting)
                raise StartFailed(f"{names} not ready after {timeout_s:g} s")
            for child in list(waiting):
                info = _handshake(child)
                if info is not None:
                    infos[child.name] = info
                    child.pipe.close()
                    waiting.remove(child)
        return infos

    def watch(self, on_death: Callable[[ChildDeath], None]) -> None:
        """Calls `on_death` from a thread at the first exit that was not announced."""
        threading.Thread(
            target=self._watch, args=(on_death,), name="process-group", daemon=True
        ).start()

    def expect_exit(self) -> None:
        """From now on children may exit without being reported."""
        self._expect_exit.set()

    def join(self, timeout_s: float) -> bool:
        """Waits for all children; True if all have exited."""
        deadline = time.monotonic() + timeout_s
        for child in self._children:
            child.process.join(max(0.0, deadline - time.monotonic()))
        return all(child.process.exitcode is not None for child in self._children)

    def pids(self) -> list[int]:
        """Of those that run."""
        running = (child.process for child in self._children if child.process.exitcode is None)
        return [process.pid for process in running if process.pid is not None]

    def exit_codes(self) -> dict[str, int | None]:
        return {child.name: child.process.exitcode for child in self._children}

    def kill(self) -> None:
        """Ends all children that still run. In order, they leave by themselves on Shutdown."""
        self.expect_exit()
        for child in self._children:
            child.process.kill()
        self.join(_KILL_LIMIT_S)

    def _watch(self, on_death: Callable[[ChildDeath], None]) -> None:
        wait([child.process.sentinel for child in self._children])
        if self._expect_exit.is_set():
            return
        for child in self._children:
            # A sentinel can be ready a moment before the exit code is known.
            child.process.join(0.05)
            code = child.process.exitcode
            if code is not None:
                on_death(ChildDeath(child.name, code))
                return


def _handshake(child: _Child) -> dict[str, Any] | None:
    """The child's info, None if it has not spoken yet. Raises StartFailed."""
    if not child.pipe.poll():
        if child.process.exitcode is not None:
            raise StartFailed(f"{ChildDeath(child.name, child.process.exitcode)} while starting")
        return None
    try:
        message = decoder_for(Handshake).decode(child.pipe.recv_bytes())
    except EOFError:
        child.process.join(_KILL_LIMIT_S)
        code = child.process.exitcode
        raise StartFailed(f"{ChildDeath(child.name, code or 0)} while starting") from None
    if isinstance(message, Refused):
        raise StartFailed(message.reason)
    info: dict[str, Any] = message.info
    return info


def _child(spec: ChildSpec, ready: Connection, parent_pid: int) -> None:
    """Runs in the new process."""
    _die_with(parent_pid)
    # A terminal or service manager signals the whole group; the parent decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _ENDING)
    _set_title(spec.name)
    configure_logging(spec.log_level, spec.name)
    try:
        spec.main(*spec.args, ready)
    except ConfigError as error:
        _refuse(ready, str(error))
        sys.exit(1)
    except Exception as error:
        traceback.print_exc()
        _refuse(ready, f"{spec.name} failed: {type(error).__name__}: {error}")
        sys.exit(1)


def _refuse(ready: Connection, reason: str) -> None:
    try:
        ready.send_bytes(encode(Refused(reason=reason)))
    except OSError:  # the parent listens only until we are ready
        logger.error("%s", reason)


def _die_with(parent_pid: int) -> None:
    """SIGKILL for this process when the thread that started it ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:  # it ended before the call above
        os._exit(1)


def _set_title(title: str) -> None:
    from setproctitle import setproctitle

    setproctitle(title)
