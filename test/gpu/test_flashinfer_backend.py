"""FlashInfer's prefill over our pool, against plain torch in float64."""

from __future__ import annotations

import shutil
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("flashinfer", reason="needs flashinfer-python")
if shutil.which("nvcc") is None:
    pytest.skip("FlashInfer compiles its kernels with nvcc", allow_module_level=True)

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
CONTEXT = 4096
SLOTS = 12000


def reference(q, keys, values, slots, new_tokens):
    """q [new, heads, dim] over keys and values of slots [seq], causal at the end; float64."""
    k = keys[slots].double().repeat_interleave(HEADS // KV_HEADS, 1)
    v = values[slots].double().repeat_interleave(HEADS // KV_HEADS, 1)
    scores = torch.einsum("qhd,khd->hqk", q.double(), k) * HEAD_DIM**-0.5
    seq = len(slots)
    hidden = torch.ones(new_tokens, seq, device=q.device).triu(seq - new_tokens + 1).bool()
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, v)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("dtype", [torch.bfloat16])
@pytest.mark.parametrize(
    "lengths", [[(5, 5)], [(300, 300), (1, 77), (64, 1500)], [(1, 9), (1, 2000)], [(700, 3999)]]
)
def test_new_tokens_over_cached_ones(device, dtype, lengths):
    from sglang.srt.layers.attention.flashinfer_backend import (
        WORKSPACE_BYTES,
        FlashInferAttention,
    )
    from sglang.srt.mem_cache.kv_pool import DeviceKVPool
    from sglang.srt.model_executor.forward_batch import ForwardBatch

    generator = torch.Generator(device).manual_seed(1)

    def random(*shape):
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    pool = DeviceKVPool(SLOTS, 1, KV_HEADS, HEAD_DIM, dtype, device)
    pool.keys.copy_(random(*pool.keys.shape))
    pool.values.copy_(random(*pool.values.shape))
    order = torch.randperm(SLOTS - 1, generator=generator, device=device) + 1
    slot_table = torch.zeros(len(lengths) + 1, CONTEXT, dtype=torch.int32, device=device)
    taken, new_slots = 0, []
    for row, (new, seq) in enumerate(lengths, start=1):
        slots = order[taken : taken + seq]
        taken += seq
        slot_table[row, :seq] = slots
        new_slots.append(slots[seq - new :])
    new_lens, seq_lens = ([pair[i] for pair in lengths] for i in (0, 1))
    starts = torch.tensor([0, *new_lens]).cumsum(0)
    batch = ForwardBatch(
        decode_reqs=0,
        token_slots=torch.cat(new_slots).long(),
        positions=torch.zeros(sum(new_lens), dtype=torch.int64, device=device),
        rows=torch.arange(1, len(lengths) + 1, device=device),
        seq_lens=torch.tensor(seq_lens, dtype=torch.int32, device=device),
        new_lens=torch.tensor(new_lens, dtype=torch.int32, device=device),
        new_starts=starts.to(device, torch.int32),
        slot_table=slot_table,
        new_lens_host=new_lens,
        seq_lens_host=seq_lens,
    )
    config = SimpleNamespace(
        architecture="Test", dtype=dtype, num_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=HEAD_DIM
    )
    workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
    attention = FlashInferAttention(pool, config, 132, workspace)
    fused = random(sum(new_lens), HEADS + 2 * KV_HEADS, HEAD_DIM)  # views of it are strided
    q, k, v = fused.split((HEADS, KV_HEADS, KV_HEADS), dim=1)
    attention.plan(batch)
    out = attention.attend(0, q, k, v, batch)

    keys, values = pool.layer(0)
    for i, (new, seq) in enumerate(lengths):
        rows = slice(int(starts[i]), int(starts[i + 1]))
        slots = slot_table[i + 1, :seq].long()
        expected = reference(q[rows], keys, values, slots, new)
        error = (out[rows].double() - expected).norm() / expected.norm()
        assert error < 1e-2, f"request {i}: {error:.1e}"
