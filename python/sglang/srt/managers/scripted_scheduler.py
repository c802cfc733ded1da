"""A scheduler without a model: it speaks the real messages and makes scripted tokens.

For tests of everything around the engine; it runs in a thread or as a process main.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import zmq

from sglang.srt.ipc import IpcNames, Receiver, Sender, announce_ready
from sglang.srt.messages import (
    AbortRequest,
    ControlReply,
    FinishReason,
    FlushCache,
    GenerateRequest,
    GetState,
    Shutdown,
    StopMatched,
    StreamOptions,
    TokenBatch,
    ToScheduler,
)
from sglang.srt.server_args import ServerArgs

# The ids a request gets, in order; a FinishReason ends it early.
Script = Callable[[GenerateRequest], Iterable[int | FinishReason]]

_IDLE_POLL_MS = 20


def count_up(request: GenerateRequest) -> Iterator[int]:
    """The default script: ids 100, 101, ... for as long as the request wants."""
    return itertools.count(100)


@dataclass(slots=True, eq=False)
class _Running:
    request: GenerateRequest
    tokens: Iterator[int | FinishReason]
    made: int = 0
    opened: bool = False
    next_s: float = 0.0


class ScriptedScheduler:
    """One token for each request a turn, every `token_interval_s`.

    received: every GenerateRequest. aborted: rids of AbortRequests that ended something.
    """

    def __init__(
        self,
        context: zmq.Context[Any],
        ipc: IpcNames,
        script: Script = count_up,
        token_interval_s: float = 0.0,
    ) -> None:
        self.script = script
        self.token_interval_s = token_interval_s
        self.received: list[GenerateRequest] = []
        self.aborted: list[str] = []
        self.stopped: list[str] = []
        self._running: dict[str, _Running] = {}
        self._inbox: Receiver[Any] = Receiver(context, ipc.scheduler, ToScheduler)
        self._to_detokenizer = Sender(context, ipc.detokenizer)
        self._to_tokenizer = Sender(context, ipc.tokenizer)

    def run(self) -> None:
        """Serves until Shutdown, which it passes on."""
        try:
            while True:
                busy = self._running and not self.token_interval_s
                for message in self._inbox.recv_all(0 if busy else self._poll_ms()):
                    if isinstance(message, Shutdown):
                        self._to_detokenizer.send(message)
                        return
                    self._handle(message)
                for running in list(self._running.values()):
                    self._step(running)
        finally:
            for end in (self._inbox, self._to_detokenizer, self._to_tokenizer):
                end.close()

    def _poll_ms(self) -> int:
        return max(1, int(self.token_interval_s * 1000)) if self._running else _IDLE_POLL_MS

    def _handle(self, message: Any) -> None:
        match message:
            case GenerateRequest():
                self.received.append(message)
                tokens = iter(self.script(message))
                self._running[message.rid] = _Running(message, tokens)
            case AbortRequest():
                for rid, running in list(self._running.items()):
                    if message.abort_all or rid.startswith(message.rid):
                        self.aborted.append(rid)
                        self._send(running, [], FinishReason(type="abort", message="aborted"))
            case StopMatched():
                self.stopped.append(message.rid)
                if message.rid in self._running:
                    self._send(self._running[message.rid], [], FinishReason(type="stop"))
            case FlushCache():
                ok = not self._running
                text = "Cache flushed." if ok else "Cache not flushed: requests are running."
                self._to_tokenizer.send(ControlReply(call_id=message.call_id, ok=ok, message=text))
            case GetState():
                state = {"running": len(self._running)}
                self._to_tokenizer.send(ControlReply(call_id=message.call_id, ok=True, data=state))

    def _step(self, running: _Running) -> None:
        now_s = time.monotonic()
        if now_s < running.next_s:
            return
        running.next_s = now_s + self.token_interval_s
        limit = running.request.sampling.max_new_tokens
        token: int | FinishReason | None = None
        if limit is None or running.made < limit:
            token = next(running.tokens, None)
        if isinstance(token, FinishReason):
            self._send(running, [], token)
        elif token is None:
            self._send(running, [], FinishReason(type="length", length=running.made))
        else:
            running.made += 1
            done = running.made == limit
            finish = FinishReason(type="length", length=running.made) if done else None
            self._send(running, [token], finish)

    def _send(self, running: _Running, ids: list[int], finish: FinishReason | None) -> None:
        request = running.request
        sampling = request.sampling
        opened = []
        if not running.opened:
            running.opened = True
            opened.append(
                StreamOptions(
                    rid=request.rid,
                    prompt_tail=request.input_ids[-4:],
                    stop=sampling.stop,
                    skip_special_tokens=sampling.skip_special_tokens,
                    spaces_between_special_tokens=sampling.spaces_between_special_tokens,
                    no_stop_trim=sampling.no_stop_trim,
                )
            )
        if finish is not None:
            self._running.pop(request.rid)
            if isinstance(finish.matched, int):  # a matched stop token is a token of the answer
                ids = [*ids, finish.matched]
                running.made += 1
        self._to_detokenizer.send(
            TokenBatch(
                opened=opened,
                rids=[request.rid],
                new_ids=[ids],
                finish=[finish],
                prompt_tokens=[len(request.input_ids)],
                cached_tokens=[0],
                completion_tokens=[running.made],
                retractions=[0],
            )
        )


def run_scripted_scheduler(
    args: ServerArgs, ipc: IpcNames, rank: int, ready: Connection, token_interval_s: float = 0.0
) -> None:
    """Process main with the default script."""
    with zmq.Context() as context:
        scheduler = ScriptedScheduler(context, ipc, token_interval_s=token_interval_s)
        announce_ready(ready, {"max_total_num_tokens": 1000})
        scheduler.run()
