"""CPU lanes with real threads. Every wait has a limit; nothing depends on how long work takes."""

from __future__ import annotations

import itertools
import os
import select
import threading

import pytest
import torch

from drift_scheduler.lane import LaneTimeout, Phase
from drift_scheduler.lane_cpu import SOLO_DECODE_MIN_CORES_FOR_ALL, CpuLanes
from drift_scheduler.partition import PartitionError

LIMIT_S = 20.0


@pytest.fixture
def lanes():
    """Lanes of the cores this process may use, with a split where there are two."""
    cores = sorted(os.sched_getaffinity(0))
    lanes = CpuLanes(split_count=1 if len(cores) > 1 else 0)
    yield lanes
    lanes.close()


@pytest.fixture
def pair(lanes):
    """The lanes of both phases: (prefill, decode)."""
    partition = lanes.table[len(lanes.table) - 1]
    return lanes.lane(Phase.PREFILL, partition), lanes.lane(Phase.DECODE, partition)


def wait(event: threading.Event) -> None:
    assert event.wait(LIMIT_S), "the event never came"


def test_work_of_one_lane_runs_in_the_order_of_launch(pair):
    lane, _ = pair
    seen = []
    tickets = [lane.launch(lambda i=i: seen.append(i)) for i in range(50)]
    tickets[-1].wait(LIMIT_S)
    assert seen == list(range(50))
    assert all(ticket.done() for ticket in tickets)
    spans = [ticket.span() for ticket in tickets]
    for earlier, later in itertools.pairwise(spans):
        assert earlier.start_s <= earlier.end_s <= later.start_s


def test_two_lanes_run_side_by_side(pair):
    """Each waits for the other to have begun: in turns this would never end."""
    meeting = threading.Barrier(2, timeout=LIMIT_S)
    tickets = [lane.launch(meeting.wait) for lane in pair]
    for ticket in tickets:
        ticket.wait(LIMIT_S)


def test_launch_and_poll_do_not_block(pair):
    prefill, decode = pair
    gate = threading.Event()
    blocked = prefill.launch(lambda: wait(gate))
    behind = decode.launch(lambda: None, after=[blocked])
    assert not blocked.done()
    assert not behind.done()
    gate.set()
    behind.wait(LIMIT_S)
    assert blocked.done()


def test_after_puts_work_behind_another_lane(pair):
    prefill, decode = pair
    gate = threading.Event()
    order = []

    def slow() -> None:
        wait(gate)
        order.append("prefill")

    first = prefill.launch(slow)
    second = decode.launch(lambda: order.append("decode"), after=[first])
    third = decode.launch(lambda: order.append("decode again"))
    gate.set()
    third.wait(LIMIT_S)
    assert order == ["prefill", "decode", "decode again"]
    # Time spent waiting for the other lane is not time at work.
    assert second.span().start_s >= first.span().end_s


def test_an_error_surfaces_when_polled_and_when_waited_for_and_the_lane_lives_on(pair):
    lane, other = pair

    def fail() -> None:
        raise ZeroDivisionError("layer 3")

    failed = lane.launch(fail)
    with pytest.raises(ZeroDivisionError, match="layer 3"):
        failed.wait(LIMIT_S)
    with pytest.raises(ZeroDivisionError, match="layer 3"):
        failed.done()
    ran = []
    dependent = other.launch(lambda: ran.append(1), after=[failed])
    with pytest.raises(ZeroDivisionError):
        dependent.wait(LIMIT_S)
    assert not ran
    lane.launch(lambda: ran.append(2)).wait(LIMIT_S)
    assert ran == [2]


def test_waiting_has_a_limit(pair):
    gate = threading.Event()
    ticket = pair[0].launch(lambda: wait(gate))
    with pytest.raises(LaneTimeout):
        ticket.wait(0.01)
    gate.set()
    ticket.wait(LIMIT_S)


def test_lanes_run_on_their_cores_with_their_threads_in_inference_mode(lanes):
    def look():
        seen.append(
            (os.sched_getaffinity(0), torch.get_num_threads(), torch.is_inference_mode_enabled())
        )

    for index in range(len(lanes.table)):
        for phase in Phase:
            lane = lanes.lane(phase, lanes.table[index])
            seen = []
            lane.launch(look).wait(LIMIT_S)
            cores, threads, inference = seen[0]
            assert cores == set(lane.cores)
            assert inference
            solo_decode = phase is Phase.DECODE and lane.partition.exclusive
            few_cores = len(cores) < SOLO_DECODE_MIN_CORES_FOR_ALL
            assert threads == (1 if solo_decode and few_cores else len(cores))
            assert lane.sms == len(lane.cores)


def test_the_calling_thread_keeps_its_own_cores_and_threads():
    before = os.sched_getaffinity(0), torch.get_num_threads()
    CpuLanes().close()
    assert (os.sched_getaffinity(0), torch.get_num_threads()) == before


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores to split")
def test_the_lanes_of_a_split_share_no_core(lanes):
    everything = os.sched_getaffinity(0)
    for split in lanes.table.splits:
        prefill = set(lanes.lane(Phase.PREFILL, split).cores)
        decode = set(lanes.lane(Phase.DECODE, split).cores)
        assert len(prefill) == split.prefill_sms
        assert len(decode) == split.decode_sms
        assert not prefill & decode
        assert prefill | decode == everything


def test_completion_wakes_whoever_polls_the_descriptor(lanes, pair):
    fd = lanes.completion_fd()

    def readable(timeout_s: float) -> bool:
        return bool(select.select([fd], [], [], timeout_s)[0])

    assert not readable(0)
    gate = threading.Event()
    ticket = pair[0].launch(lambda: wait(gate))
    assert not readable(0)
    gate.set()
    assert readable(LIMIT_S)
    assert ticket.done()  # the ticket is finished before anybody is woken
    os.eventfd_read(fd)
    assert not readable(0)
    with pytest.raises(ZeroDivisionError):
        pair[1].launch(lambda: 1 // 0).wait(LIMIT_S)
    assert readable(LIMIT_S)


def test_closing_waits_for_launched_work_and_ends_the_threads():
    lanes = CpuLanes()
    seen = []
    lane = lanes.lane(Phase.PREFILL, lanes.table.whole)
    tickets = [lane.launch(lambda i=i: seen.append(i)) for i in range(20)]
    names = {f"lane-{phase}-whole" for phase in Phase}
    assert names <= {thread.name for thread in threading.enumerate()}
    lanes.close()
    assert seen == list(range(20))
    assert all(ticket.done() for ticket in tickets)


@pytest.mark.parametrize("share", [0, -1, 2, 5])
def test_a_share_that_does_not_fit_the_cores_is_refused(share):
    with pytest.raises(PartitionError, match=f"{share} decode cores do not fit 2 cores"):
        CpuLanes(1, [share], cores=[0, 1])


def test_one_core_cannot_be_split():
    with pytest.raises(PartitionError, match="at least 2 cores"):
        CpuLanes(1, cores=[0])


def test_falling_shares_are_refused():
    with pytest.raises(PartitionError, match="not strictly increasing"):
        CpuLanes(2, [2, 1], cores=[0, 1, 2])
