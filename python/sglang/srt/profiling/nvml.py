"""The clock of a GPU's SMs, read beside the engine by a thread of its own.

Needs the package nvidia-ml-py, whose module is pynvml; without it there is no clock.
"""

from __future__ import annotations

import importlib
import logging
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch

logger = logging.getLogger(__name__)

INTERVAL_S = 0.1
CLOSE_LIMIT_S = 5.0
KEPT = 512  # readings


def _nothing(mhz: float, now_s: float) -> None:
    return None


class NvmlClock:
    """A drift_scheduler.clock.ClockReader that keeps the last readings.

    A read blocks its thread for as long as the driver likes, and nobody else: whoever asks is
    given what was read last.
    """

    def __init__(
        self,
        read_mhz: Callable[[], float],
        *,
        interval_s: float = INTERVAL_S,
        on_reading: Callable[[float, float], None] = _nothing,
        close: Callable[[], None] = lambda: None,
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        """read_mhz: one that raises ends the readings. on_reading: called by the thread with each
        and its time (time.monotonic()), such as ClockRatio.feed. close: called by the thread when
        it stops."""
        self._read = read_mhz
        self._on_reading = on_reading
        self._interval_s = interval_s
        self._close = close
        self._now_s = now_s
        self._readings: deque[tuple[float, float]] = deque(maxlen=KEPT)
        self._stopping = threading.Event()
        self._first = threading.Event()
        self._thread = threading.Thread(target=self._run, name="sm-clock", daemon=True)
        self._thread.start()

    def read_mhz(self) -> float | None:
        """What was read last; None before the first reading and once reading has failed."""
        try:
            return self._readings[-1][1]
        except IndexError:
            return None

    def mean_mhz(self, since_s: float) -> float | None:
        """Of the readings since then (time.monotonic()); the last one if there is none."""
        recent = [mhz for read_s, mhz in self._readings.copy() if read_s >= since_s]
        return statistics.fmean(recent) if recent else self.read_mhz()

    def wait_first(self, timeout_s: float) -> bool:
        """Until there is a reading, or never will be one. False: not in time."""
        return self._first.wait(timeout_s)

    def close(self) -> None:
        """Stops the thread; may be called twice."""
        self._stopping.set()
        self._thread.join(CLOSE_LIMIT_S)

    def __enter__(self) -> NvmlClock:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _run(self) -> None:
        try:
            while not self._stopping.is_set():
                mhz = self._read()
                now_s = self._now_s()
                self._readings.append((now_s, mhz))
                self._on_reading(mhz, now_s)
                self._first.set()
                self._stopping.wait(self._interval_s)
        except Exception as error:
            # A clock that stands still misleads more than none.
            self._readings.clear()
            logger.warning("The SM clock cannot be read any more: %s", error)
        finally:
            self._first.set()
            self._close()


def device_clock(
    device: torch.device,
    *,
    interval_s: float = INTERVAL_S,
    on_reading: Callable[[float, float], None] = _nothing,
) -> NvmlClock | None:
    """Of a torch device; None for a CPU, and if it cannot be read. To be closed by the caller."""
    if device.type != "cuda":
        return None
    uuid = str(torch.cuda.get_device_properties(device).uuid)
    return open_clock(uuid, interval_s=interval_s, on_reading=on_reading)


def open_clock(
    gpu_uuid: str,
    *,
    interval_s: float = INTERVAL_S,
    on_reading: Callable[[float, float], None] = _nothing,
) -> NvmlClock | None:
    """Of the GPU with this UUID, with or without "GPU-" before it; None if it cannot be read.

    A UUID, since CUDA may number the devices in another order than the driver does.
    """
    try:
        nvml: Any = importlib.import_module("pynvml")
    except ImportError:
        logger.debug("Without the package nvidia-ml-py the SM clock is not known")
        return None
    name = gpu_uuid if gpu_uuid.startswith("GPU-") else f"GPU-{gpu_uuid}"
    try:
        nvml.nvmlInit()
        handle = nvml.nvmlDeviceGetHandleByUUID(name)
        nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM)
    except nvml.NVMLError as error:
        logger.warning("The SM clock of %s cannot be read: %s", name, error)
        return None

    def read_mhz() -> float:
        return float(nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM))

    return NvmlClock(
        read_mhz, interval_s=interval_s, on_reading=on_reading, close=nvml.nvmlShutdown
    )
