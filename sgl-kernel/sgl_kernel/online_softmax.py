# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc"
"""The step that prefill and decode attention share: fold one block of keys into a running softmax.

Exponents are in base 2, so that the hardware's exp2 serves: scale_log2 = scale * log2(e).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def fold_block(acc, norm, peak, scores, v, scale_log2):
    """Adds softmax(scores) @ v to the running state.

    acc [M, D] f32, norm [M] f32: sums so far, relative to 2^peak. peak [M] f32: largest scaled
    score so far, -inf before the first block. scores [M, N] f32: unscaled, -inf where masked; each
    row must have met an unmasked score by the end of its first block. v [N, D].

    A block that is masked throughout for a row leaves that row's state bit for bit as it was, so
    where a query block ends does not change the result of a token in it.
    """
    new_peak = tl.maximum(peak, tl.max(scores, axis=1) * scale_log2)
    shrink = tl.exp2(peak - new_peak)
    weights = tl.exp2(scores * scale_log2 - new_peak[:, None])
    norm = norm * shrink + tl.sum(weights, axis=1)
    acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    return acc, norm, new_peak
