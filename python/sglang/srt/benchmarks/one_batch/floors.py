"""The least time a batch can take on a machine whose memory and arithmetic rates are known.

    bytes    every weight read once, and the keys and values of every sequence read or written once
    flops    two an element of every matrix and token, and the attention between tokens
    floor    the larger of bytes / bandwidth and of matrix and attention flops at their rates

A floor has no element-wise work, no launches and no waves that end badly: what a measured time
has above it is what better kernels could still take away.
"""

from __future__ import annotations

from dataclasses import dataclass

from sglang.srt.benchmarks.one_batch.cases import DecodeCase, PrefillCase
from sglang.srt.model_config import ModelConfig

# Attention alternates two matrix products with a softmax and does not reach the matrix rate. The
# best prefill kernels known to us do about 500 TFLOP/s in bf16 on an H100, whose matmul does 765.
H100_ATTENTION_FLOPS = 500e12
H100_MATRIX_FLOPS = 765e12


@dataclass(frozen=True, slots=True)
class Rates:
    """What a device, or a lane of it, can do in a second. Copied bytes count read and written."""

    copy_bytes: float
    matrix_flops: float
    attention_flops: float


def rates(copy_bytes: float, matrix_flops: float, *, whole_gpu: bool) -> Rates:
    """Adds the attention rate: H100's on a whole GPU, else in proportion to the matrix rate."""
    share = H100_ATTENTION_FLOPS / H100_MATRIX_FLOPS
    attention_flops = H100_ATTENTION_FLOPS if whole_gpu else share * matrix_flops
    return Rates(copy_bytes, matrix_flops, attention_flops)


@dataclass(frozen=True, slots=True)
class BatchWork:
    """What one forward pass of a batch must move and compute."""

    moved_bytes: float
    matrix_flops: float
    attention_flops: float

    def floor_s(self, rates: Rates) -> float:
        arithmetic_s = (
            self.matrix_flops / rates.matrix_flops + self.attention_flops / rates.attention_flops
        )
        return max(self.moved_bytes / rates.copy_bytes, arithmetic_s)


def decode_work(config: ModelConfig, case: DecodeCase) -> BatchWork:
    """A decode step is a prefill of one token behind all others."""
    return prefill_work(config, PrefillCase(1, case.length - 1, case.requests))


def prefill_work(config: ModelConfig, case: PrefillCase) -> BatchWork:
    """Every token goes through the layers, the last one of each request through the LM head."""
    new, cached, requests = case.new_tokens, case.cached_tokens, case.requests
    lm_head = config.vocab_size * config.hidden_size
    pairs = new * cached + new * (new + 1) // 2  # of a new token and one that it may see
    pair_flops = 4 * config.num_layers * config.num_heads * config.head_dim
    return BatchWork(
        moved_bytes=weight_bytes(config) + requests * case.length * config.kv_bytes_per_token,
        matrix_flops=2.0 * requests * (new * layer_parameters(config) + lm_head),
        attention_flops=float(requests * pairs * pair_flops),
    )


def layer_parameters(config: ModelConfig) -> int:
    """Elements of the matrices of all layers, embedding and LM head left out."""
    tables = 1 if config.tie_word_embeddings else 2
    return config.num_parameters - tables * config.vocab_size * config.hidden_size


def weight_bytes(config: ModelConfig) -> int:
    """Bytes of layers and LM head; of the embedding a batch reads a few rows only."""
    lm_head = config.vocab_size * config.hidden_size
    return (layer_parameters(config) + lm_head) * config.dtype.itemsize
