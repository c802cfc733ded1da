"""CUDA lanes on real SMs: what the partition says is what the kernels get."""

from __future__ import annotations

import threading
from functools import partial

import pytest
import torch

from drift_scheduler.lane import LaneTimeout, Phase
from drift_scheduler.partition import PartitionError

pytest.importorskip("cuda.core", reason="needs cuda-core (extra: cuda)")

LIMIT_S = 30.0
SPIN_NS = 3_000_000
PROGRAMS_PER_SM = 32  # several waves of one-warp programs: no SM of the lane is left out


@pytest.fixture(scope="module")
def lanes(device):
    from drift_scheduler.lane_cuda import CudaLanes

    lanes = CudaLanes(device, split_count=6)
    yield lanes
    lanes.close()


def wait(gate):
    assert gate.wait(LIMIT_S)


def trace_for(lane, device):
    """Room for the probe's record. Waits for the device: call it before any probe is launched."""
    from sgl_kernel.sm_ids import SmTrace

    trace = SmTrace.allocate(lane.sms * PROGRAMS_PER_SM, device)
    torch.cuda.synchronize(device)
    return trace


def probe(lane, trace):
    """Launches the probe on the lane and returns its ticket at once."""
    from sgl_kernel.sm_ids import record_sm_ids

    return lane.launch(lambda: record_sm_ids(trace, SPIN_NS))


def test_the_table_covers_the_device_with_rising_decode_shares(lanes):
    table = lanes.table
    assert len(table.splits) >= 4
    for split in table.splits:
        assert split.prefill_sms + split.decode_sms == table.total_sms
    shares = [split.decode_sms for split in table.splits]
    assert shares == sorted(set(shares))


@pytest.mark.parametrize("index", range(1, 7))
def test_lanes_run_at_the_same_time_on_disjoint_sms(lanes, device, index):
    from sgl_kernel.sm_ids import sm_ids_used

    if index >= len(lanes.table):
        pytest.skip(f"this device has {len(lanes.table) - 1} splits")
    split = lanes.table[index]
    pair = [lanes.lane(phase, split) for phase in (Phase.DECODE, Phase.PREFILL)]
    traces = [trace_for(lane, device) for lane in pair]
    for lane, trace in zip(pair, traces, strict=True):  # compiles the probe and loads it
        probe(lane, trace).wait(LIMIT_S)
    # Both are launched before either is waited for; the spin is long against the launches.
    tickets = [probe(lane, trace) for lane, trace in zip(pair, traces, strict=True)]
    for ticket in tickets:
        ticket.wait(LIMIT_S)
    decode, prefill = map(sm_ids_used, traces)
    shared_ns = min(int(trace.stop_ns.max()) for trace in traces) - max(
        int(trace.start_ns.min()) for trace in traces
    )
    print(
        f"\n{split}: decode on {len(decode)} SMs {min(decode)}..{max(decode)}, "
        f"prefill on {len(prefill)} SMs {min(prefill)}..{max(prefill)}, "
        f"both busy {shared_ns / 1e6:.1f} ms"
    )
    assert not decode & prefill
    assert len(decode) == split.decode_sms
    assert len(prefill) == split.prefill_sms
    assert shared_ns > SPIN_NS / 2


def test_the_whole_device_is_used_when_a_phase_is_alone(lanes, device):
    from sgl_kernel.sm_ids import sm_ids_used

    for phase in Phase:
        lane = lanes.lane(phase, lanes.table.whole)
        trace = trace_for(lane, device)
        probe(lane, trace).wait(LIMIT_S)
        assert len(sm_ids_used(trace)) == lanes.table.total_sms


def test_after_orders_lanes_on_the_device_without_blocking_the_host(lanes, device):
    split = lanes.table.splits[0]
    prefill = lanes.lane(Phase.PREFILL, split)
    first = probe(prefill, trace_for(prefill, device))
    second = lanes.lane(Phase.DECODE, split).launch(lambda: None, after=[first])
    assert not second.done(), "the host must come back while the first lane still spins"
    second.wait(LIMIT_S)
    assert first.done()
    assert second.span().end_s >= first.span().end_s - 1e-4


