# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc"
"""Steps of a running softmax, as prefill attention (queries in rows) and decode attention (queries
in columns) take them.

Exponents are in base 2, so that the hardware's exp2 serves: scale_log2 = scale * log2(e). A state
is acc, the weighted sum of values, norm, the sum of weights, and peak, the largest scaled score so
far: both sums are relative to 2^peak. The empty state is 0, 0, -inf.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def fold_block(acc, norm, peak, scores, v, scale_log2):
    """Adds softmax(scores) @ v to the running state.

    acc [M, D] f32, norm [M] f32, peak [M] f32: the state of each row. scores [M, N] f32: unscaled,
    -inf where masked; each row must have met an unmasked score by the end of its first block.
    v [N, D].

    A block that is masked throughout for a row leaves that row's state bit for bit as it was, so
    where a query block ends does not change the result of a token in it.
    """
    new_peak = tl.maximum(peak, tl.max(scores, axis=1) * scale_log2)
    shrink = tl.exp2(peak - new_peak)
    weights = tl.exp2(scores * scale_log2 - new_peak[:, None])
    norm = norm * shrink + tl.sum(weights, axis=1)
    acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    return acc, norm, new_peak


@triton.jit
def fold_columns(acc, norms, peak, scores, v, scale_log2):
    """Adds v^T @ softmax(scores) to the running state of each column.

    acc [D, M] f32 and peak [C] f32 with C <= M: of M columns the dot takes, the first C hold
    queries and the others stay 0. norms [N, C] f32: the norm, still to be summed over N, so that no
    block waits for a sum across warps. scores [N, C] f32: unscaled, -inf where masked; each column
    has an unmasked score. v [N, D].
    """
    new_peak = tl.maximum(peak, tl.max(scores, axis=0) * scale_log2)
    shrink = tl.exp2(peak - new_peak)
    # Each fused operation is spelled out: a compiler that chose otherwise in another
    # specialisation of the kernel would change the last bit.
    weights = tl.exp2(tl.fma(scores, scale_log2, -new_peak[None, :]))
    norms = tl.fma(norms, shrink[None, :], weights)
    shrunk = first_columns(acc, scores.shape[1]) * shrink[None, :]
    acc = tl.dot(
        tl.trans(v),
        pad_columns(weights.to(v.dtype), acc.shape[1]),
        pad_columns(shrunk, acc.shape[1]),
        input_precision="ieee",
    )
    return acc, norms, new_peak


@triton.jit
def combine(acc, norm, peak, more_acc, more_norm, more_peak):
    """The state of two spans of keys, the earlier span first; norm and peak broadcast to acc.

    The same bits wherever it is compiled: no operation is left to fuse or not. An empty state
    changes nothing, on either side.
    """
    new_peak = tl.maximum(peak, more_peak)
    shrink = tl.exp2(peak - new_peak)
    more_shrink = tl.exp2(more_peak - new_peak)
    acc = tl.fma(acc, shrink, more_acc * more_shrink)
    norm = tl.fma(norm, shrink, more_norm * more_shrink)
    return acc, norm, new_peak


@triton.jit
def first_columns(x, COLUMNS: tl.constexpr):
    """The first COLUMNS of x [N, M], which are all of them or half."""
    if x.shape[1] == COLUMNS:
        first = x
    else:
        # A thread holds columns c and c + M / 2 of a tensor core's result: nothing moves.
        halves = tl.permute(tl.reshape(x, [x.shape[0], 2, COLUMNS]), [0, 2, 1])
        first, _ = tl.split(halves)
    return first


@triton.jit
def pad_columns(x, COLUMNS: tl.constexpr):
    """x [N, C] with zeros behind it up to COLUMNS, which is C or 2 C."""
    if x.shape[1] == COLUMNS:
        padded = x
    else:
        halves = tl.permute(tl.join(x, tl.zeros_like(x)), [0, 2, 1])
        padded = tl.reshape(halves, [x.shape[0], COLUMNS])
    return padded
