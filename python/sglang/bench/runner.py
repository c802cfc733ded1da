"""Holds the conversations at their times and keeps a record of every request."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from sglang.bench.clients.base import Client
from sglang.bench.records import Answer, RequestRecord
from sglang.bench.workload import Conversation

NOT_ASKED = "not asked: an earlier turn of its conversation failed"


@dataclass(frozen=True, slots=True)
class LoadRun:
    """Records in order of conversation and turn.

    begin_s: perf_counter at the start. max_start_lag_s: how late the client itself began a
    conversation at worst; a large value means that the client, not the server, was the limit.
    interrupted: the run was stopped, and requests still running are not in the records.
    """

    records: list[RequestRecord]
    begin_s: float
    duration_s: float
    max_start_lag_s: float
    interrupted: bool


async def run_load(
    conversations: Sequence[Conversation],
    arrivals_s: Sequence[float],
    client: Client,
    *,
    max_concurrency: int | None,
    stop: asyncio.Event,
    on_record: Callable[[RequestRecord], None],
) -> LoadRun:
    """Open loop between conversations, closed loop within one.

    arrivals_s [conversations]: not decreasing, from the start of the run. With max_concurrency
    a conversation waits for a free place; its requests are timed from when they are sent.
    Setting `stop` ends the run early.
    """
    records: list[RequestRecord] = []
    lags_s: list[float] = [0.0]
    places = asyncio.Semaphore(max_concurrency) if max_concurrency else contextlib.nullcontext()

    def keep(record: RequestRecord) -> None:
        records.append(record)
        on_record(record)

    async def hold(index: int, conversation: Conversation, due_s: float) -> None:
        async with places:
            dialogue = client.open_dialogue()
            failed = False
            for number, turn in enumerate(conversation.turns):
                if failed:
                    answer = Answer(start_s=time.perf_counter(), error=NOT_ASKED)
                else:
                    answer = await dialogue.ask(turn)
                failed = bool(answer.error)
                known = turn.prompt_tokens if number == 0 else None
                keep(RequestRecord(index, number, due_s, known, answer))

    async def hold_all() -> None:
        async with asyncio.TaskGroup() as group:
            for index, (conversation, due_s) in enumerate(
                zip(conversations, arrivals_s, strict=True)
            ):
                # A loop, because uvloop's timers may fire up to a millisecond early.
                while (wait_s := begin_s + due_s - time.perf_counter()) > 0:
                    await asyncio.sleep(wait_s)
                lags_s.append(time.perf_counter() - begin_s - due_s)
                group.create_task(hold(index, conversation, due_s))

    with _long_lived_heap():
        begin_s = time.perf_counter()
        load = asyncio.create_task(hold_all())
        stopped = asyncio.create_task(stop.wait())
        try:
            await asyncio.wait((load, stopped), return_when=asyncio.FIRST_COMPLETED)
            interrupted = not load.done()
        finally:
            load.cancel()
            stopped.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await load
        duration_s = time.perf_counter() - begin_s
    records.sort(key=lambda record: (record.conversation, record.turn))
    return LoadRun(records, begin_s, duration_s, max(lags_s), interrupted)


@contextlib.contextmanager
def _long_lived_heap() -> Iterator[None]:
    """Keeps the prompts out of the garbage collector's sight: a full collection over them would
    stall every stream for milliseconds."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
