"""What a server and an Engine have in common: children started, a manager made, all of it ended."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection

from sglang.srt.entrypoints.process_group import ChildSpec, ProcessGroup
from sglang.srt.entrypoints.server_state import ServerState
from sglang.srt.ipc import IpcNames
from sglang.srt.managers.detokenizer_manager import run_detokenizer
from sglang.srt.managers.prompts import Limits, PromptEncoder
from sglang.srt.managers.request_log import RequestLog
from sglang.srt.managers.tokenizer_manager import TokenizerManager
from sglang.srt.observability.request_metrics import RequestMetrics
from sglang.srt.served_model import ServedModel, load_served_model
from sglang.srt.server_args import ServerArgs

logger = logging.getLogger(__name__)

SCHEDULER = "sglang::scheduler"
DETOKENIZER = "sglang::detokenizer"

START_LIMIT_S = 3600.0  # a large model from a slow disk, kernels compiled from scratch
CHILD_EXIT_LIMIT_S = 10.0

SchedulerMain = Callable[[ServerArgs, IpcNames, int, Connection], None]
DetokenizerMain = Callable[[ServerArgs, IpcNames, Connection], None]


@dataclass(frozen=True, slots=True)
class Parts:
    """What a server is made of. The mains run in children and must be importable by name."""

    scheduler: SchedulerMain
    detokenizer: DetokenizerMain = run_detokenizer
    load_model: Callable[[ServerArgs], ServedModel] = load_served_model


def default_parts() -> Parts:
    """The real ones. Loads torch."""
    from sglang.srt.managers.scheduler import run_scheduler

    return Parts(run_scheduler)


def start_children(
    args: ServerArgs, parts: Parts, group: ProcessGroup, ipc: IpcNames
) -> ServerState:
    """Returns once all children are ready; the state's manager is still to be started.

    Raises StartFailed or ConfigError; the group is then the caller's to kill.
    """
    group.spawn(
        [
            ChildSpec(SCHEDULER, parts.scheduler, (args, ipc, 0), args.log_level),
            ChildSpec(DETOKENIZER, parts.detokenizer, (args, ipc), args.log_level),
        ]
    )
    model = parts.load_model(args)
    infos = group.wait_ready(START_LIMIT_S)
    manager = TokenizerManager(
        PromptEncoder(
            model.tokenizer,
            Limits(model.vocab_size, model.context_length, args.allow_auto_truncate),
        ),
        ipc,
        log=RequestLog(args.log_requests_level) if args.log_requests else None,
        metrics=RequestMetrics() if args.enable_metrics else None,
    )
    return ServerState(args, manager, model, infos[SCHEDULER])


async def end_children(manager: TokenizerManager, group: ProcessGroup, *, in_order: bool) -> None:
    """Lets the children leave by themselves if they are in order, and kills who is left."""
    group.expect_exit()
    if in_order:
        manager.send_shutdown()
        if not await asyncio.to_thread(group.join, CHILD_EXIT_LIMIT_S):
            logger.warning("children must be killed: %s", group.exit_codes())
    await asyncio.to_thread(group.kill)
