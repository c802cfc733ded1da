"""A whole server with a scripted scheduler, as a program: `scripted_server.py MODE PORT`.

test_process_group starts it, signals it and kills its children.
"""

from __future__ import annotations

import sys
import time
from multiprocessing.connection import Connection

from sglang.srt.errors import ConfigError
from sglang.srt.ipc import IpcNames
from sglang.srt.managers.scripted_scheduler import run_scripted_scheduler
from sglang.srt.server_args import ServerArgs


def steady(args: ServerArgs, ipc: IpcNames, rank: int, ready: Connection) -> None:
    run_scripted_scheduler(args, ipc, rank, ready, token_interval_s=0.02)


def misconfigured(args: ServerArgs, ipc: IpcNames, rank: int, ready: Connection) -> None:
    raise ConfigError("--mem-fraction-static 0.1 leaves no room for a single token")


def broken(args: ServerArgs, ipc: IpcNames, rank: int, ready: Connection) -> None:
    raise RuntimeError("a bug of ours")


def gone(args: ServerArgs, ipc: IpcNames, rank: int, ready: Connection) -> None:
    sys.exit(7)


def slow_to_start(args: ServerArgs, ipc: IpcNames, rank: int, ready: Connection) -> None:
    time.sleep(60)


def fails_while_serving(args: ServerArgs, ipc: IpcNames, rank: int, ready: Connection) -> None:
    import threading

    import zmq

    from sglang.srt.ipc import announce_ready
    from sglang.srt.managers.scripted_scheduler import ScriptedScheduler
    from sglang.srt.messages import GenerateRequest

    def trip(request: GenerateRequest) -> list[int]:
        if request.sampling.max_new_tokens == 13:
            raise RuntimeError("tripped by a request")
        return [100] * 500

    assert threading.current_thread() is threading.main_thread()
    with zmq.Context() as context:
        scheduler = ScriptedScheduler(context, ipc, trip, token_interval_s=0.02)
        announce_ready(ready, {})
        scheduler.run()


MAINS = {
    main.__name__: main
    for main in (steady, misconfigured, broken, gone, slow_to_start, fails_while_serving)
}

if __name__ == "__main__":
    from sglang.srt.entrypoints.http_server import launch
    from sglang.srt.entrypoints.start_up import Parts
    from sglang.srt.served_model import ServedModel

    mode, port = sys.argv[1], int(sys.argv[2])
    sys.exit(
        launch(
            ServerArgs(model_path="scripted", skip_tokenizer_init=True, port=port),
            Parts(MAINS[mode], load_model=lambda args: ServedModel(1000, 512)),
        )
    )
