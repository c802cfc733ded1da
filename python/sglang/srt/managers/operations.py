"""Operations: calls that change how the engine runs, done on its thread at a safe point.

    running ──pause──> halting ──nothing in flight──> at rest ──continue──> running

While halting, prefill batches in flight go through their last layers and launched steps settle, but
nothing begins. An operation that needs more waits, while no new request starts, until those that
have begun are served: weights under a request must not change unless somebody has paused it.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from drift_scheduler.dispatcher import Dispatcher
from drift_scheduler.gang import Gang
from drift_scheduler.partition import PartitionTable
from drift_scheduler.policies.hold import Finish, Halt
from sglang.srt.errors import SglangError
from sglang.srt.garbage import freeze_what_is_here
from sglang.srt.managers.jobs import DecodeBatch, PrefillBatch
from sglang.srt.managers.profiling import Profiling
from sglang.srt.managers.serving_engine import ServingEngine
from sglang.srt.messages import (
    ContinueGeneration,
    ControlReply,
    FreezeGarbage,
    GetWeights,
    Operation,
    PauseGeneration,
    ReleaseMemory,
    ResumeMemory,
    SetInternalState,
    StartProfile,
    StopProfile,
    UpdateWeights,
)

logger = logging.getLogger(__name__)

# How long requests that have begun may keep an operation waiting.
FINISH_LIMIT_S = 600.0


class Device(Protocol):
    """What an operation does to the model and its memory. Each raises SglangError, and has then
    changed nothing. Only with nothing in flight, but for `rows` and `usage`."""

    def update_weights(
        self, model_path: str, load_format: str, beat: Callable[[], None]
    ) -> None: ...

    def rows(self, name: str, count: int) -> list[Any]: ...

    def release(self, tags: list[str]) -> None: ...

    def resume(self, tags: list[str], beat: Callable[[], None]) -> None: ...

    def usage(self) -> dict[str, Any]: ...

    @property
    def released(self) -> frozenset[str]: ...


class Refusal(SglangError):
    """The operation cannot be done now or at all; the text says why."""


@dataclass(frozen=True, slots=True)
class _Waiting:
    message: PauseGeneration | UpdateWeights | ReleaseMemory | ResumeMemory
    deadline_s: float


class Operations:
    """`take` a message, `advance` every turn; replies go to `reply`.

    beat: called where an operation is long. counted_runs: launches that have settled so far.
    """

    def __init__(
        self,
        engine: ServingEngine,
        gang: Gang[PrefillBatch, DecodeBatch],
        table: PartitionTable,
        device: Device | None,
        *,
        reply: Callable[[ControlReply], None],
        tell_detokenizer: Callable[[FreezeGarbage], None],
        beat: Callable[[], None],
        counted_runs: Callable[[], int],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._engine = engine
        self._gang = gang
        self._device = device
        self._reply = reply
        self._tell_detokenizer = tell_detokenizer
        self._beat = beat
        self._clock = clock
        self._profiling = Profiling(counted_runs)
        self._dispatcher = gang.dispatcher  # what decides when nothing is held
        self._halt, self._finish = Halt(table), Finish(table)
        self._waiting: deque[_Waiting] = deque()
        self.paused: str | None = None

    @property
    def at_rest(self) -> bool:
        """Nothing is in flight, and nothing will be until somebody says so."""
        return self._held and self._gang.idle

    @property
    def may_flush(self) -> bool:
        """Whether cached prefixes can be forgotten although requests wait."""
        return self.at_rest and not self._engine.holds_memory

    def use(self, dispatcher: Dispatcher) -> None:
        """From now on this one decides, as soon as nothing is held."""
        self._dispatcher = dispatcher
        self._gang.learn_host_anew()
        self._hold()

    def take(self, message: Operation) -> None:
        """Does what can be done at once; the rest waits for its turn."""
        match message:
            case PauseGeneration() | UpdateWeights() | ReleaseMemory() | ResumeMemory():
                deadline_s = self._clock() + FINISH_LIMIT_S
                self._waiting.append(_Waiting(message, deadline_s))
                if isinstance(message, PauseGeneration):
                    self.paused = message.mode
                if _aborts(message):
                    self._engine.abort("", abort_all=True)
            case ContinueGeneration():
                self._answer(message.call_id, self._continue)
            case StartProfile():
                self._answer(message.call_id, lambda: self._profiling.start(message))
            case StopProfile():
                self._answer(message.call_id, self._profiling.stop)
            case FreezeGarbage():
                freeze_what_is_here()
                self._tell_detokenizer(message)
                self._answer(message.call_id, lambda: {"message": "Garbage collection frozen."})
            case SetInternalState():
                self._answer(message.call_id, lambda: self._set(message.values))
            case GetWeights():
                self._answer(message.call_id, lambda: self._rows(message))
        self._hold()

    def advance(self) -> None:
        """Called once a turn: does what has become safe."""
        self._profiling.advance()
        if self._held and self._gang.idle:
            self._engine.send_held_tokens()
        while self._waiting:
            first = self._waiting[0]
            if not self._is_safe_for(first.message):
                if self._clock() < first.deadline_s:
                    return
                self._refuse_late(first.message)
            else:
                self._answer(first.message.call_id, partial(self._do, first.message))
            self._waiting.popleft()
            self._hold()

    def usage(self) -> dict[str, Any]:
        """GB of device memory, by what it is for."""
        return {} if self._device is None else self._device.usage()

    @property
    def _held(self) -> bool:
        return self.paused is not None or bool(self._waiting) or bool(self._released)

    @property
    def _released(self) -> frozenset[str]:
        return frozenset() if self._device is None else self._device.released

    def _hold(self) -> None:
        if not self._held:
            self._gang.dispatcher = self._dispatcher
        elif self.paused is not None or self._released or self._waits_for_halt():
            self._gang.dispatcher = self._halt
        else:
            self._gang.dispatcher = self._finish

    def _waits_for_halt(self) -> bool:
        message = self._waiting[0].message
        return not isinstance(message, UpdateWeights | ReleaseMemory) or _aborts(message)

    def _is_safe_for(self, message: Operation) -> bool:
        if not self._gang.idle:
            return False
        served = isinstance(message, UpdateWeights | ReleaseMemory) and self.paused is None
        return not (served and self._engine.holds_memory)

    def _do(
        self, message: PauseGeneration | UpdateWeights | ReleaseMemory | ResumeMemory
    ) -> dict[str, Any]:
        match message:
            case PauseGeneration():
                if message.mode == "retract":
                    self._engine.retract_all()
                return {"message": f"Generation paused ({message.mode})."}
            case UpdateWeights():
                return self._update_weights(message)
            case ReleaseMemory():
                device = self._known_device()
                if "kv_cache" in message.tags:
                    self._require_no_memory_held("the KV cache cannot be released")
                    self._engine.reset_cache()
                device.release(message.tags)
                released = sorted(device.released)
                return {"message": f"Released: {', '.join(released)}.", "released": released}
            case ResumeMemory():
                device = self._known_device()
                device.resume(message.tags, self._beat)
                left = sorted(device.released)
                text = f"Still released: {', '.join(left)}." if left else "All memory is back."
                return {"message": text, "released": left}

    def _update_weights(self, message: UpdateWeights) -> dict[str, Any]:
        if message.flush_cache:
            self._require_no_memory_held("the cache cannot be flushed")
        held = self._engine.queued + self._engine.num_running if self.paused else 0
        self._known_device().update_weights(message.model_path, message.load_format, self._beat)
        if message.flush_cache:
            self._engine.reset_cache()
        return {"message": f"Weights of {message.model_path}.", "num_paused_requests": held}

    def _require_no_memory_held(self, what: str) -> None:
        if self._engine.holds_memory:
            raise Refusal(
                f"{what} under requests that are paused in place: pause with mode retract or abort"
            )

    def _known_device(self) -> Device:
        if self._device is None:
            raise Refusal("this engine has no model whose weights or memory could change")
        return self._device

    def _rows(self, message: GetWeights) -> dict[str, Any]:
        return {"values": self._known_device().rows(message.name, message.rows)}

    def _continue(self) -> dict[str, Any]:
        if self._released:
            raise Refusal(f"memory is released: resume {', '.join(sorted(self._released))} first")
        self.paused = None
        return {"message": "Generation continues."}

    def _set(self, values: dict[str, Any]) -> dict[str, Any]:
        limits = {
            "max_queued_requests": "max_queued",
            "schedule_conservativeness": "conservativeness",
        }
        self._engine.set_limits(**{limits[name]: value for name, value in values.items()})
        return {"message": f"Set: {', '.join(values)}."}

    def _refuse_late(self, message: Operation) -> None:
        text = f"requests are still running after {FINISH_LIMIT_S:g} s"
        self._reply(ControlReply(call_id=message.call_id, ok=False, message=text))

    def _answer(self, call_id: int, work: Callable[[], dict[str, Any]]) -> None:
        try:
            data = work()
        except SglangError as error:
            logger.warning("refused: %s", error)
            self._reply(ControlReply(call_id=call_id, ok=False, message=str(error)))
            return
        message = data.pop("message", "")
        self._reply(ControlReply(call_id=call_id, ok=True, message=message, data=data))


def _aborts(message: Operation) -> bool:
    if isinstance(message, PauseGeneration):
        return message.mode == "abort"
    return isinstance(message, UpdateWeights) and message.abort_all
