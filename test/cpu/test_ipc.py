from __future__ import annotations

import pytest
import zmq

from sglang.srt.ipc import Receiver, Sender
from sglang.srt.messages import GetState, Shutdown, ToScheduler

LIMIT_MS = 30_000


@pytest.fixture
def ends(tmp_path):
    """A sender and the receiver of its messages."""
    address = f"ipc://{tmp_path}/socket"
    with zmq.Context() as context:
        receiver = Receiver(context, address, ToScheduler)
        sender = Sender(context, address)
        yield sender, receiver
        sender.close()
        receiver.close()


def test_a_look_tells_of_messages_until_they_are_taken(ends):
    sender, receiver = ends
    assert not receiver.has_messages()
    sender.send(GetState(call_id=1))
    sender.send(Shutdown())
    taken = []
    while len(taken) < 2:
        receiver.wait(LIMIT_MS)
        assert receiver.has_messages()
        taken += receiver.drain()
    assert taken == [GetState(call_id=1), Shutdown()]
    assert not receiver.has_messages()
