"""The scheduler's profiler: what it records, when it stops, and what it refuses."""

from __future__ import annotations

import gzip
import json
import threading

import pytest
import torch

from sglang.srt.errors import SglangError
from sglang.srt.managers.profiling import Profiling
from sglang.srt.messages import StartProfile


class Steps:
    """Counts; `run` is a step on a thread that was there before, as a CPU lane's is."""

    def __init__(self) -> None:
        self.count = 0
        self.asked = threading.Semaphore(0)
        self.done = threading.Semaphore(0)
        threading.Thread(target=self._work, daemon=True).start()

    def _work(self) -> None:
        while True:
            self.asked.acquire()
            torch.ones(8, 8) @ torch.ones(8, 8)
            self.done.release()

    def run(self, profiling: Profiling, steps: int = 1) -> None:
        for _ in range(steps):
            self.asked.release()
            assert self.done.acquire(timeout=10)
            self.count += 1
            profiling.advance()


def asked(folder, **fields) -> StartProfile:
    return StartProfile(call_id=1, output_dir=str(folder), activities=["CPU"], **fields)


def names(path) -> list[str]:
    """Of the operators in a trace."""
    with gzip.open(path) as file:
        events = json.load(file)["traceEvents"]
    return [event["name"] for event in events if event.get("cat") == "cpu_op"]


def test_a_trace_has_the_work_of_other_threads(tmp_path):
    steps = Steps()
    profiling = Profiling(lambda: steps.count)
    profiling.start(asked(tmp_path / "new", prefix="mine"))
    steps.run(profiling, 2)
    path = profiling.stop()["path"]
    assert path.startswith(str(tmp_path / "new" / "mine-"))
    assert names(path).count("aten::matmul") == 2
    with pytest.raises(SglangError, match="already"):
        profiling.start(asked(tmp_path)), profiling.start(asked(tmp_path))
    profiling.stop()


def test_it_begins_and_ends_at_the_steps_that_were_named(tmp_path):
    steps = Steps()
    profiling = Profiling(lambda: steps.count)
    profiling.start(asked(tmp_path, start_step=3, num_steps=2))
    steps.run(profiling, 2)
    assert not list(tmp_path.iterdir())
    steps.run(profiling, 3)
    [path] = tmp_path.iterdir()
    assert names(path).count("aten::matmul") == 2
    assert profiling.stop()["path"] == str(path)  # who stops it by habit hears where it is


def test_what_cannot_be_recorded_is_refused(tmp_path):
    profiling = Profiling(lambda: 0)
    with pytest.raises(SglangError, match="not been started"):
        profiling.stop()
    if not torch.cuda.is_available():
        memory = StartProfile(call_id=1, output_dir=str(tmp_path), activities=["MEM"])
        with pytest.raises(SglangError, match="MEM need a GPU"):
            profiling.start(memory)
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(SglangError, match="output_dir"):
        profiling.start(asked(file / "below"))
    profiling.start(asked(tmp_path, start_step=5))
    with pytest.raises(SglangError, match="nothing was recorded"):
        profiling.stop()
