"""Reading a state's text, or one variable, while it grows: in a loop, or in an async one."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from typing import Any

from sglang.lang.executor import StreamExecutor


class _Reader:
    """What is new since the last look. name: a variable, or None for the whole text."""

    def __init__(self, executor: StreamExecutor, name: str | None) -> None:
        self._executor = executor
        self._name = name
        self._told = 0

    def read(self) -> tuple[Any, bool]:
        """The new piece, empty if there is none, and whether it was the last."""
        done = self._done()  # before the text is looked at: none comes after it
        value = self._value()
        if not isinstance(value, str):  # n answers, or what set_var put there
            return (value if done else ""), done
        piece = value[self._told :]
        self._told = len(value)
        return piece, done

    def has_news(self) -> bool:
        value = self._value()
        return self._done() or (isinstance(value, str) and len(value) > self._told)

    def raise_if_cut_short(self) -> None:
        """Raises what kept the text, or the variable, from being completed."""
        if self._name is None or self._executor.is_unset(self._name):
            self._executor.raise_if_failed()

    def _value(self) -> Any:
        if self._name is None:
            return self._executor.text_
        return self._executor.variables.get(self._name, "")

    def _done(self) -> bool:
        if self._executor.is_over():
            return True
        name = self._name
        return (
            name is not None
            and name in self._executor.variables
            and not self._executor.is_pending(name)
        )


def iterate(executor: StreamExecutor, name: str | None) -> Iterator[Any]:
    """Pieces as they come; then raises if something failed before all was there."""
    reader = _Reader(executor, name)
    done = False
    while not done:
        executor.wait_for(reader.has_news)
        piece, done = reader.read()
        if piece:
            yield piece
    reader.raise_if_cut_short()


async def iterate_async(
    executor: StreamExecutor, name: str | None, with_meta_info: bool
) -> AsyncIterator[Any]:
    """The same on an event loop, which is never blocked; with_meta_info: yields pairs."""
    loop = asyncio.get_running_loop()
    changed = asyncio.Event()

    def wake() -> None:
        with contextlib.suppress(RuntimeError):  # the loop is gone, and its readers with it
            loop.call_soon_threadsafe(changed.set)

    reader = _Reader(executor, name)
    done = False
    with executor.listening(wake):
        while not done:
            changed.clear()
            piece, done = reader.read()
            if piece:
                yield (piece, executor.meta_info.get(name or "")) if with_meta_info else piece
            elif not done:
                await changed.wait()
    reader.raise_if_cut_short()
