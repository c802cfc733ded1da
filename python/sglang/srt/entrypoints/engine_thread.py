"""EngineThread: the pipeline of an Engine, on an event loop and a thread of its own.

A caller may be a script, a thread, or a coroutine on a loop of its own, as in a notebook: work is
handed over to this loop, so that no caller's loop has to run for others to be served.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncGenerator, Coroutine, Iterator
from concurrent.futures import CancelledError, Future
from typing import Any, TypeVar

import uvloop

from sglang.srt.entrypoints.process_group import ChildDeath, ProcessGroup
from sglang.srt.entrypoints.server_state import Phase, ServerState
from sglang.srt.entrypoints.start_up import Parts, end_children, start_children
from sglang.srt.ipc import IpcNames, ipc_directory
from sglang.srt.managers.call import EngineFailed
from sglang.srt.server_args import ServerArgs

T = TypeVar("T")

_CLOSE_LIMIT_S = 30.0
_SHUT_DOWN = "the engine is shut down"


class EngineThread:
    """Raises StartFailed or ConfigError if the engine cannot start. All methods are thread-safe."""

    def __init__(self, args: ServerArgs, parts: Parts) -> None:
        self._args = args
        self._parts = parts
        self.group = ProcessGroup()
        self._started: Future[ServerState] = Future()
        self._lock = threading.Lock()
        self._closing = False
        # A daemon, so that an interpreter that leaves comes to our atexit handler. The children's
        # link to their parent is this thread.
        self._thread = threading.Thread(target=self._run, name="sglang-engine", daemon=True)
        self._thread.start()
        try:
            self.state = self._started.result()
        except BaseException:  # an interrupt while it starts, too
            self.group.kill()
            self._thread.join(_CLOSE_LIMIT_S)
            raise

    def call(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of `work`, run on the engine's loop; an interrupt cancels it."""
        future = self.submit(work)
        try:
            return future.result()
        except CancelledError:
            raise EngineFailed(_SHUT_DOWN) from None
        except BaseException:
            future.cancel()
            raise

    async def call_async(self, work: Coroutine[Any, Any, T]) -> T:
        """The same for a coroutine on another loop; cancelling it cancels `work`."""
        future = self.submit(work)
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            if self._closing and future.cancelled():
                raise EngineFailed(_SHUT_DOWN) from None
            raise

    def submit(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Raises EngineFailed once the engine is shut down."""
        with self._lock:
            if self._closing:
                work.close()
                raise EngineFailed(_SHUT_DOWN)
            return asyncio.run_coroutine_threadsafe(work, self._loop)

    def iterate(self, items: AsyncGenerator[T, None]) -> Iterator[T]:
        """The items, one by one. Leaving the iteration early closes the generator."""
        try:
            while True:
                try:
                    yield self.call(_next(items))
                except StopAsyncIteration:
                    return
        finally:
            with contextlib.suppress(EngineFailed):  # shut down meanwhile: closed with it
                self.call(items.aclose())

    async def iterate_async(self, items: AsyncGenerator[T, None]) -> AsyncGenerator[T, None]:
        """The same for a coroutine on another loop."""
        try:
            while True:
                try:
                    yield await self.call_async(_next(items))
                except StopAsyncIteration:
                    return
        finally:
            with contextlib.suppress(EngineFailed):
                await self.call_async(items.aclose())

    def close(self) -> None:
        """Fails what is in flight and ends the children. May be called again."""
        with self._lock:
            first, self._closing = not self._closing, True
        if first:
            self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(_CLOSE_LIMIT_S)
        self.group.kill()

    def _run(self) -> None:
        try:
            with ipc_directory() as ipc:
                try:
                    state = start_children(self._args, self._parts, self.group, ipc)
                    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                        runner.run(self._serve(state, ipc))
                finally:
                    self.group.kill()
        except BaseException as error:
            if self._started.done():
                raise
            self._started.set_exception(error)

    async def _serve(self, state: ServerState, ipc: IpcNames) -> None:
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        await state.manager.start()
        state.manager.reader.add_done_callback(lambda task: _reader_ended(state, task))
        self.group.watch(lambda death: self._child_died(state, death))
        state.phase = Phase.SERVING
        self._started.set_result(state)
        await self._stop.wait()
        state.phase = Phase.STOPPING
        in_order = not state.manager.failed
        state.manager.fail_all(_SHUT_DOWN)
        await asyncio.sleep(0)  # those who wait hear of it before their tasks are cancelled
        await end_children(state.manager, self.group, in_order=in_order)
        await state.manager.close()

    def _child_died(self, state: ServerState, death: ChildDeath) -> None:
        """Runs in the group's thread."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: the engine is ending
            self._loop.call_soon_threadsafe(state.manager.fail_all, f"{death}")


def _reader_ended(state: ServerState, task: asyncio.Task[None]) -> None:
    if not task.cancelled():
        state.manager.fail_all(f"nobody reads the engine's answers: {task.exception()!r}")


async def _next(items: AsyncGenerator[T, None]) -> T:
    return await anext(items)
