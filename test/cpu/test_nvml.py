"""What NVML says of a GPU, through a stand-in for its library: the clock, and the watch."""

from __future__ import annotations

import logging
import sys
import threading
import time
import types

import pytest
import torch

from drift_scheduler.clock import ClockRatio
from sglang.srt.profiling.nvml import (
    GpuState,
    NvmlClock,
    device_clock,
    open_clock,
    watch_device,
    watch_gpu,
)

LIMIT_S = 10.0


class FakeNvml(types.ModuleType):
    """NVIDIA's library with one GPU, whose clock `mhz` says; None raises."""

    NVML_CLOCK_SM = 1
    NVML_TEMPERATURE_GPU = 0

    class NVMLError(Exception):
        pass

    def __init__(self):
        super().__init__("pynvml")
        self.mhz = 1980
        self.reasons = 0
        self.shut_down = threading.Event()
        self.read = threading.Semaphore(0)

    def nvmlInit(self):  # noqa: N802
        pass

    def nvmlShutdown(self):  # noqa: N802
        self.shut_down.set()

    def nvmlDeviceGetHandleByUUID(self, uuid):  # noqa: N802
        if uuid != "GPU-1234":
            raise self.NVMLError(f"no {uuid}")
        return "handle"

    def nvmlDeviceGetClockInfo(self, handle, kind):  # noqa: N802
        assert (handle, kind) == ("handle", self.NVML_CLOCK_SM)
        self.read.release()
        if self.mhz is None:
            raise self.NVMLError("gone")
        return self.mhz

    def nvmlDeviceGetPowerUsage(self, handle):  # noqa: N802
        return 650_000

    def nvmlDeviceGetEnforcedPowerLimit(self, handle):  # noqa: N802
        return 700_000

    def nvmlDeviceGetTemperature(self, handle, sensor):  # noqa: N802
        assert sensor == self.NVML_TEMPERATURE_GPU
        return 61

    def nvmlDeviceGetCurrentClocksEventReasons(self, handle):  # noqa: N802
        return self.reasons


@pytest.fixture
def nvml(monkeypatch):
    module = FakeNvml()
    monkeypatch.setitem(sys.modules, "pynvml", module)
    return module


class TestClock:
    @pytest.mark.parametrize("uuid", ["1234", "GPU-1234"])
    def test_the_last_reading_is_kept(self, nvml, uuid):
        with open_clock(uuid, interval_s=0.001) as clock:
            assert clock.wait_first(LIMIT_S)
            assert clock.read_mhz() == clock.mean_mhz(since_s=0.0) == 1980.0
            nvml.mhz = 1400
            for _ in range(nvml.read._value + 3):
                assert nvml.read.acquire(timeout=LIMIT_S)
            assert clock.read_mhz() == 1400.0
        assert nvml.shut_down.wait(LIMIT_S)

    def test_closing_does_not_wait_for_the_interval(self, nvml):
        clock = open_clock("1234", interval_s=3600.0)
        assert clock.wait_first(LIMIT_S)
        clock.close()
        assert nvml.shut_down.is_set()
        clock.close()

    def test_readings_end_with_the_first_that_fails(self):
        values = iter([1000.0, 1500.0, 1700.0])
        times = iter([10.0, 20.0, 30.0])
        clock = NvmlClock(
            lambda: next(values), what="SM clock", interval_s=0.0, now_s=lambda: next(times)
        )
        clock._thread.join(LIMIT_S)
        assert not clock._thread.is_alive()
        assert clock.read_mhz() is None
        assert clock.mean_mhz(0.0) is None

    def test_the_mean_is_of_what_was_read_meanwhile(self):
        three, more = threading.Event(), threading.Event()
        values = iter([1000.0, 1500.0, 1700.0])
        times = iter([10.0, 20.0, 30.0])

        def read():
            value = next(values, None)
            if value is None:
                three.set()
                assert more.wait(LIMIT_S)
                return 0.0
            return value

        clock = NvmlClock(read, what="SM clock", interval_s=0.0, now_s=lambda: next(times, 40.0))
        assert three.wait(LIMIT_S)
        assert clock.mean_mhz(15.0) == 1600.0
        assert clock.mean_mhz(0.0) == 1400.0
        assert clock.mean_mhz(35.0) == 1700.0  # the last one: none was read since
        more.set()
        clock.close()

    def test_readings_are_handed_on(self, nvml):
        ratio = ClockRatio()
        with open_clock("1234", interval_s=0.001, on_reading=ratio.feed):
            for _ in range(4):  # open_clock's own and three of the thread's
                assert nvml.read.acquire(timeout=LIMIT_S)
        assert ratio.at(time.monotonic()) == pytest.approx(1980.0)

    def test_a_cpu_has_none(self):
        assert device_clock(torch.device("cpu")) is None

    def test_without_the_package(self, monkeypatch, caplog):
        monkeypatch.setitem(sys.modules, "pynvml", None)
        caplog.set_level(logging.DEBUG)
        assert open_clock("1234") is None
        assert [(r.levelname, "nvidia-ml-py" in r.message) for r in caplog.records] == [
            ("DEBUG", True)
        ]

    def test_an_unknown_gpu(self, nvml, caplog):
        assert open_clock("5678") is None
        assert "no GPU-5678" in caplog.text

    def test_a_clock_that_cannot_be_read_any_more_is_not_known(self, nvml, caplog):
        clock = open_clock("1234", interval_s=0.001)
        assert clock.wait_first(LIMIT_S)
        nvml.mhz = None
        assert nvml.shut_down.wait(LIMIT_S)
        assert clock.read_mhz() is None
        assert "gone" in caplog.text
        clock.close()


class TestWatch:
    def test_all_that_the_driver_says(self, nvml):
        nvml.reasons = 0x1 | 0x4 | 0x40  # idle, too, which is no limit
        with watch_gpu("1234", interval_s=0.001) as watch:
            assert watch.wait_first(LIMIT_S)
            assert watch.typical(0.0) == GpuState(
                1980.0, 650.0, 700.0, 61.0, ("power cap", "hardware thermal slowdown")
            )
        assert nvml.shut_down.wait(LIMIT_S)

    def test_typical_is_of_the_middle_and_keeps_every_limit(self):
        states = [
            GpuState(1980.0, 300.0, 700.0, 50.0, ()),
            GpuState(1400.0, 690.0, 600.0, 71.0, ("power brake", "power cap")),
            GpuState(1500.0, 700.0, 700.0, 70.0, ("power cap",)),
        ]
        assert GpuState.typical(states) == GpuState(
            1500.0, 690.0, 600.0, 71.0, ("power cap", "power brake")
        )

    def test_nothing_is_said_once_the_driver_is_silent(self, nvml, caplog):
        watch = watch_gpu("1234", interval_s=0.001)
        assert watch.wait_first(LIMIT_S)
        nvml.mhz = None
        assert nvml.shut_down.wait(LIMIT_S)
        assert watch.typical(0.0) is None
        assert "state of the GPU cannot be read" in caplog.text
        watch.close()

    def test_a_cpu_has_none(self):
        assert watch_device(torch.device("cpu")) is None

    def test_an_unknown_gpu(self, nvml, caplog):
        assert watch_gpu("5678") is None
        assert "no GPU-5678" in caplog.text
