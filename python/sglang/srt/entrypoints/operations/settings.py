"""Settings that may change while the server runs."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import pydantic
from fastapi import APIRouter, Request, Response

from sglang.srt.entrypoints.error_forms import JsonResponse
from sglang.srt.entrypoints.fields import ABSENT
from sglang.srt.entrypoints.json_body import BodyForm, takes
from sglang.srt.entrypoints.operations.outcome import outcome
from sglang.srt.entrypoints.server_state import state_of
from sglang.srt.errors import ConfigError, RequestError
from sglang.srt.garbage import freeze_what_is_here
from sglang.srt.managers.request_log import RequestLog
from sglang.srt.messages import SetInternalState

router = APIRouter()

_SCHEDULER_SETTINGS = ("max_queued_requests", "schedule_conservativeness")
_SETTINGS = (*_SCHEDULER_SETTINGS, "pd_multiplex_policy")
_ANSWER_LIMIT_S = 10.0


@router.api_route("/freeze_gc", methods=["GET", "POST"])
async def freeze_gc(request: Request) -> Response:
    """In all processes: walking what stays anyway would only stop streams."""
    freeze_what_is_here()
    return outcome(await state_of(request).controls.freeze_gc())


class _StateBody(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", strict=True)

    server_args: dict[str, Any] = pydantic.Field(min_length=1)


_STATE = BodyForm(_StateBody)


@router.api_route("/set_internal_state", methods=["POST", "PUT"])
@takes(_STATE)
async def set_internal_state(request: Request) -> Response:
    state = state_of(request)
    values = (await _STATE.read(request)).server_args
    for name in values:
        if name not in _SETTINGS:
            known = ", ".join(_SETTINGS)
            raise RequestError(f"server_args.{name}: only {known} can change", name)
    try:
        args = dataclasses.replace(state.args, **values)
        args.check()
    except ConfigError as error:
        raise RequestError(f"server_args: {error}", "server_args") from None
    if "pd_multiplex_policy" in values:
        await state.manager.set_policy(args.policy().text)
    scheduler = {name: values[name] for name in _SCHEDULER_SETTINGS if name in values}
    if scheduler:
        make = partial(SetInternalState, values=scheduler)
        await state.manager.ask(lambda call_id: make(call_id=call_id), _ANSWER_LIMIT_S)
    state.args = args
    return JsonResponse({"updated": True, "server_args": values})


class _LoggingBody(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", strict=True)

    log_requests: bool | None = None
    log_requests_level: int | None = pydantic.Field(default=None, ge=0, le=3)


_LOGGING = BodyForm(
    _LoggingBody,
    {
        "log_requests_format": ABSENT,
        "dump_requests_folder": ABSENT,
        "dump_requests_threshold": ABSENT,
        "crash_dump_folder": ABSENT,
    },
    optional=True,
)


@router.api_route("/configure_logging", methods=["GET", "POST"])
@takes(_LOGGING)
async def configure_logging(request: Request) -> Response:
    """--log-requests and --log-requests-level from now on."""
    state = state_of(request)
    given = (await _LOGGING.read(request)).model_dump(exclude_none=True)
    args = state.args = dataclasses.replace(state.args, **given)
    state.manager.use_log(RequestLog(args.log_requests_level) if args.log_requests else None)
    return Response(status_code=200)
