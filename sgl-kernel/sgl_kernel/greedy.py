# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc"
"""The likeliest token of every row of logits, in one pass and one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sgl_kernel.launch import Launcher

_BLOCK = 4096
_NUM_WARPS = 16
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def greedy_tokens_ref(logits: torch.Tensor) -> torch.Tensor:
    """What greedy_tokens does, in plain torch."""
    largest = logits == logits.max(dim=-1, keepdim=True).values
    return largest.to(torch.int8).argmax(dim=-1)


@triton.jit
def _greedy_tokens_kernel(logits, out, row_stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK)
    source = logits + row * row_stride
    best = tl.full([BLOCK], float("-inf"), dtype=tl.float32)
    best_at = tl.full([BLOCK], WIDTH, dtype=tl.int32)
    for start in range(0, WIDTH, BLOCK):
        at = start + col
        value = tl.load(source + at, mask=at < WIDTH, other=float("-inf")).to(tl.float32)
        # A column's first index counts even if all its logits are -inf, but never one past the row.
        better = (value > best) | ((best_at == WIDTH) & (at < WIDTH))
        best = tl.where(better, value, best)
        best_at = tl.where(better, at, best_at)
    peak = tl.max(best, axis=0)
    first = tl.min(tl.where(best == peak, best_at, WIDTH), axis=0)
    # Every comparison with a row of nan alone fails; the index must stay in the vocabulary.
    tl.store(out + row, tl.minimum(first, WIDTH - 1).to(tl.int64))


_greedy_tokens = Launcher(_greedy_tokens_kernel)


def greedy_tokens(logits: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """Index of the largest logit of each row, of equal ones the lowest: [rows] i64, in `out` if
    one is given.

    logits [rows, vocab_size] f32, bf16 or f16, of any row stride. A row of nan yields some index
    of the vocabulary. Raises ValueError if shapes, dtypes or strides do not fit.
    """
    if logits.dim() != 2 or logits.shape[1] == 0 or logits.stride(1) != 1:
        raise ValueError(f"logits must be [rows, vocab_size], got {tuple(logits.shape)}")
    if logits.dtype not in _DTYPES:
        raise ValueError(f"logits must be float32, bfloat16 or float16, got {logits.dtype}")
    rows, width = logits.shape
    if out is None:
        out = torch.empty(rows, dtype=torch.int64, device=logits.device)
    if out.shape != (rows,) or out.dtype != torch.int64 or not out.is_contiguous():
        raise ValueError(f"out must be contiguous i64 [{rows}], got {out.dtype} {tuple(out.shape)}")
    if rows:
        _greedy_tokens(
            (rows, 1, 1),
            (logits, out),
            (),
            (logits.stride(0),),
            (width, _BLOCK),
            num_warps=_NUM_WARPS,
        )
    return out
