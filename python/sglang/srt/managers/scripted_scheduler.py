"""A scheduler without a model: it speaks the real messages and makes scripted tokens.

For tests of everything around the engine; it runs in a thread or as a process main.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import zmq

from drift_scheduler.timeline import Timeline
from sglang.srt.ipc import IpcNames, Receiver, Sender, announce_ready
from sglang.srt.logprobs import LogprobWish, TokenScores
from sglang.srt.managers.request_logprobs import RequestLogprobs
from sglang.srt.messages import (
    AbortRequest,
    ControlReply,
    FinishReason,
    FlushCache,
    GenerateRequest,
    GetState,
    GetTimeline,
    GetWeights,
    Operation,
    SetPolicy,
    Shutdown,
    StopMatched,
    StreamOptions,
    TokenBatch,
    ToScheduler,
)
from sglang.srt.server_args import ServerArgs

# What it says of itself when it is ready.
ENGINE_INFO = {"max_total_num_tokens": 1000, "max_running_requests": 100}
# What operations tell that were not given anything else to tell.
_OPERATION_DATA: dict[type[Operation], dict[str, Any]] = {GetWeights: {"values": []}}

# The ids a request gets, in order; a FinishReason ends it early.
Script = Callable[[GenerateRequest], Iterable[int | FinishReason]]

_IDLE_POLL_MS = 20
_TOTAL_SMS = 132
_TIMELINE_PAGE = 4  # small, so that a few runs take several


def count_up(request: GenerateRequest) -> Iterator[int]:
    """The default script: ids 100, 101, ... for as long as the request wants."""
    return itertools.count(100)


def scripted_logprob(token: int) -> float:
    """Wherever the token is; of all tokens asked for the lowest ids are the likeliest."""
    return -(token + 1) / 8


def _scripted_scores(tokens: Sequence[int], wish: LogprobWish) -> TokenScores:
    def rows(ids: Sequence[int]) -> Any:
        return np.tile(np.array([*map(scripted_logprob, ids)], np.float32), (len(tokens), 1))

    return TokenScores(
        chosen=np.array([*map(scripted_logprob, tokens)], np.float32),
        top_values=rows(range(wish.top)),
        top_ids=np.tile(np.arange(wish.top, dtype=np.int32), (len(tokens), 1)),
        listed=rows(wish.token_ids or []),
    )


def nothing_cached() -> int:
    return 0


@dataclass(slots=True, eq=False)
class _Running:
    request: GenerateRequest
    tokens: Iterator[int | FinishReason]
    logprobs: RequestLogprobs | None
    made: int = 0
    opened: bool = False


@dataclass(slots=True)
class _News:
    """One request's part of the next message."""

    running: _Running
    new_ids: list[int]
    finish: FinishReason | None


