"""What the driver says of a GPU: its clock, power and heat, and what holds the clock down.

Needs the package nvidia-ml-py, whose module is pynvml; without it nothing is known.
"""

from __future__ import annotations

import importlib
import logging
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from sglang.srt.profiling.readings import Readings

logger = logging.getLogger(__name__)

INTERVAL_S = 0.1

# Of nvmlDeviceGetCurrentClocksEventReasons, in the driver's words. An idle GPU's low clock and a
# clock that somebody has set are no concern of a measurement under load.
_LIMITS = {
    "power cap": 0x4,
    "hardware slowdown": 0x8,
    "sync boost": 0x10,
    "software thermal slowdown": 0x20,
    "hardware thermal slowdown": 0x40,
    "power brake": 0x80,
}


class NvmlDevice:
    """One GPU. Every reading takes as long as the driver likes."""

    def __init__(self, nvml: Any, handle: Any) -> None:
        self._nvml = nvml
        self._handle = handle

    def sm_clock_mhz(self) -> float:
        return float(self._nvml.nvmlDeviceGetClockInfo(self._handle, self._nvml.NVML_CLOCK_SM))

    def state(self) -> GpuState:
        nvml, handle = self._nvml, self._handle
        reasons = nvml.nvmlDeviceGetCurrentClocksEventReasons(handle)
        return GpuState(
            sm_clock_mhz=self.sm_clock_mhz(),
            power_w=nvml.nvmlDeviceGetPowerUsage(handle) / 1e3,
            power_limit_w=nvml.nvmlDeviceGetEnforcedPowerLimit(handle) / 1e3,
            temperature_c=float(nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU)),
            limited_by=tuple(name for name, bit in _LIMITS.items() if reasons & bit),
        )

    def close(self) -> None:
        self._nvml.nvmlShutdown()


@dataclass(frozen=True, slots=True)
class GpuState:
    """limited_by: what holds the clock down, if anything: keys of _LIMITS."""

    sm_clock_mhz: float
    power_w: float
    power_limit_w: float
    temperature_c: float
    limited_by: tuple[str, ...]

    @classmethod
    def typical(cls, states: Sequence[GpuState]) -> GpuState:
        """Of at least one: medians of clock and power, and the tightest of the rest."""
        seen = {name for state in states for name in state.limited_by}
        return cls(
            statistics.median(state.sm_clock_mhz for state in states),
            statistics.median(state.power_w for state in states),
            min(state.power_limit_w for state in states),
            max(state.temperature_c for state in states),
            tuple(name for name in _LIMITS if name in seen),
        )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class NvmlClock(Readings[float]):
    """A drift_scheduler.clock.ClockReader."""

    def read_mhz(self) -> float | None:
        """None before the first reading and once reading has failed."""
        return self.last()

    def mean_mhz(self, since_s: float) -> float | None:
        """Of the readings since then (time.monotonic()); the last one if there is none."""
        recent = self.since(since_s)
        return statistics.fmean(recent) if recent else None


class GpuWatch(Readings[GpuState]):
    """For a benchmark: what state the GPU was in while something was measured."""

    def typical(self, since_s: float) -> GpuState | None:
        """Of the readings since then (time.monotonic()); None if there is none at all."""
        recent = self.since(since_s)
        return GpuState.typical(recent) if recent else None


def device_clock(
    device: torch.device,
    *,
    interval_s: float = INTERVAL_S,
    on_reading: Callable[[float, float], None] = lambda mhz, now_s: None,
) -> NvmlClock | None:
    """Of a torch device; None for a CPU, and if it cannot be read. To be closed by the caller."""
    if device.type != "cuda":
        return None
    return open_clock(_uuid(device), interval_s=interval_s, on_reading=on_reading)


def open_clock(
    gpu_uuid: str,
    *,
    interval_s: float = INTERVAL_S,
    on_reading: Callable[[float, float], None] = lambda mhz, now_s: None,
) -> NvmlClock | None:
    """Of the GPU with this UUID, with or without "GPU-" before it; None if it cannot be read."""
    found = _open(gpu_uuid, NvmlDevice.sm_clock_mhz)
    if found is None:
        return None
    return NvmlClock(
        found.sm_clock_mhz,
        what="SM clock",
        interval_s=interval_s,
        on_reading=on_reading,
        close=found.close,
    )


def watch_device(device: torch.device, *, interval_s: float = INTERVAL_S) -> GpuWatch | None:
    """As device_clock, but of all that a GpuState says."""
    return None if device.type != "cuda" else watch_gpu(_uuid(device), interval_s=interval_s)


def watch_gpu(gpu_uuid: str, *, interval_s: float = INTERVAL_S) -> GpuWatch | None:
    """As open_clock, but of all that a GpuState says."""
    found = _open(gpu_uuid, NvmlDevice.state)
    if found is None:
        return None
    return GpuWatch(found.state, what="state of the GPU", interval_s=interval_s, close=found.close)


def _uuid(device: torch.device) -> str:
    """CUDA may number the devices in another order than the driver does."""
    return str(torch.cuda.get_device_properties(device).uuid)


def _open(gpu_uuid: str, try_read: Callable[[NvmlDevice], object]) -> NvmlDevice | None:
    """None, and why is logged, if the first reading fails."""
    try:
        nvml: Any = importlib.import_module("pynvml")
    except ImportError:
        logger.debug("Without the package nvidia-ml-py the clock of a GPU is not known")
        return None
    name = gpu_uuid if gpu_uuid.startswith("GPU-") else f"GPU-{gpu_uuid}"
    try:
        nvml.nvmlInit()
        found = NvmlDevice(nvml, nvml.nvmlDeviceGetHandleByUUID(name))
        try_read(found)
    except nvml.NVMLError as error:
        logger.warning("The clock of %s cannot be read: %s", name, error)
        return None
    return found
