"""What the HTTP handlers share: made once, handed to the app, found through the request."""

from __future__ import annotations

import enum
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from fastapi import Request

from sglang.srt.entrypoints.engine_controls import EngineControls
from sglang.srt.entrypoints.openai.responses.store import ResponseStore
from sglang.srt.managers.tokenizer_manager import TokenizerManager
from sglang.srt.served_model import ServedModel
from sglang.srt.server_args import ServerArgs
from sglang.srt.service_levels import ServiceLevels


class Phase(enum.Enum):
    STARTING = "starting"
    SERVING = "serving"
    STOPPING = "stopping"


@dataclass(slots=True)
class ServerState:
    args: ServerArgs
    manager: TokenizerManager
    model: ServedModel
    engine_info: Mapping[str, Any] = field(default_factory=dict)
    phase: Phase = Phase.STARTING
    created_unix_s: int = field(default_factory=lambda: int(time.time()))
    startup_s: float | None = None
    responses: ResponseStore = field(default_factory=ResponseStore)
    levels: ServiceLevels = field(init=False)
    controls: EngineControls = field(init=False)

    def __post_init__(self) -> None:
        self.manager.weight_version = self.args.weight_version
        self.controls = EngineControls(self.manager, self.args.model_path, self.args.load_format)
        self.levels = self.args.service_levels()


def state_of(request: Request) -> ServerState:
    return cast(ServerState, request.app.state.server)
