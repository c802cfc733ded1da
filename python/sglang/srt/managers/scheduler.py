"""The scheduler process: receives requests, drives the gang, sends tokens. One a rank.

The loop, on one thread that owns all state and never blocks on a lane:

    receive   messages from the tokenizer manager and the detokenizer, and compiled grammars
    turn      settle what has finished, send new tokens to the detokenizer, plan, launch
              (drift_scheduler.gang)
    advance   operations that have become safe
    send      first tokens that the launch has set free
    control   answers to calls that waited for the engine to be idle
    rest      until a message arrives or work finishes
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import zmq

from drift_scheduler.attainment import Attainment
from drift_scheduler.dispatcher import Dispatcher
from drift_scheduler.gang import Gang
from drift_scheduler.lane import LaneProvider, Phase
from drift_scheduler.timeline import Timeline
from sglang.srt.errors import Overloaded
from sglang.srt.ipc import IpcNames, Receiver, Sender, announce_ready
from sglang.srt.managers.cycle_collector import CycleCollector, undisturbed
from sglang.srt.managers.jobs import DecodeBatch, Fill, PrefillBatch
from sglang.srt.managers.operations import Device, Operations
from sglang.srt.managers.outbox import Outbox
from sglang.srt.managers.serving_engine import ServingEngine
from sglang.srt.mem_cache.sequence_cache import SequenceCache
from sglang.srt.messages import (
    AbortRequest,
    ControlReply,
    FlushCache,
    GenerateRequest,
    GetState,
    GetTimeline,
    Message,
    Operation,
    SetPolicy,
    Shutdown,
    StopMatched,
    ToScheduler,
)
from sglang.srt.observability.driver_memory import driver_allocations
from sglang.srt.observability.scheduler_log import Load, SchedulerLog
from sglang.srt.observability.thread_time import thread_times
from sglang.srt.observability.watchdog import Watchdog
from sglang.srt.requests import Request
from sglang.srt.server_args import ServerArgs

# The loop wakes for messages and finished work; this only bounds how late a deadline is noticed.
LONGEST_WAIT_S = 0.2
# With work on lanes that cannot wake us: short against a decode step, long against a look.
BUSY_POLL_S = 50e-6
# Runs, and samples, in one answer to GetTimeline: to write them takes about half a millisecond.
TIMELINE_PAGE = 256


@dataclass(slots=True)
class _PendingFlush:
    call_id: int
    deadline_s: float


def fixed_policy(text: str) -> Dispatcher:
    """For a scheduler that keeps the dispatcher it was made with."""
    raise ValueError("this engine cannot change its policy")


class Scheduler:
    """State and loop of the process; `Executor` parts are given, so that tests can fake them."""

    def __init__(
        self,
        *,
        engine: ServingEngine,
        gang: Gang[PrefillBatch, DecodeBatch],
        timeline: Timeline,
        cache: SequenceCache,
        outbox: Outbox,
        lanes: LaneProvider,
        inbox: Receiver[Any],
        to_tokenizer: Sender,
        to_detokenizer: Sender,
        watchdog: Watchdog,
        log: SchedulerLog,
        attainment: Attainment,
        collector: CycleCollector,
        make_policy: Callable[[str], Dispatcher] = fixed_policy,
        device: Device | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._engine = engine
        self._gang = gang
        gang.on_settled = self._send
        self._timeline = timeline
        self._cache = cache
        self._outbox = outbox
        self._lanes = lanes
        self._inbox = inbox
        self._to_tokenizer = to_tokenizer
        self._to_detokenizer = to_detokenizer
        self._watchdog = watchdog
        self._log = log
        self._attainment = attainment
        self._collector = collector
        self._make_policy = make_policy
        self._clock = clock
        self._sleep = sleep
        self._operations = Operations(
            engine,
            gang,
            lanes.table,
            device,
            reply=to_tokenizer.send,
            tell_detokenizer=to_detokenizer.send,
            beat=watchdog.beat,
            counted_runs=timeline.counted_runs,
            clock=clock,
        )
        self._flushes: list[_PendingFlush] = []
        self._running = True

    def run(self) -> None:
        """Serves until Shutdown arrives."""
        while True:
            self._receive()
            if not self._running:
                if self._is_idle:
                    self._engine.check()
                return
            progressed = self._gang.turn()
            self._operations.advance()
            if progressed or self._nothing_to_do():
                self._watchdog.beat()
            self._send()
            self._control()
            if not progressed:
                self._rest()

    @property
    def _is_idle(self) -> bool:
        return self._engine.idle and self._gang.idle

    def _nothing_to_do(self) -> bool:
        engine = self._engine
        return engine.idle or engine.only_compiles or self._operations.at_rest

    def load(self) -> Load:
        """For the log lines. Cached prefixes that can be evicted do not count as used."""
        total = self._cache.allocator.total
        used = total - self._cache.available_tokens
        return Load(
            token_usage=used / total,
            used_tokens=used,
            running=self._engine.num_running,
            queued=self._engine.queued,
        )

    def _receive(self) -> None:
        for message in self._inbox.drain():
            self._handle(message)
        self._engine.take_compiled()

    def _handle(self, message: Message) -> None:
        match message:
            case GenerateRequest():
                self._engine.add(message)
            case StopMatched():
                self._engine.stop_matched(message.rid)
            case AbortRequest():
                self._engine.abort(message.rid, abort_all=message.abort_all)
            case FlushCache():
                deadline_s = self._clock() + message.timeout_s
                self._flushes.append(_PendingFlush(message.call_id, deadline_s))
            case GetState():
                reply = ControlReply(call_id=message.call_id, ok=True, data=self._state())
                self._to_tokenizer.send(reply)
            case GetTimeline():
                self._to_tokenizer.send(self._timeline_page(message))
            case SetPolicy():
                self._to_tokenizer.send(self._set_policy(message))
            case _ if isinstance(message, Operation):
                self._operations.take(message)
            case Shutdown():
                self._running = False
                self._to_detokenizer.send(message)
            case _:
                raise AssertionError(f"the scheduler does not take {type(message).__name__}")

    def _send(self) -> None:
        batch = self._outbox.flush()
        if batch is not None:
            self._to_detokenizer.send(batch)

    def _control(self) -> None:
        """Flushes wait for an idle engine."""
        idle = self._is_idle
        for flush in list(self._flushes):
            if idle or self._operations.may_flush:
                self._engine.check()
                self._engine.reset_cache()
                reply = ControlReply(call_id=flush.call_id, ok=True, message="Cache flushed.")
            elif self._clock() >= flush.deadline_s:
                reply = ControlReply(
                    call_id=flush.call_id,
                    ok=False,
                    message=f"Cache not flushed: {self._engine.num_running} requests are running "
                    f"and {self._engine.queued} are waiting.",
                )
            else:
                continue
            self._flushes.remove(flush)
            self._to_tokenizer.send(reply)

    def _timeline_page(self, asked: GetTimeline) -> ControlReply:
        page = self._timeline.page(
            self._clock(), asked.seconds, TIMELINE_PAGE, asked.next_run, asked.next_sample
        )
        data = {"page": page, "total_sms": self._lanes.table.total_sms}
        return ControlReply(call_id=asked.call_id, ok=True, data=data)

    def _set_policy(self, asked: SetPolicy) -> ControlReply:
        """What is in flight goes on; the next turn is the new policy's."""
        try:
            self._operations.use(self._make_policy(asked.policy))
        except ValueError as error:
            return ControlReply(call_id=asked.call_id, ok=False, message=str(error))
        self._timeline.policy_changed(asked.policy, self._clock())
        return ControlReply(call_id=asked.call_id, ok=True)

    def _rest(self) -> None:
        if self._gang.idle:
            if self._collector.idle():
                self._engine.check()  # which takes milliseconds that no request shall wait
            self._inbox.wait(self._wait_ms(), self._engine.grammars.bell)
            return
        self._collector.busy()
        fd = self._lanes.completion_fd()
        if fd is None:
            self._poll_lanes(self._wait_s())
            return
        self._inbox.wait(self._wait_ms(), fd)
        _drain(fd)

    def _poll_lanes(self, limit_s: float) -> None:
        """Until work has finished or a message is there. A turn for every look would keep the
        interpreter from the thread that launches."""
        until_s = self._clock() + limit_s
        while True:
            self._sleep(BUSY_POLL_S)
            if self._gang.has_finished_work or self._inbox.has_messages():
                return
            if self._clock() >= until_s:
                return

    def _wait_s(self) -> float:
        """Until the dispatcher wants to look again, at most LONGEST_WAIT_S."""
        look_again_s = self._gang.look_again_s
        if look_again_s is None:
            return LONGEST_WAIT_S
        return max(0.0, min(look_again_s - self._clock(), LONGEST_WAIT_S))

    def _wait_ms(self) -> int:
        return math.ceil(self._wait_s() * 1000)

    def _state(self) -> dict[str, Any]:
        """One entry of /server_info's internal_states."""
        load = self.load()
        return {
            "last_gen_throughput": self._log.gen_throughput,
            "realtime_tokens": self._log.realtime_tokens,
            "running_requests": load.running,
            "waiting_requests": load.queued,
            "waiting_tokens": self._engine.waiting_tokens,
            "paused": self._operations.paused,
            "memory_usage": self._operations.usage(),
            "used_tokens": load.used_tokens,
            "token_usage": load.token_usage,
            "cached_tokens": self._cache.radix.evictable + self._cache.radix.protected,
            "available_tokens": self._cache.allocator.available,
            "evictable_tokens": self._cache.radix.evictable,
            "evicted_tokens": self._cache.radix.stats.evicted_tokens,
            "retractions": self._engine.retractions,
            "slo": self._attainment.snapshot(self._clock()),
            "grammars": self._engine.grammars.state(),
            "engine_thread": thread_times(),
            "driver_allocations": driver_allocations(),
            "pd_multiplex": {
                "enabled": bool(self._lanes.table.splits),
                "policy": self._timeline.policy,
                **self._timeline.counts,
                "host_allowance_s": self._gang.host_allowance_s,
                "prefill_busy_s": self._timeline.busy_s(Phase.PREFILL),
                "decode_busy_s": self._timeline.busy_s(Phase.DECODE),
                "both_busy_s": self._timeline.both_busy_s,
                "fused_busy_s": self._timeline.fused_busy_s,
                "partitions": [
                    {
                        "prefill_sms": partition.prefill_sms,
                        "decode_sms": partition.decode_sms,
                        "exclusive": partition.exclusive,
                        "launches": self._timeline.launches(partition),
                    }
                    for partition in map(
                        self._lanes.table.__getitem__, range(len(self._lanes.table))
                    )
                ],
            },
        }


