"""Times kernels on a lane as its CUDA graphs would run them: without the host between two."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import torch

from drift_scheduler.lane import Lane

LIMIT_S = 120.0
# What the largest of a graph's results may take.
_ROOM_BYTES = 8 << 30

Call = Callable[[], object]


def median_s(lane: Lane, calls: Sequence[Call], replays: int) -> float:
    """Seconds of one of `calls` on the lane: the median over replays of them all, one behind the
    other, in one CUDA graph.

    Each has been run before, so that none compiles or allocates what a graph may not.
    """
    graph = torch.cuda.CUDAGraph()

    def capture() -> None:
        graph.capture_begin()
        try:
            for call in calls:
                call()
        finally:
            graph.capture_end()

    lane.launch(capture).wait(LIMIT_S)
    tickets = [lane.launch(graph.replay) for _ in range(replays + 1)]
    for ticket in tickets:
        ticket.wait(LIMIT_S)
    graph.reset()
    # torch keeps the memory of every graph that ever was until it is told not to.
    if torch.cuda.mem_get_info()[0] < _ROOM_BYTES:
        torch.cuda.empty_cache()
    return statistics.median(t.span().duration_s for t in tickets[1:]) / len(calls)
