"""The watchdog, and the log lines that people's scripts look for."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading

import pytest

from sglang.srt.observability.scheduler_log import Load, SchedulerLog
from sglang.srt.observability.watchdog import Watchdog

LIMIT_S = 20.0


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock():
    return Clock()


def test_it_fires_once_the_limit_has_passed_and_says_how_long_it_was_silent(clock):
    fired = []
    watchdog = Watchdog(10.0, fired.append, clock)
    clock.now_s += 9.5
    assert not watchdog.check()
    clock.now_s += 3.0
    assert watchdog.check()
    assert fired == [12.5]


def test_a_beat_starts_the_wait_again(clock):
    fired = []
    watchdog = Watchdog(10.0, fired.append, clock)
    for _ in range(100):
        clock.now_s += 9.0
        watchdog.beat()
        assert not watchdog.check()
    clock.now_s += 10.0
    assert watchdog.check()
    assert fired == [10.0]


def test_time_before_the_start_does_not_count(clock):
    watchdog = Watchdog(10.0, lambda silent_s: None, clock)
    clock.now_s += 1000.0
    watchdog.start()
    assert not watchdog.check()
    watchdog.stop()


def test_its_thread_fires_once_while_the_engine_thread_is_blocked():
    fired = threading.Event()
    calls = []

    def on_timeout(silent_s: float) -> None:
        calls.append(silent_s)
        fired.set()

    watchdog = Watchdog(0.05, on_timeout)
    watchdog.start()
    assert fired.wait(LIMIT_S)
    watchdog.stop()
    assert len(calls) == 1
    assert calls[0] >= 0.05


def test_stop_ends_the_thread(clock):
    watchdog = Watchdog(1000.0, clock=clock)
    watchdog.start()
    assert "watchdog" in {thread.name for thread in threading.enumerate()}
    watchdog.stop()
    assert "watchdog" not in {thread.name for thread in threading.enumerate()}


def test_by_default_it_prints_all_stacks_and_leaves_with_1():
    program = (
        "import threading\n"
        "from sglang.srt.observability.watchdog import Watchdog\n"
        "def stuck_in_a_kernel():\n"
        "    threading.Event().wait(60)\n"
        "Watchdog(0.05).start()\n"
        "stuck_in_a_kernel()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=60,
        env={"PYTHONPATH": ":".join(sys.path)},
        check=False,
    )
    assert done.returncode == 1
    assert "stuck_in_a_kernel" in done.stderr
    assert "--watchdog-timeout" in done.stderr


LOAD = Load(token_usage=0.257, used_tokens=1234, running=3, queued=7)


def test_the_prefill_line(clock, caplog):
    caplog.set_level(logging.INFO)
    SchedulerLog(40, clock).prefill(seqs=2, new_tokens=100, cached_tokens=50, load=LOAD)
    assert caplog.messages == [
        "Prefill batch, #new-seq: 2, #new-token: 100, #cached-token: 50, token usage: 0.26, "
        "#running-req: 3, #queue-req: 7"
    ]


def test_the_decode_line_comes_every_interval_with_its_throughput(clock, caplog):
    caplog.set_level(logging.INFO)
    log = SchedulerLog(4, clock)
    asked = []

    def load() -> Load:
        asked.append(clock.now_s)
        return LOAD

    for _ in range(11):
        clock.now_s += 0.5
        log.decode(requests=6, load=load)
    line = (
        "Decode batch, #running-req: 3, #token: 1234, token usage: 0.26, "
        "gen throughput (token/s): 12.00, #queue-req: 7"
    )
    assert caplog.messages == [line, line]
    assert len(asked) == 2
    assert log.gen_throughput == pytest.approx(12.0)


def test_tokens_are_counted_as_they_come(clock):
    log = SchedulerLog(40, clock)
    log.prefill(seqs=2, new_tokens=100, cached_tokens=50, load=LOAD)
    for _ in range(3):
        log.decode(requests=6, load=lambda: LOAD)
    assert log.realtime_tokens == {"prefill_compute": 100, "prefill_cache": 50, "decode": 18}


def test_the_decode_line_tells_of_service_levels_once_one_is_asked_for(clock, caplog):
    caplog.set_level(logging.INFO)
    log = SchedulerLog(1, clock)
    nothing_ended = {"finished": 0, "met": 0, "attainment": None, "goodput_rps": 0.0}
    some_ended = {"finished": 8, "met": 7, "attainment": 0.875, "goodput_rps": 0.5}
    for window in (None, nothing_ended, some_ended):
        log.decode(requests=6, load=lambda: LOAD, slo=lambda window=window: window)
    silent, idle, telling = caplog.messages
    assert silent.endswith("#queue-req: 7")
    assert idle.endswith("#queue-req: 7")
    assert telling.endswith("#queue-req: 7, SLO attainment: 0.875, goodput (req/s): 0.50")
