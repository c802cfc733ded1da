"""A real server as a child process: start it, wait until it answers, stop it."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import aiohttp

POLL_S = 0.25
LOG_TAIL_LINES = 30


class ServerError(Exception):
    """The server did not start, did not stop, or left with a failure code."""


class ServerProcess:
    """`python -m sglang.launch_server` on a free port of this machine, its output in a file."""

    def __init__(self, model: Path, flags: Sequence[str]) -> None:
        port = _free_port()
        self.base_url = f"http://127.0.0.1:{port}"
        command = [sys.executable, "-m", "sglang.launch_server", "--model-path", str(model)]
        command += ["--port", str(port), *flags]
        self._log = tempfile.NamedTemporaryFile(  # noqa: SIM115, closed in kill
            mode="w+", prefix="sglang-server-", suffix=".log"
        )
        self._process = subprocess.Popen(
            command, stdout=self._log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL
        )

    async def wait_ready(self, limit_s: float, on_wait: Callable[[], None]) -> float:
        """Returns the seconds until /health answered 200; calls `on_wait` at each look.

        Raises ServerError when the process leaves or the limit passes.
        """
        started_s = time.monotonic()
        async with aiohttp.ClientSession(self.base_url) as session:
            while (waited_s := time.monotonic() - started_s) < limit_s:
                if self._process.poll() is not None:
                    raise ServerError(
                        f"the server left with code {self._process.returncode} at start"
                    )
                if await _healthy(session):
                    return waited_s
                on_wait()
                await asyncio.sleep(POLL_S)
        raise ServerError(f"the server was not ready after {limit_s:.0f} s")

    @property
    def running(self) -> bool:
        """Whether the process has not left yet."""
        return self._process.poll() is None

    def stop(self, limit_s: float) -> None:
        """Asks it to leave (SIGTERM) and waits; ServerError unless it leaves with code 0."""
        self._process.terminate()
        try:
            code = self._process.wait(limit_s)
        except subprocess.TimeoutExpired:
            raise ServerError(f"the server was still there {limit_s:.0f} s after SIGTERM") from None
        if code != 0:
            raise ServerError(f"the server left with code {code} after SIGTERM")

    def kill(self) -> None:
        """Ends it whatever its state and removes the log."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        self._log.close()

    def log_tail(self) -> str:
        """The last lines of what the server printed."""
        lines = Path(self._log.name).read_text(encoding="utf-8", errors="replace").splitlines()
        return "\n".join(lines[-LOG_TAIL_LINES:])


async def _healthy(session: aiohttp.ClientSession) -> bool:
    try:
        async with session.get("/health", timeout=aiohttp.ClientTimeout(total=30)) as response:
            return response.status == 200
    except (aiohttp.ClientError, TimeoutError):
        return False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
