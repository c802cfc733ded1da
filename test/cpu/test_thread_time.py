from __future__ import annotations

import time

from sglang.srt.observability import thread_time


def test_a_thread_that_works_has_used_its_time():
    before = thread_time.thread_times()
    until_s = time.thread_time() + 0.02
    while time.thread_time() < until_s:
        pass
    after = thread_time.thread_times()
    assert after["cpu_s"] - before["cpu_s"] >= 0.02
    if before["waited_s"] is not None:
        assert after["waited_s"] >= before["waited_s"]


def test_what_the_kernel_says(tmp_path, monkeypatch):
    file = tmp_path / "schedstat"
    monkeypatch.setattr(thread_time, "_SCHEDSTAT", file)
    assert thread_time.thread_times()["waited_s"] is None
    file.write_text("5000000000 1500000000 42\n")
    assert thread_time.thread_times()["waited_s"] == 1.5
    file.write_text("0 0 0\n")
    assert thread_time.thread_times()["waited_s"] is None
    file.write_text("strange\n")
    assert thread_time.thread_times()["waited_s"] is None