def test_a_slow_launch_of_prefill_holds_up_neither_the_caller_nor_decode(lanes):
    split = lanes.table.splits[0]
    prefill, decode = (lanes.lane(phase, split) for phase in (Phase.PREFILL, Phase.DECODE))
    gate = threading.Event()
    slow = prefill.launch(lambda: wait(gate))
    decode.launch(lambda: None).wait(LIMIT_S)
    assert not slow.done()
    with pytest.raises(LaneTimeout, match="not launched"):
        slow.wait(0.01)
    gate.set()
    slow.wait(LIMIT_S)


def test_decode_behind_a_prefill_waits_until_that_is_launched(lanes):
    split = lanes.table.splits[0]
    gate = threading.Event()
    first = lanes.lane(Phase.PREFILL, split).launch(lambda: wait(gate))
    opener = threading.Timer(0.05, gate.set)
    opener.start()
    second = lanes.lane(Phase.DECODE, split).launch(lambda: None, after=[first])
    second.wait(LIMIT_S)
    assert gate.is_set()
    assert first.done()


def test_an_error_of_a_prefill_is_told_when_polled_and_the_lane_lives_on(lanes):
    def fail():
        raise ZeroDivisionError("layer 3")

    split = lanes.table.splits[0]
    prefill, decode = (lanes.lane(phase, split) for phase in (Phase.PREFILL, Phase.DECODE))
    failed = prefill.launch(fail)
    for ask in (lambda: failed.wait(LIMIT_S), failed.done):
        with pytest.raises(ZeroDivisionError, match="layer 3"):
            ask()
    with pytest.raises(ZeroDivisionError):
        decode.launch(lambda: None, after=[failed])
    with pytest.raises(ZeroDivisionError):
        prefill.launch(lambda: None, after=[failed]).wait(LIMIT_S)
    prefill.launch(lambda: None).wait(LIMIT_S)


def test_work_runs_on_its_lanes_stream_in_inference_mode(lanes):
    for phase in Phase:
        for index in range(len(lanes.table)):
            lane = lanes.lane(phase, lanes.table[index])
            seen = []
            lane.launch(
                lambda seen=seen: seen.append(
                    (torch.cuda.current_stream(), torch.is_inference_mode_enabled())
                )
            ).wait(LIMIT_S)
            assert seen == [(lane.stream, True)]


def test_spans_of_two_lanes_share_one_clock(lanes, device):
    split = lanes.table.splits[-1]
    pair = [lanes.lane(phase, split) for phase in Phase]
    traces = [trace_for(lane, device) for lane in pair]
    tickets = [probe(lane, trace) for lane, trace in zip(pair, traces, strict=True)]
    for ticket in tickets:
        ticket.wait(LIMIT_S)
    spans = [ticket.span() for ticket in tickets]
    assert all(span.duration_s >= SPIN_NS * 1e-9 for span in spans)
    assert max(span.start_s for span in spans) < min(span.end_s for span in spans)


def test_shares_that_do_not_fit_are_refused_by_number(device, lanes):
    from drift_scheduler.lane_cuda import CudaLanes

    with pytest.raises(PartitionError, match="4096 decode SMs do not fit"):
        CudaLanes(device, split_count=1, decode_shares=[4096])


def test_granted_counts_are_reported_not_the_ones_asked_for(device):
    from drift_scheduler.lane_cuda import CudaLanes

    lanes = CudaLanes(device, split_count=2, decode_shares=[17, 33])
    granted = [split.decode_sms for split in lanes.table.splits]
    assert [lanes.granted[17], lanes.granted[33]] == granted
    assert all(share >= asked for share, asked in zip(granted, (17, 33), strict=True))
    lanes.close()


def test_pinned_memory_used_on_a_lane_may_be_freed_after_it_is_closed(device):
    from drift_scheduler.lane_cuda import CudaLanes

    lanes = CudaLanes(device, split_count=2)
    pinned = torch.empty(1 << 20, dtype=torch.uint8, pin_memory=True)
    for phase in Phase:
        for split in lanes.table.splits:
            copy = partial(pinned.to, device, non_blocking=True)
            lanes.lane(phase, split).launch(copy).wait(LIMIT_S)
    lanes.close()
    del lanes, copy, pinned  # torch ends the process where a stream is gone
    torch.cuda.synchronize(device)
