"""How an Engine ends, whatever becomes of its program or children. The scheduler is scripted."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

from sglang.srt.entrypoints.engine import Engine
from sglang.srt.entrypoints.start_up import Parts
from sglang.srt.managers.scripted_scheduler import run_scripted_scheduler
from sglang.srt.served_model import ServedModel

LIMIT_S = 60.0
ROOT = Path(__file__).resolve().parents[3]
ENDLESS = {"max_new_tokens": None}
PROGRAM = """
import os, signal, sys, time
from sglang.srt.entrypoints.engine import Engine
from sglang.srt.entrypoints.start_up import Parts
from sglang.srt.managers.scripted_scheduler import run_scripted_scheduler
from sglang.srt.served_model import ServedModel

def main():
    parts = Parts(run_scripted_scheduler, load_model=lambda args: ServedModel(1000, 512))
    engine = Engine(model_path="scripted", skip_tokenizer_init=True, parts=parts)
    engine.generate(input_ids=[1], sampling_params={"max_new_tokens": 2})
    print(*engine.get_all_child_pids(), flush=True)
    if sys.argv[1] == "waits":
        time.sleep(60)
    if sys.argv[1] == "interrupted":
        engine.generate(input_ids=[1], sampling_params={"max_new_tokens": None})

if __name__ == "__main__":
    main()
"""


@pytest.mark.parametrize(
    ("mode", "number", "code"),
    [
        ("falls off", None, 0),
        ("waits", signal.SIGTERM, -signal.SIGTERM),
        ("interrupted", signal.SIGINT, -signal.SIGINT),
    ],
)
def test_however_the_program_ends_no_child_is_left(
    tmp_path: Path, mode: str, number: signal.Signals | None, code: int
) -> None:
    script = tmp_path / "program.py"
    script.write_text(PROGRAM)
    paths = [str(ROOT / "python"), str(ROOT), str(ROOT / "sgl-kernel")]
    program = subprocess.Popen(
        [sys.executable, str(script), mode],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "TMPDIR": str(tmp_path)},
    )
    assert program.stdout is not None
    pids = [int(pid) for pid in program.stdout.readline().split()]
    assert len(pids) == 2, program.communicate(timeout=LIMIT_S)
    children = [psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)]
    if number is not None:
        program.send_signal(number)
    _, errors = program.communicate(timeout=LIMIT_S)
    assert program.returncode == code, errors
    _, alive = psutil.wait_procs(children, timeout=5)
    assert not alive
    if number is not signal.SIGTERM:
        assert not list(tmp_path.glob("sglang-ipc-*"))


@pytest.fixture
def engine() -> Iterator[Engine]:
    with _engine() as engine:
        yield engine


def _engine(**scheduler_options: Any) -> Engine:
    scheduler = partial(run_scripted_scheduler, **{"token_interval_s": 0.05, **scheduler_options})
    parts = Parts(scheduler, load_model=lambda args: ServedModel(1000, 512))
    return Engine(model_path="scripted", skip_tokenizer_init=True, parts=parts)


def ends_with(engine: Engine, work: Callable[[], Any]) -> list[Exception]:
    """What two endless calls raise after `work`, one a stream."""
    stream = engine.generate(input_ids=[1], sampling_params=ENDLESS, stream=True)
    next(stream)
    errors: list[Exception] = []

    def collect(call: Callable[[], Any]) -> None:
        try:
            call()
        except Exception as error:
            errors.append(error)

    calls = (
        lambda: list(stream),
        lambda: engine.generate(input_ids=[1], sampling_params=ENDLESS),
    )
    threads = [threading.Thread(target=collect, args=(call,), daemon=True) for call in calls]
    for thread in threads:
        thread.start()
    work()
    for thread in threads:
        thread.join(LIMIT_S)
        assert not thread.is_alive()
    return errors


def test_shutdown_fails_calls_in_flight_and_later_ones(engine: Engine) -> None:
    errors = ends_with(engine, engine.shutdown)
    assert [str(error) for error in errors] == ["the engine is shut down"] * 2
    with pytest.raises(Exception, match="shut down"):
        engine.generate(input_ids=[1])
    with pytest.raises(Exception, match="shut down"):
        engine.flush_cache()
    assert engine.get_all_child_pids() == []


@pytest.mark.parametrize("child", [0, 1])
def test_the_death_of_a_child_fails_calls_in_flight_and_later_ones(
    engine: Engine, child: int
) -> None:
    pid = engine.get_all_child_pids()[child]
    errors = ends_with(engine, lambda: os.kill(pid, signal.SIGKILL))
    assert len(errors) == 2
    assert all("was killed by SIGKILL" in str(error) for error in errors)
    started_s = time.monotonic()
    with pytest.raises(Exception, match="was killed by SIGKILL"):
        engine.generate(input_ids=[1])
    engine.shutdown()
    assert time.monotonic() - started_s < 5
    assert engine.get_all_child_pids() == []


def test_a_child_that_cannot_start_says_why() -> None:
    with pytest.raises(Exception, match="sglang::scheduler failed: TypeError"):
        _engine(no_such_option=1)


def test_an_engine_may_be_made_and_ended_in_a_thread_that_is_not_the_main_one() -> None:
    results: list[Any] = []

    def work() -> None:
        with _engine() as engine:
            results.append(engine.generate(input_ids=[1], sampling_params={"max_new_tokens": 2}))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(LIMIT_S)
    assert results[0]["output_ids"] == [100, 101]
