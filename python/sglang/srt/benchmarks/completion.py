"""Waiting for lanes from the one thread that launches on them, as the scheduler does."""

from __future__ import annotations

import os
import select
import time

from drift_scheduler.lane import LaneProvider

# For lanes that cannot wake us: short against a decode step, long against a poll.
POLL_S = 50e-6
WAKE_LIMIT_S = 0.2


def rest(lanes: LaneProvider) -> None:
    """Returns when work may have finished on a lane."""
    fd = lanes.completion_fd()
    if fd is None:
        time.sleep(POLL_S)
        return
    readable, _, _ = select.select([fd], [], [], WAKE_LIMIT_S)
    if readable:
        os.eventfd_read(fd)
