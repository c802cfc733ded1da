"""EngineControls: operations on a running engine, for HTTP endpoints and Engine alike.

Each takes the fields of the endpoint's body and raises RequestError naming the one at fault; the
reply says whether the scheduler did it, and if not, why.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal

import pydantic

from sglang.srt.entrypoints.fields import ABSENT, OFF
from sglang.srt.entrypoints.json_body import BodyForm
from sglang.srt.errors import RequestError
from sglang.srt.managers.operations import FINISH_LIMIT_S
from sglang.srt.managers.tokenizer_manager import TokenizerManager
from sglang.srt.messages import (
    ContinueGeneration,
    ControlReply,
    FreezeGarbage,
    GetWeights,
    Message,
    PauseGeneration,
    ReleaseMemory,
    ResumeMemory,
    StartProfile,
    StopProfile,
    UpdateWeights,
)

# Beyond what the scheduler may wait for requests: reading weights, capturing graphs, a trace.
WORK_LIMIT_S = 1800.0

_RELEASED = "memory is released; requests are taken again after /resume_memory_occupation"
_Tag = Literal["kv_cache", "weights", "cuda_graph"]
_ALL_TAGS: list[_Tag] = ["kv_cache", "weights", "cuda_graph"]


class _Body(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", strict=True)


class _PauseBody(_Body):
    mode: Literal["abort", "retract", "in_place"] = "abort"


class _ProfileBody(_Body):
    output_dir: str | None = None
    start_step: int | None = pydantic.Field(default=None, ge=0)
    num_steps: int | None = pydantic.Field(default=None, ge=1)
    activities: list[Literal["CPU", "GPU", "CUDA_PROFILER", "MEM"]] | None = None
    with_stack: bool | None = None
    record_shapes: bool | None = None
    profile_prefix: str | None = pydantic.Field(default=None, pattern=r"^[\w.-]*$")


class _UpdateBody(_Body):
    model_path: str = pydantic.Field(min_length=1)
    load_format: str | None = None
    abort_all_requests: bool = False
    weight_version: str | None = None
    keep_pause: bool = False
    flush_cache: bool = True


class _WeightsBody(_Body):
    name: str
    truncate_size: int = pydantic.Field(default=100, ge=1)


class _VersionBody(_Body):
    new_version: str = pydantic.Field(min_length=1)
    abort_all_requests: bool = True


class _MemoryBody(_Body):
    tags: list[_Tag] | None = pydantic.Field(default=None, min_length=1)


PAUSE = BodyForm(_PauseBody, optional=True)
# The flag asks for memory that launches have left over: there is none beyond the pools.
CONTINUE = BodyForm(_Body, {"torch_empty_cache": (None, False, True)}, optional=True)
PROFILE = BodyForm(
    _ProfileBody,
    {
        "profile_by_stage": OFF,
        "merge_profiles": (None, False, True),  # there is one rank
        "profile_stages": ABSENT,
        "profile_id": ABSENT,
        "roofline_annotations": OFF,
        "detailed_annotations": OFF,
    },
    optional=True,
)
UPDATE = BodyForm(
    _UpdateBody,
    {
        "is_async": OFF,
        "torch_empty_cache": (None, False, True),  # nothing is left that it could give back
        "recapture_cuda_graph": (None, False, True),  # graphs read weights where the old ones lay
        "manifest": ABSENT,
    },
    frozenset({"token_step"}),
)
WEIGHTS = BodyForm(_WeightsBody, optional=True)
VERSION = BodyForm(_VersionBody)
MEMORY = BodyForm(_MemoryBody, optional=True)


class EngineControls:
    """Of one engine. On the loop of its manager."""

    def __init__(self, manager: TokenizerManager, model_path: str, load_format: str) -> None:
        self._manager = manager
        self._default_format = load_format
        self.model_path = model_path
        """Where the weights that are served come from."""
        self.paused = False
        self._working = 0

    @property
    def working(self) -> bool:
        """Whether an operation is under way, which may keep the scheduler from answering."""
        return self._working > 0

    @property
    def at_rest(self) -> bool:
        """Whether no token is to be expected."""
        return self.paused or self._manager.refusal is not None

    async def pause(self, fields: Mapping[str, Any]) -> ControlReply:
        body = PAUSE.of(fields)
        self.paused = True
        reply = await self._ask(partial(PauseGeneration, mode=body.mode))
        self.paused = reply.ok
        return reply

    async def resume(self, fields: Mapping[str, Any]) -> ControlReply:
        CONTINUE.of(fields)
        reply = await self._ask(ContinueGeneration)
        self.paused = self.paused and not reply.ok
        return reply

    async def start_profile(self, fields: Mapping[str, Any]) -> ControlReply:
        body = PROFILE.of(fields)
        folder = os.environ.get("SGLANG_TORCH_PROFILER_DIR") or tempfile.gettempdir()
        return await self._ask(
            partial(
                StartProfile,
                output_dir=os.path.abspath(body.output_dir or folder),
                activities=list(body.activities or ("CPU", "GPU")),
                prefix=body.profile_prefix or "",
                start_step=body.start_step,
                num_steps=body.num_steps,
                with_stack=bool(body.with_stack),
                record_shapes=bool(body.record_shapes),
            )
        )

    async def stop_profile(self) -> ControlReply:
        return await self._ask(StopProfile)

    async def update_weights(self, fields: Mapping[str, Any]) -> ControlReply:
        body = UPDATE.of(fields)
        if body.keep_pause and not self.paused:
            raise RequestError("keep_pause: generation is not paused", "keep_pause")
        reply = await self._ask(
            partial(
                UpdateWeights,
                model_path=body.model_path,
                load_format=body.load_format or self._default_format,
                abort_all=body.abort_all_requests,
                flush_cache=body.flush_cache,
            )
        )
        if reply.ok:
            self.model_path = body.model_path
            if body.weight_version is not None:
                self._manager.weight_version = body.weight_version
        return reply

    async def update_weight_version(self, fields: Mapping[str, Any]) -> str:
        body = VERSION.of(fields)
        if body.abort_all_requests:
            self._manager.abort("", abort_all=True)
        self._manager.weight_version = body.new_version
        return body.new_version

    async def get_weights(self, fields: Mapping[str, Any]) -> list[Any]:
        body = WEIGHTS.of(fields)
        reply = await self._ask(partial(GetWeights, name=body.name, rows=body.truncate_size))
        if not reply.ok:
            raise RequestError(reply.message, "name")
        values: list[Any] = reply.data["values"]
        return values

    async def release_memory(self, fields: Mapping[str, Any]) -> ControlReply:
        body = MEMORY.of(fields)
        reply = await self._ask(partial(ReleaseMemory, tags=list(body.tags or _ALL_TAGS)))
        self._note_released(reply)
        return reply

    async def resume_memory(self, fields: Mapping[str, Any]) -> ControlReply:
        body = MEMORY.of(fields)
        reply = await self._ask(partial(ResumeMemory, tags=list(body.tags or _ALL_TAGS)))
        self._note_released(reply)
        return reply

    async def freeze_gc(self) -> ControlReply:
        return await self._ask(FreezeGarbage)

    def _note_released(self, reply: ControlReply) -> None:
        if "released" in reply.data:
            self._manager.refusal = _RELEASED if reply.data["released"] else None

    async def _ask(self, make: Callable[..., Message]) -> ControlReply:
        self._working += 1
        try:
            return await self._manager.ask(
                lambda call_id: make(call_id=call_id), FINISH_LIMIT_S + WORK_LIMIT_S
            )
        finally:
            self._working -= 1