def run_scheduler(server_args: ServerArgs, ipc: IpcNames, rank: int, ready: Connection) -> None:
    """Process main. Returns after Shutdown; whatever it raises ends the server."""
    from sglang.srt.managers.engine_parts import build_engine
    from sglang.srt.profiling.calibrate import keep_what_was_learnt

    log = SchedulerLog(server_args.decode_log_interval)

    def log_prefill(fills: Sequence[Fill]) -> None:
        log.prefill(
            seqs=len(fills),
            new_tokens=sum(fill.tokens for fill in fills),
            cached_tokens=sum(fill.cached_tokens for fill in fills),
            load=scheduler.load(),
        )

    def log_decode(members: Sequence[Request]) -> None:
        log.decode(requests=len(members), load=scheduler.load, slo=window_if_asked)

    def window_if_asked() -> dict[str, Any] | None:
        return attainment.snapshot(time.monotonic())["window"] if attainment.any_slo else None

    parts = build_engine(
        server_args,
        on_prefill=log_prefill,
        on_decode=log_decode,
        on_finish=lambda request: count_finished(attainment, request),
    )
    attainment = Attainment(time.monotonic())  # loading the model is no time to serve in
    executor = parts.executor
    watchdog = Watchdog(server_args.watchdog_timeout)
    with zmq.Context() as context:
        inbox: Receiver[Any] = Receiver(context, ipc.scheduler, ToScheduler)
        to_tokenizer = Sender(context, ipc.tokenizer)
        to_detokenizer = Sender(context, ipc.detokenizer)
        scheduler = Scheduler(
            engine=parts.engine,
            gang=parts.gang,
            timeline=parts.timeline,
            cache=parts.cache,
            outbox=parts.outbox,
            lanes=executor.lanes,
            inbox=inbox,
            to_tokenizer=to_tokenizer,
            to_detokenizer=to_detokenizer,
            watchdog=watchdog,
            log=log,
            attainment=attainment,
            collector=CycleCollector(),
            make_policy=executor.policies.make,
            device=executor.live_model,
        )
        parts.timeline.policy_changed(server_args.policy().text, time.monotonic())
        pool_tokens = parts.cache.allocator.total
        try:
            with undisturbed():
                watchdog.start()
                announce_ready(
                    ready,
                    {
                        "max_total_num_tokens": pool_tokens,
                        "max_req_input_len": min(executor.config.context_length, pool_tokens) - 1,
                        "max_running_requests": executor.num_rows - 1,
                        "attention_backend": executor.attention_backend,
                        "device": str(executor.device),
                    },
                )
                scheduler.run()
        finally:
            watchdog.stop()
            inbox.close()
            to_tokenizer.close()
            to_detokenizer.close()
            keep_what_was_learnt(server_args, executor.latencies)
    executor.close()


def count_finished(attainment: Attainment, request: Request) -> None:
    """Any refusal for want of room counts as shed; other aborts do not count."""
    assert request.finish is not None
    if request.finish.type != "abort":
        attainment.finish(request.pace, request.slo, request.uncached_at_arrival, request.slo_class)
    elif request.finish.status_code == Overloaded.status_code:
        attainment.shed(request.slo_class)


def _drain(fd: int) -> None:
    """Clears a completion counter; it may have been cleared already."""
    try:
        os.eventfd_read(fd)
    except BlockingIOError:
        return
