from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator

import pytest

from sglang.srt.entrypoints.process_group import undisturbed


class InterruptedStart(BaseException):
    pass


@pytest.fixture
def interrupted() -> Iterator[None]:
    """SIGTERM raises InterruptedStart, as while a server starts."""

    def interrupt(number: int, frame: object) -> None:
        raise InterruptedStart

    previous = signal.signal(signal.SIGTERM, interrupt)
    yield
    signal.signal(signal.SIGTERM, previous)


@pytest.fixture
def signal_another_thread() -> Iterator[Callable[[], None]]:
    """The kernel gives SIGTERM to a thread that was there before and does not block it."""
    go = threading.Event()

    def take() -> None:
        assert go.wait(10)
        signal.pthread_kill(threading.get_ident(), signal.SIGTERM)

    thread = threading.Thread(target=take)
    thread.start()

    def send() -> None:
        go.set()
        thread.join()

    yield send
    go.set()
    thread.join()


def steps_taken_though_it_comes(send: Callable[[], None]) -> list[str]:
    steps = []

    def start() -> None:
        with undisturbed():
            send()
            steps.append("after it came")
        steps.append("behind the end")

    with pytest.raises(InterruptedStart):
        start()
    return steps


@pytest.mark.usefixtures("interrupted")
def test_a_signal_waits_for_the_end(signal_another_thread: Callable[[], None]) -> None:
    assert steps_taken_though_it_comes(signal_another_thread) == ["after it came"]


@pytest.mark.usefixtures("interrupted")
def test_one_sent_to_the_thread_itself_waits_too() -> None:
    def send() -> None:
        signal.raise_signal(signal.SIGTERM)

    assert steps_taken_though_it_comes(send) == ["after it came"]


@pytest.mark.usefixtures("interrupted")
def test_afterwards_a_signal_does_what_it_did() -> None:
    handler = signal.getsignal(signal.SIGTERM)
    with undisturbed():
        assert signal.SIGTERM in signal.pthread_sigmask(signal.SIG_BLOCK, ())
    assert signal.getsignal(signal.SIGTERM) is handler
    assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, ())
    with pytest.raises(InterruptedStart):
        signal.raise_signal(signal.SIGTERM)
