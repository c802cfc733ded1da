"""Forbidden tokens get the logit -inf, so that no way of choosing takes them."""

from __future__ import annotations

import torch

# Tokens at a time: a batch may have many constrained rows of a large vocabulary, and what is
# taken for them comes from memory that nobody reserved.
_PART_TOKENS = 1 << 22


def forbid(logits: torch.Tensor, rows: torch.Tensor, words: torch.Tensor) -> None:
    """Overwrites logits [samples, vocab_size] of tokens whose bit is not set.

    rows [constrained] i64, each once; words [constrained, words] i32: bit i of word w is token
    32 * w + i. A row may have more bits than there are tokens, not fewer.
    """
    vocab_size = logits.shape[1]
    if words.shape[1] * 32 < vocab_size:
        raise ValueError(f"{words.shape[1]} words for {vocab_size} tokens")
    octets = words.view(torch.uint8)
    bits = 1 << torch.arange(8, dtype=torch.uint8, device=logits.device)
    step = max(1, _PART_TOKENS // vocab_size)
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        forbidden = ((octets[part, :, None] & bits) == 0).flatten(1)[:, :vocab_size]
        chosen = logits.index_select(0, rows[part])
        logits.index_copy_(0, rows[part], chosen.masked_fill_(forbidden, -torch.inf))
