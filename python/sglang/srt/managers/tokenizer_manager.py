"""TokenizerManager: the asyncio end of the pipeline.

A call of `generate` becomes one request for each answer; increments come back from the
detokenizer and are handed to whoever iterates. Leaving the iteration early, for whatever reason,
aborts what is unfinished, unless it is in the background: a client that hangs up frees its place at
once.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing, suppress
from dataclasses import replace
from functools import partial

import msgspec
import zmq

from drift_scheduler.timeline import TimelinePage
from drift_scheduler.window import TimelineWindow
from sglang.srt.errors import Overloaded, RequestError
from sglang.srt.ipc import AsyncReceiver, IpcNames, Sender
from sglang.srt.managers.answer_logprobs import AnswerLogprobs
from sglang.srt.managers.answers import Answer, Update
from sglang.srt.managers.call import Call, EngineFailed
from sglang.srt.managers.prompts import Prompt, PromptEncoder, TokenizedPrompt
from sglang.srt.managers.request_ids import WireIds, public_ids
from sglang.srt.managers.request_log import RequestLog
from sglang.srt.messages import (
    AbortRequest,
    ControlReply,
    FlushCache,
    GenerateRequest,
    GetState,
    GetTimeline,
    Message,
    SetPolicy,
    Shutdown,
    TextBatch,
    ToTokenizer,
)
from sglang.srt.observability.request_metrics import RequestMetrics
from sglang.srt.sampling_params import SamplingParams
from sglang.srt.service_levels import OWN_REQUEST


class TokenizerManager:
    """Must be started, used and closed on one event loop."""

    def __init__(
        self,
        encoder: PromptEncoder,
        ipc: IpcNames,
        *,
        log: RequestLog | None = None,
        metrics: RequestMetrics | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.encoder = encoder
        self._ipc = ipc
        self.metrics = metrics
        self._log = log
        self._clock = clock
        self._wire_ids = WireIds()
        self._in_flight: dict[str, tuple[Call, Answer]] = {}  # by wire id
        self._public: dict[str, str] = {}  # public id -> wire id
        self._control: dict[int, asyncio.Future[ControlReply]] = {}
        self._calls_made = 0
        self._accepting = True
        self._failure: str | None = None
        self._idle = asyncio.Event()
        self._idle.set()
        self._heard = asyncio.Event()

    async def start(self) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._to_scheduler = Sender(self._context, self._ipc.scheduler)
        self._inbox: AsyncReceiver[TextBatch | ControlReply] = AsyncReceiver(
            self._ipc.tokenizer, ToTokenizer
        )
        self.reader = asyncio.create_task(self._read(), name="tokenizer-manager")

    async def close(self) -> None:
        """Releases the sockets; requests still in flight fail."""
        self.fail_all("the server is shutting down")
        self.reader.cancel()
        with suppress(asyncio.CancelledError):
            await self.reader
        self._inbox.close()
        self._to_scheduler.close()
        self._context.term()
        self.encoder.close()

    @property
    def in_flight(self) -> int:
        return len(self._in_flight)

    async def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        rid: str | Sequence[str] | None = None,
        stream: bool = True,
        background: bool = False,
        logged: bool = True,
    ) -> AsyncGenerator[Update, None]:
        """Yields news of the answers as they come; with `stream` off, each answer once, finished.

        Answers are numbered prompt by prompt, `sampling.n` for each. In the background they are
        completed though nobody iterates any more. Those not `logged` are left out of the log.
        Raises RequestError for a bad prompt or rid, Overloaded while shutting down, EngineFailed
        if the engine dies.
        """
        self._check_open()
        started_s = self._clock()
        if rid is None:
            rid = uuid.uuid4().hex
        names = public_ids(rid, [prompt.sampling.n for prompt in prompts])
        self._check_unused(names)
        tokenized = await self.encoder.encode(prompts)
        self._check_open()  # tokenising may have taken a while
        self._check_unused(names)

        call_id = rid if isinstance(rid, str) else names[0]
        expanded = [answer for prompt in tokenized for answer in _each_answer(prompt)]
        answers = [
            Answer(
                index=i,
                rid=name,
                call_id=call_id,
                wire_id=self._wire_ids.make(name),
                prompt=prompt,
                started_s=started_s,
                logprobs=None if prompt.logprobs is None else AnswerLogprobs.empty(),
            )
            for i, (name, prompt) in enumerate(zip(names, expanded, strict=True))
        ]
        call = Call(answers, stream)
        for answer in answers:
            self._launch(call, answer)
        log = self._log if logged else None
        if log is not None:
            log.received(names, prompts)
        try:
            async with aclosing(call.updates()) as updates:
                async for update in updates:
                    if log is not None and update.answer.finish is not None:
                        log.finished(update.answer)
                    yield update
        finally:
            for answer in () if background else answers:
                if self._forget(answer):
                    self._send(AbortRequest(rid=answer.wire_id))
                    if self.metrics is not None:
                        self.metrics.left(answer)

    def abort(self, rid: str, abort_all: bool = False) -> None:
        """Ends the requests whose public id starts with `rid`; an empty one matches nothing."""
        if abort_all:
            self._send(AbortRequest(abort_all=True))
        elif rid:
            for public, wire in list(self._public.items()):
                if public.startswith(rid):
                    self._send(AbortRequest(rid=wire))

    async def flush_cache(self, timeout_s: float) -> ControlReply:
        """Empties the prefix cache. Raises TimeoutError if the engine says nothing."""
        return await self._ask(
            lambda call_id: FlushCache(call_id=call_id, timeout_s=timeout_s), timeout_s + 10
        )

    async def engine_state(self, timeout_s: float = 10) -> ControlReply:
        return await self._ask(lambda call_id: GetState(call_id=call_id), timeout_s)

    async def timeline(self, seconds: float, timeout_s: float = 10) -> TimelineWindow:
        """What the lanes ran in the last `seconds`, as far as it is kept.

        Asked for page by page, so that the engine never pauses for long to answer.
        """
        pages: list[TimelinePage] = []
        ask = partial(GetTimeline, seconds=seconds)
        while True:
            reply = await self._ask(partial(_with_call_id, ask), timeout_s)
            page = msgspec.convert(reply.data["page"], TimelinePage)
            pages.append(page)
            if page.next_run >= pages[0].end_run and page.next_sample >= pages[0].end_sample:
                return TimelineWindow.of_pages(pages, reply.data["total_sms"])
            ask = partial(ask, next_run=page.next_run, next_sample=page.next_sample)

    async def set_policy(self, policy: str, timeout_s: float = 10) -> None:
        """Hands the lanes to another policy. Raises RequestError if there is none of that name."""
        reply = await self._ask(
            lambda call_id: SetPolicy(call_id=call_id, policy=policy), timeout_s
        )
        if not reply.ok:
            raise RequestError(f"policy: {reply.message}", "policy")

    async def probe(self, timeout_s: float) -> bool:
        """True if the engine sends any text at all within the limit, given a token to make."""
        self._heard.clear()
        sampling = SamplingParams(max_new_tokens=1, temperature=0.0)
        prompt = Prompt(
            sampling, input_ids=[0], namespace="health", field="input_ids", level=OWN_REQUEST
        )
        heard = asyncio.create_task(self._heard.wait())
        answered = asyncio.create_task(self._drain_call(prompt))
        try:
            await asyncio.wait(
                (heard, answered), timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED
            )
            return heard.done()
        finally:
            heard.cancel()
            answered.cancel()
            await asyncio.gather(heard, answered, return_exceptions=True)

    def stop_accepting(self) -> None:
        """From now on `generate` raises Overloaded; what is in flight goes on."""
        self._accepting = False

    async def drained(self) -> None:
        """Returns when nothing is in flight."""
        await self._idle.wait()

    def fail_all(self, message: str) -> None:
        """Ends everything in flight with an error and takes nothing new."""
        self._failure = message
        for call, _ in list(self._in_flight.values()):
            call.fail(message)
        for reply in self._control.values():
            if not reply.done():
                reply.set_exception(EngineFailed(message))

    def send_shutdown(self) -> None:
        """Tells the scheduler, and through it the detokenizer, to exit."""
        self._send(Shutdown())

    def _check_open(self) -> None:
        if self._failure is not None:
            raise EngineFailed(self._failure)
        if not self._accepting:
            raise Overloaded("the server is shutting down")

    def _check_unused(self, names: Sequence[str]) -> None:
        for name in names:
            if name in self._public:
                raise RequestError(f"rid: {name!r} is in use by a request in flight", "rid")

    def _launch(self, call: Call, answer: Answer) -> None:
        self._in_flight[answer.wire_id] = (call, answer)
        self._public[answer.rid] = answer.wire_id
        self._idle.clear()
        self._send(
            GenerateRequest(
                rid=answer.wire_id,
                input_ids=answer.prompt.input_ids,
                sampling=answer.prompt.sampling,
                arrival_s=answer.started_s,
                namespace=answer.prompt.namespace,
                slo=answer.prompt.level.slo,
                slo_class=answer.prompt.level.class_name,
                logprobs=answer.prompt.logprobs,
                rank=answer.prompt.rank,
            )
        )

    def _forget(self, answer: Answer) -> bool:
        """Whether the answer was still in flight."""
        if self._in_flight.pop(answer.wire_id, None) is None:
            return False
        del self._public[answer.rid]
        if not self._in_flight:
            self._idle.set()
        return True

    def _send(self, message: Message) -> None:
        self._to_scheduler.send(message)

    async def _ask(self, make: Callable[[int], Message], timeout_s: float) -> ControlReply:
        if self._failure is not None:
            raise EngineFailed(self._failure)
        self._calls_made += 1
        call_id = self._calls_made
        reply = self._control[call_id] = asyncio.get_running_loop().create_future()
        try:
            self._send(make(call_id))
            return await asyncio.wait_for(reply, timeout_s)
        finally:
            del self._control[call_id]

    async def _drain_call(self, prompt: Prompt) -> None:
        async with aclosing(self.generate([prompt], stream=False)) as updates:
            async for _ in updates:
                pass

    async def _read(self) -> None:
        """Ends only by cancellation or by a failure of ours."""
        while True:
            for message in await self._inbox.recv_all():
                if isinstance(message, TextBatch):
                    self._on_text(message)
                else:
                    self._on_reply(message)

    def _on_text(self, batch: TextBatch) -> None:
        self._heard.set()
        now_s = self._clock()
        for i, wire_id in enumerate(batch.rids):
            entry = self._in_flight.get(wire_id)
            if entry is None:  # its client has gone; the abort is on its way
                continue
            call, answer = entry
            answer.take(batch, i, now_s)
            if self.metrics is not None:
                self.metrics.took(answer, len(batch.new_ids[i]), now_s)
            if answer.finish is not None:
                self._forget(answer)
            call.noticed(answer)

    def _on_reply(self, reply: ControlReply) -> None:
        waiting = self._control.get(reply.call_id)
        if waiting is not None and not waiting.done():
            waiting.set_result(reply)


def _with_call_id(make: Callable[..., Message], call_id: int) -> Message:
    return make(call_id=call_id)


def _each_answer(prompt: TokenizedPrompt) -> list[TokenizedPrompt]:
    """One prompt for each of the n answers; a given seed gives each answer its own."""
    sampling = prompt.sampling
    if sampling.n == 1:
        return [prompt]
    answers = []
    for j in range(sampling.n):
        seed = sampling.sampling_seed
        if seed is not None:
            seed = (seed + j + 2**63) % 2**64 - 2**63  # stays in 64 bits
        one = msgspec.structs.replace(sampling, n=1, sampling_seed=seed)
        answers.append(replace(prompt, sampling=one))
    return answers