class ScriptedScheduler:
    """One token for each request a turn, every `token_interval_s`; one message a turn.

    cached_tokens: asked at each sending what to say of the prefix cache.
    received: every GenerateRequest. aborted: rids of AbortRequests that ended something.
    timeline: what it says its lanes did; nothing but what is put there. policies: the names that
    it takes. operations: those that came; each succeeds, and its reply has the operation_data of
    its kind.
    """

    policies = ("turns", "table")

    def __init__(
        self,
        context: zmq.Context[Any],
        ipc: IpcNames,
        script: Script = count_up,
        token_interval_s: float = 0.0,
        cached_tokens: Callable[[], int] = nothing_cached,
    ) -> None:
        self.script = script
        self.token_interval_s = token_interval_s
        self._cached_tokens = cached_tokens
        self.received: list[GenerateRequest] = []
        self.aborted: list[str] = []
        self.stopped: list[str] = []
        self.operations: list[Operation] = []
        self.operation_data: dict[type[Operation], dict[str, Any]] = {}
        self.timeline = Timeline()
        self.timeline.policy_changed("turns", time.monotonic())
        self._running: dict[str, _Running] = {}
        self._news: list[_News] = []
        self._next_turn_s = 0.0
        self._inbox: Receiver[Any] = Receiver(context, ipc.scheduler, ToScheduler)
        self._to_detokenizer = Sender(context, ipc.detokenizer)
        self._to_tokenizer = Sender(context, ipc.tokenizer)

    def run(self) -> None:
        """Serves until Shutdown, which it passes on."""
        try:
            while True:
                for message in self._inbox.recv_all(self._wait_ms()):
                    if isinstance(message, Shutdown):
                        self._to_detokenizer.send(message)
                        return
                    self._handle(message)
                self._turn()
                self._flush()
        finally:
            for end in (self._inbox, self._to_detokenizer, self._to_tokenizer):
                end.close()

    def _wait_ms(self) -> int:
        if not self._running:
            return _IDLE_POLL_MS
        return max(0, math.ceil((self._next_turn_s - time.monotonic()) * 1000))

    def _handle(self, message: Any) -> None:
        match message:
            case GenerateRequest():
                self.received.append(message)
                tokens = iter(self.script(message))
                logprobs = _logprobs_of(message)
                self._running[message.rid] = _Running(message, tokens, logprobs)
            case AbortRequest():
                for rid, running in list(self._running.items()):
                    if message.abort_all or rid.startswith(message.rid):
                        self.aborted.append(rid)
                        self._note(running, [], FinishReason(type="abort", message="aborted"))
            case StopMatched():
                self.stopped.append(message.rid)
                if message.rid in self._running:
                    self._note(self._running[message.rid], [], FinishReason(type="stop"))
            case FlushCache():
                ok = not self._running
                text = "Cache flushed." if ok else "Cache not flushed: requests are running."
                self._to_tokenizer.send(ControlReply(call_id=message.call_id, ok=ok, message=text))
            case GetState():
                state = {
                    "running_requests": len(self._running),
                    "waiting_requests": 0,
                    "waiting_tokens": 0,
                    "used_tokens": 0,
                    "token_usage": 0.0,
                    "last_gen_throughput": 0.0,
                    "paused": False,
                    "memory_usage": {},
                    "pd_multiplex": {"policy": self.timeline.policy, **self.timeline.counts},
                }
                self._to_tokenizer.send(ControlReply(call_id=message.call_id, ok=True, data=state))
            case GetTimeline():
                self._to_tokenizer.send(self._timeline_page(message))
            case SetPolicy():
                self._to_tokenizer.send(self._set_policy(message))
            case _ if isinstance(message, Operation):
                self.operations.append(message)
                data = self.operation_data.get(
                    type(message), _OPERATION_DATA.get(type(message), {})
                )
                reply = ControlReply(call_id=message.call_id, ok=True, message="Done.", data=data)
                self._to_tokenizer.send(reply)

    def _timeline_page(self, asked: GetTimeline) -> ControlReply:
        page = self.timeline.page(
            time.monotonic(), asked.seconds, _TIMELINE_PAGE, asked.next_run, asked.next_sample
        )
        data = {"page": page, "total_sms": _TOTAL_SMS}
        return ControlReply(call_id=asked.call_id, ok=True, data=data)

    def _set_policy(self, asked: SetPolicy) -> ControlReply:
        if asked.policy not in self.policies:
            message = f"expected one of {', '.join(self.policies)}, got {asked.policy!r}"
            return ControlReply(call_id=asked.call_id, ok=False, message=message)
        self.timeline.policy_changed(asked.policy, time.monotonic())
        return ControlReply(call_id=asked.call_id, ok=True)

    def _turn(self) -> None:
        now_s = time.monotonic()
        if now_s < self._next_turn_s:
            return
        # A steady rhythm, but what was missed is not made up for.
        self._next_turn_s = max(now_s, self._next_turn_s + self.token_interval_s)
        for running in list(self._running.values()):
            self._step(running)

    def _step(self, running: _Running) -> None:
        limit = running.request.sampling.max_new_tokens
        token: int | FinishReason | None = None
        if limit is None or running.made < limit:
            token = next(running.tokens, None)
        if isinstance(token, FinishReason):
            self._note(running, [], token)
        elif token is None:
            self._note(running, [], FinishReason(type="length", length=running.made))
        else:
            running.made += 1
            done = running.made == limit
            finish = FinishReason(type="length", length=running.made) if done else None
            self._note(running, [token], finish)

    def _note(self, running: _Running, ids: list[int], finish: FinishReason | None) -> None:
        if finish is not None:
            self._running.pop(running.request.rid)
            if isinstance(finish.matched, int):  # a matched stop token is a token of the answer
                ids = [*ids, finish.matched]
                running.made += 1
        wish = running.request.logprobs
        if wish is not None and running.logprobs is not None:
            for token in ids:
                running.logprobs.take_output(_scripted_scores([token], wish))
        self._news.append(_News(running, ids, finish))

    def _flush(self) -> None:
        if not self._news:
            return
        news, self._news = self._news, []
        requests = [entry.running.request for entry in news]
        self._to_detokenizer.send(
            TokenBatch(
                opened=[self._open(n.running) for n in news if not n.running.opened],
                rids=[request.rid for request in requests],
                new_ids=[entry.new_ids for entry in news],
                finish=[entry.finish for entry in news],
                prompt_tokens=[len(request.input_ids) for request in requests],
                cached_tokens=[self._cached_tokens()] * len(news),
                completion_tokens=[entry.running.made for entry in news],
                retractions=[0] * len(news),
                logprobs={
                    entry.running.request.rid: entry.running.logprobs.news(entry.new_ids, 0)
                    for entry in news
                    if entry.running.logprobs is not None
                },
            )
        )

    def _open(self, running: _Running) -> StreamOptions:
        running.opened = True
        request = running.request
        sampling = request.sampling
        return StreamOptions(
            rid=request.rid,
            prompt_tail=request.input_ids[-4:].tolist(),
            stop=sampling.stop,
            skip_special_tokens=sampling.skip_special_tokens,
            spaces_between_special_tokens=sampling.spaces_between_special_tokens,
            no_stop_trim=sampling.no_stop_trim,
            stop_regex=sampling.stop_regex,
        )


def _logprobs_of(request: GenerateRequest) -> RequestLogprobs | None:
    """With those of the prompt already there."""
    wish = request.logprobs
    if wish is None:
        return None
    prompt = np.frombuffer(request.input_ids, np.int32)
    logprobs = RequestLogprobs(wish, prompt)
    scored = logprobs.launch(0, len(prompt))
    if scored:
        ids = prompt[scored.start + 1 : scored.stop + 1].tolist()
        logprobs.take_prompt(_scripted_scores(ids, wish))
    return logprobs


def run_scripted_scheduler(
    args: ServerArgs, ipc: IpcNames, rank: int, ready: Connection, token_interval_s: float = 0.0
) -> None:
    """Process main with the default script."""
    with zmq.Context() as context:
        scheduler = ScriptedScheduler(context, ipc, token_interval_s=token_interval_s)
        announce_ready(ready, ENGINE_INFO)
        scheduler.run()
