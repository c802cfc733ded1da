from __future__ import annotations

import threading

import pytest

from drift_scheduler.lane import LaneTimeout
from drift_scheduler.work_thread import WorkThread

LIMIT_S = 30.0


def test_pieces_run_behind_the_preparation_in_order_on_a_thread_of_that_name():
    seen = []

    def see(what):
        seen.append((what, threading.current_thread().name))

    thread = WorkThread("worker", lambda: see("prepared"))
    for index in range(20):
        thread.put(lambda index=index: see(index))
    thread.close(LIMIT_S)
    assert seen == [(what, "worker") for what in ("prepared", *range(20))]
    assert "worker" not in {running.name for running in threading.enumerate()}


def test_closing_has_a_limit_and_may_be_tried_again():
    gate = threading.Event()
    thread = WorkThread("worker")
    thread.put(lambda: assert_opened(gate))
    with pytest.raises(LaneTimeout, match="worker is still at work"):
        thread.close(0.01)
    gate.set()
    thread.close(LIMIT_S)


def test_a_piece_that_is_done_is_let_go_of():
    class Held:
        def __del__(self):
            gone.set()

    gone = threading.Event()
    thread = WorkThread("worker")
    held = Held()
    thread.put(lambda held=held: None)
    del held
    assert gone.wait(LIMIT_S)
    thread.close(LIMIT_S)


def assert_opened(gate):
    assert gate.wait(LIMIT_S)
