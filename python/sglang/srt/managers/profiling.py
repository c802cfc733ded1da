"""Profiling: torch's profiler in the scheduler's process, over all of its threads and lanes.

A trace is one file for ui.perfetto.dev or chrome://tracing. A step is one launch on a lane: a
decode step, or a slice of a prefill batch.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sglang.srt.errors import SglangError
from sglang.srt.messages import StartProfile

logger = logging.getLogger(__name__)


class ProfileRefused(SglangError):
    """Profiling cannot be started or stopped now, or its trace cannot be written."""


class Profiling:
    """Used on the engine thread. counted_steps: steps so far."""

    def __init__(self, counted_steps: Callable[[], int]) -> None:
        self._counted_steps = counted_steps
        self._asked: StartProfile | None = None
        self._profiler: Any = None
        self._ends_at: int | None = None
        self._last_path: str | None = None

    def start(self, asked: StartProfile) -> dict[str, Any]:
        """Now, or at the step that it names. Raises ProfileRefused."""
        import torch

        if self._asked is not None:
            raise ProfileRefused("profiling has been started already: stop it first")
        on_gpu = torch.cuda.is_available()
        if not on_gpu and set(asked.activities) & {"CUDA_PROFILER", "MEM"}:
            raise ProfileRefused("activities: CUDA_PROFILER and MEM need a GPU")
        try:
            Path(asked.output_dir).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ProfileRefused(f"output_dir: {asked.output_dir}: {error.strerror}") from None
        self._asked = asked
        self._last_path = None
        if asked.start_step is None or self._counted_steps() >= asked.start_step:
            self._begin()
            text = "Profiling"
        else:
            text = f"Profiling begins at step {asked.start_step}"
        seen = [name for name in asked.activities if on_gpu or name != "GPU"]
        return {"message": f"{text}: {', '.join(seen)}; traces go to {asked.output_dir}."}

    def stop(self) -> dict[str, Any]:
        """Writes the trace. Raises ProfileRefused if there is none."""
        if self._asked is None:
            if self._last_path is not None:  # it has stopped by itself
                return {"message": f"Trace: {self._last_path}", "path": self._last_path}
            raise ProfileRefused("profiling has not been started")
        if self._profiler is None:
            self._asked = None
            raise ProfileRefused("profiling is stopped before its first step: nothing was recorded")
        path = self._end()
        return {"message": f"Trace: {path}", "path": path}

    def advance(self) -> None:
        """Begins and ends where steps were named."""
        asked = self._asked
        if asked is None:
            return
        if self._profiler is None:
            assert asked.start_step is not None
            if self._counted_steps() >= asked.start_step:
                self._begin()
        elif self._ends_at is not None and self._counted_steps() >= self._ends_at:
            try:
                self._end()
            except ProfileRefused as error:
                logger.error("%s", error)

    def _begin(self) -> None:
        import torch
        from torch.profiler import ProfilerActivity, profile

        asked = self._asked
        assert asked is not None
        on_gpu = torch.cuda.is_available()
        kinds = {"CPU": ProfilerActivity.CPU, "GPU": ProfilerActivity.CUDA}
        activities = [
            kinds[name] for name in asked.activities if name in kinds and (on_gpu or name != "GPU")
        ]
        if "CUDA_PROFILER" in asked.activities:
            torch.cuda.profiler.start()
        if "MEM" in asked.activities:
            torch.cuda.memory._record_memory_history(max_entries=100_000)
        self._profiler = profile(
            activities=activities or [ProfilerActivity.CPU],
            with_stack=asked.with_stack,
            record_shapes=asked.record_shapes,
            # CPU lanes are threads that began before.
            experimental_config=torch._C._profiler._ExperimentalConfig(profile_all_threads=True),
        )
        self._profiler.start()
        if asked.num_steps is not None:
            self._ends_at = self._counted_steps() + asked.num_steps

    def _end(self) -> str:
        import torch

        asked, profiler = self._asked, self._profiler
        assert asked is not None
        self._asked = self._profiler = self._ends_at = None
        prefix = f"{asked.prefix}-" if asked.prefix else ""
        path = Path(asked.output_dir) / f"{prefix}{time.time():.3f}-TP-0.trace.json.gz"
        profiler.stop()
        if "CUDA_PROFILER" in asked.activities:
            torch.cuda.profiler.stop()
        try:
            profiler.export_chrome_trace(str(path))
            if "MEM" in asked.activities:
                torch.cuda.memory._dump_snapshot(f"{path}.memory.pickle")
                torch.cuda.memory._record_memory_history(enabled=None)
        except OSError as error:
            raise ProfileRefused(f"the trace cannot be written: {error}") from None
        self._last_path = str(path)
        logger.info("Profiled: %s", path)
        return str(path)
