"""Server-sent events, and noticing at once that a client has hung up."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing, suppress
from typing import Any, TypeVar

import orjson
from fastapi import Request, Response
from starlette.types import Receive, Scope, Send

from sglang.srt.managers.answers import Update

T = TypeVar("T")

DONE = b"data: [DONE]\n\n"


class ClientLeft(Exception):
    """Nobody is left to answer."""


def event(payload: Any) -> bytes:
    return b"data: " + orjson.dumps(payload) + b"\n\n"


def named_event(name: str, payload: Any) -> bytes:
    return b"event: " + name.encode() + b"\n" + event(payload)


class EventStream(Response):
    """Sends events as they come. If the client hangs up, `events` is closed without delay."""

    def __init__(
        self, events: AsyncGenerator[bytes, None], media_type: str = "text/event-stream"
    ) -> None:
        self._events = events
        self.media_type = media_type
        self.status_code = 200
        self.background = None
        self.init_headers({"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with suppress(ClientLeft):
            await _first(self._send_all(send), _hang_up(receive))

    async def _send_all(self, send: Send) -> None:
        async with aclosing(self._events) as events:
            try:
                await send(
                    {
                        "type": "http.response.start",
                        "status": self.status_code,
                        "headers": self.raw_headers,
                    }
                )
                async for chunk in events:
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
                await send({"type": "http.response.body", "body": b"", "more_body": False})
            except OSError:
                raise ClientLeft from None


async def unless_client_leaves(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Awaits `work`; cancels it and raises ClientLeft if the client hangs up first.

    The request's body must have been read.
    """
    return await _first(work, _hang_up(request.receive))


async def begin(
    request: Request,
    updates: AsyncGenerator[Update, None],
    check: Callable[[Update], None],
) -> AsyncGenerator[Update, None]:
    """The same updates, once the first is there and `check` has not raised.

    Waiting for it before the response starts lets a refused request have its own HTTP status.
    """

    async def first() -> Update:
        return await anext(updates)

    head = await unless_client_leaves(request, first())
    try:
        check(head)
    except BaseException:
        await updates.aclose()
        raise

    async def rest() -> AsyncGenerator[Update, None]:
        async with aclosing(updates):
            yield head
            async for update in updates:
                yield update

    return rest()


async def _first(work: Coroutine[Any, Any, T], hang_up: Coroutine[Any, Any, None]) -> T:
    working, leaving = asyncio.create_task(work), asyncio.create_task(hang_up)
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientLeft
    finally:
        leaving.cancel()
        working.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _hang_up(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
