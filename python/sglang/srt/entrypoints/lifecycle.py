"""From the first request to the last: warm-up, serving, and the three ways to end."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Awaitable, Iterator
from contextlib import contextmanager, suppress

import uvicorn
from fastapi import FastAPI

from sglang.srt.entrypoints.process_group import ChildDeath, ProcessGroup
from sglang.srt.entrypoints.server_state import Phase, ServerState
from sglang.srt.entrypoints.start_up import end_children
from sglang.srt.errors import SglangError
from sglang.srt.garbage import freeze_what_is_here
from sglang.srt.ipc import IpcNames, remove_ipc_directory
from sglang.srt.managers.prompts import Prompt
from sglang.srt.sampling_params import SamplingParams
from sglang.srt.service_levels import OWN_REQUEST

logger = logging.getLogger(__name__)

DRAIN_LIMIT_S = 60.0  # how long SIGTERM waits for requests in flight
_CRASH_EXIT_LIMIT_S = 4.0
_GOODBYE_LIMIT_S = 2  # for responses to reach their clients once nothing is in flight
_SERVER_GONE = "the server is shutting down"


class HttpServer(uvicorn.Server):
    """uvicorn without its signal handlers."""

    def __init__(self, app: FastAPI, log_level: str) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                log_level=log_level,
                log_config=None,  # one format for all our lines
                lifespan="off",
                timeout_graceful_shutdown=_GOODBYE_LIMIT_S,
            )
        )
        self.listening = asyncio.Event()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.listening.set()


class Lifecycle:
    """Runs a server whose children are ready and whose manager has been started."""

    def __init__(
        self,
        state: ServerState,
        group: ProcessGroup,
        server: HttpServer,
        listener: socket.socket,
        ipc: IpcNames,
        started_s: float,
    ) -> None:
        self._state = state
        self._manager = state.manager
        self._group = group
        self._server = server
        self._listener = listener
        self._ipc = ipc
        self._started_s = started_s
        self._ending = asyncio.Event()  # by whatever cause
        self._hurry = asyncio.Event()  # do not wait for requests in flight
        self._crash: str | None = None

    async def run(self) -> int:
        """Serves until something ends it; returns the process's exit code."""
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self._ending.set)
        loop.add_signal_handler(signal.SIGINT, self._interrupt)
        self._group.watch(lambda death: self._child_died(loop, death))

        serving = asyncio.create_task(self._server.serve([self._listener]))
        warming = asyncio.create_task(self._warm_up())
        for task in (serving, self._manager.reader):
            task.add_done_callback(self._must_not_end)
        warming.add_done_callback(self._must_not_fail)
        await self._ending.wait()

        warming.cancel()
        self._state.phase = Phase.STOPPING
        self._manager.stop_accepting()
        if not self._hurry.is_set():
            await _any(self._manager.drained(), self._hurry.wait(), timeout_s=DRAIN_LIMIT_S)
        self._manager.fail_all(self._crash or _SERVER_GONE)
        self._server.should_exit = True
        await asyncio.wait([serving], timeout=2 * _GOODBYE_LIMIT_S)
        await end_children(self._manager, self._group, in_order=self._crash is None)
        await self._manager.close()
        return 0 if self._crash is None else 1

    async def _warm_up(self) -> None:
        await self._server.listening.wait()
        if not self._state.args.skip_server_warmup:
            await self._first_request()
        freeze_what_is_here()
        self._state.startup_s = time.monotonic() - self._started_s
        self._state.phase = Phase.SERVING
        logger.info("The server is fired up and ready to roll!")

    async def _first_request(self) -> None:
        sampling = SamplingParams(max_new_tokens=8, temperature=0.0)
        if self._state.model.tokenizer is None:
            prompt = Prompt(sampling, input_ids=[0], field="input_ids", level=OWN_REQUEST)
        else:
            prompt = Prompt(sampling, text="The capital city of France is", level=OWN_REQUEST)
        async for update in self._manager.generate([prompt], stream=False):
            finish = update.answer.finish
            if finish is not None and finish.type == "abort":
                raise SglangError(f"the warm-up request was aborted: {finish.message}")

    def _must_not_end(self, task: asyncio.Task[None]) -> None:
        self._must_not_fail(task)
        if not self._server.should_exit:
            self._crashed("a part of the HTTP server has ended by itself")

    def _must_not_fail(self, task: asyncio.Task[None]) -> None:
        if task.cancelled() or self._hurry.is_set():
            return
        error = task.exception()
        if error is not None:
            logger.error("the server ends", exc_info=error)
            self._crashed(f"{type(error).__name__}: {error}")

    def _interrupt(self) -> None:
        if self._hurry.is_set():
            self._die(130)
        logger.info("Interrupted: ending requests in flight. Once more to kill.")
        self._hurry.set()
        self._ending.set()

    def _child_died(self, loop: asyncio.AbstractEventLoop, death: ChildDeath) -> None:
        """Runs in the group's thread. The loop has a few seconds, then we go without it."""
        logger.error("%s: the server ends", death)
        last_resort = threading.Timer(_CRASH_EXIT_LIMIT_S, self._die, (1,))
        last_resort.daemon = True
        last_resort.start()
        with suppress(RuntimeError):  # the loop is closed: we are on our way out
            loop.call_soon_threadsafe(self._crashed, f"{death}")

    def _crashed(self, message: str) -> None:
        if self._hurry.is_set():  # things end because we end them
            return
        self._crash = message
        self._hurry.set()
        self._ending.set()

    def _die(self, exit_code: int) -> None:
        """For when the loop may be stuck: nobody is told, but nothing is left behind."""
        self._group.kill()
        remove_ipc_directory(self._ipc)
        os._exit(exit_code)


async def _any(*waits: Awaitable[object], timeout_s: float) -> None:
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    await asyncio.wait(tasks, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
    for task in tasks:
        task.cancel()
