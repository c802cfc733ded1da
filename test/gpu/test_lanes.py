"""CUDA lanes on real SMs: what the partition says is what the kernels get."""

from __future__ import annotations

import pytest
import torch

from drift_scheduler.lane import Phase
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
