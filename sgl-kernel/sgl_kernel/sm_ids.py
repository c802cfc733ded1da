# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc"
"""Observes where and when programs run: proof that two lanes are on disjoint SMs at one time.

Needs a CUDA GPU; Triton's interpreter has neither SMs nor a clock.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.language.extra import cuda


@dataclass(frozen=True, slots=True)
class SmTrace:
    """What each program of one launch saw; the tensors are on the GPU.

    sm_ids [programs] i32. start_ns, stop_ns [programs] i64: the GPU's global timer, one for all
    SMs and all streams.
    """

    sm_ids: torch.Tensor
    start_ns: torch.Tensor
    stop_ns: torch.Tensor

    @classmethod
    def allocate(cls, num_programs: int, device: torch.device | str) -> SmTrace:
        return cls(
            sm_ids=torch.empty(num_programs, dtype=torch.int32, device=device),
            start_ns=torch.empty(num_programs, dtype=torch.int64, device=device),
            stop_ns=torch.empty(num_programs, dtype=torch.int64, device=device),
        )


@triton.jit(do_not_specialize=["spin_ns"])
def _record_kernel(sm_ids, start_ns, stop_ns, spin_ns):
    program = tl.program_id(0)
    start = cuda.globaltimer()
    now = start
    while now - start < spin_ns:
        now = cuda.globaltimer()
    tl.store(sm_ids + program, cuda.smid())
    tl.store(start_ns + program, start)
    tl.store(stop_ns + program, now)


def record_sm_ids(trace: SmTrace, spin_ns: int) -> None:
    """Enqueues len(trace.sm_ids) one-warp programs on the current stream and returns at once.

    Each spins for spin_ns and then writes its line of the trace. With a few times as many programs
    as SMs and a spin well above the launch time, every SM of the lane gets some.
    """
    _record_kernel[(trace.sm_ids.shape[0],)](
        trace.sm_ids, trace.start_ns, trace.stop_ns, spin_ns, num_warps=1
    )


def sm_ids_used(trace: SmTrace) -> frozenset[int]:
    """The SMs of a finished launch. Copies to the host: waits for the current stream only, which
    the caller has ordered after the launch."""
    return frozenset(trace.sm_ids.tolist())
