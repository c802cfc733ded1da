"""TorchNativeAttention against a float64 softmax written out."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from sglang.srt.layers.attention.torch_native import TorchNativeAttention
from sglang.srt.mem_cache.kv_pool import DeviceKVPool
from sglang.srt.model_executor.forward_batch import ForwardBatch


def attention_ref(q, keys, values):
    """q [new, q_heads, d] are the last of the sequence; keys, values [seq, kv_heads, d]; f64."""
    q, keys, values = q.double(), keys.double(), values.double()
    group = q.shape[1] // keys.shape[1]
    keys, values = keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1)
    scores = torch.einsum("qhd,khd->hqk", q, keys) * q.shape[-1] ** -0.5
    seq, new = keys.shape[0], q.shape[0]
    visible = torch.arange(seq) <= torch.arange(seq - new, seq)[:, None]
    weights = scores.masked_fill(~visible, float("-inf")).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, values)


class Case:
    """Requests of (cached, new) tokens in random slots of a pool that is NaN everywhere else."""

    def __init__(self, lens, *, q_heads=6, kv_heads=2, head_dim=16, dtype=torch.float32, seed=0):
        generator = torch.Generator().manual_seed(seed)

        def randn(*shape):
            return torch.randn(*shape, generator=generator).to(dtype)

        self.lens = lens
        new, total = [n for _, n in lens], [c + n for c, n in lens]
        num_slots = sum(total) + 40
        self.pool = DeviceKVPool(num_slots, 2, kv_heads, head_dim, dtype, "cpu")
        self.pool.keys.fill_(float("nan"))
        self.pool.values.fill_(float("nan"))
        free = torch.randperm(num_slots - 1, generator=generator) + 1
        # Request i sits in row 2i + 1; everything else points to slot 0, which is poisoned too.
        slot_table = torch.zeros((2 * len(lens) + 2, max(total) + 5), dtype=torch.int32)
        self.keys, self.values, token_slots, positions = [], [], [], []
        for index, (cached, count) in enumerate(lens):
            slots, free = free[: cached + count], free[cached + count :]
            slot_table[2 * index + 1, : cached + count] = slots
            keys, values = (
                randn(2, cached + count, kv_heads, head_dim),
                randn(2, cached + count, kv_heads, head_dim),
            )
            self.pool.keys[:, slots[:cached]] = keys[:, :cached]
            self.pool.values[:, slots[:cached]] = values[:, :cached]
            self.keys.append(keys)
            self.values.append(values)
            token_slots.append(slots[cached:])
            positions.append(torch.arange(cached, cached + count))
        self.q = randn(2, sum(new), q_heads, head_dim)
        self.batch = ForwardBatch(
            decode_reqs=len(new) if all(count == 1 for count in new) else 0,
            token_slots=torch.cat(token_slots),
            positions=torch.cat(positions),
            rows=torch.arange(len(lens)) * 2 + 1,
            seq_lens=torch.tensor(total, dtype=torch.int32),
            new_lens=torch.tensor(new, dtype=torch.int32),
            new_starts=torch.tensor([0, *new]).cumsum(0).to(torch.int32),
            slot_table=slot_table,
            new_lens_host=new,
            seq_lens_host=total,
        )
        config = SimpleNamespace(num_kv_heads=kv_heads)
        self.attention = TorchNativeAttention(self.pool, config)

    def new_kv(self, layer):
        new = [
            (keys[layer, cached:], values[layer, cached:])
            for (cached, _), keys, values in zip(self.lens, self.keys, self.values, strict=True)
        ]
        return torch.cat([k for k, _ in new]), torch.cat([v for _, v in new])

    def run(self, layer):
        k, v = self.new_kv(layer)
        self.pool.keys[layer, self.batch.token_slots] = k
        self.pool.values[layer, self.batch.token_slots] = v
        return self.attention.attend(layer, self.q[layer], k, v, self.batch)

    def expected(self, layer):
        parts = self.q[layer].split([n for _, n in self.lens])
        return torch.cat(
            [
                attention_ref(q, keys[layer], values[layer])
                for q, keys, values in zip(parts, self.keys, self.values, strict=True)
            ]
        )


@pytest.mark.parametrize(
    "lens",
    [
        [(0, 1)],
        [(0, 7)],
        [(13, 1)],
        [(12, 5)],
        [(0, 3), (31, 1), (5, 29), (0, 1), (1, 2)],
        [(4, 1), (77, 1), (0, 1)],
        [(0, 255), (0, 256), (0, 257)],
        [(300, 259), (9, 513), (0, 700)],
    ],
)
@pytest.mark.parametrize(("q_heads", "kv_heads", "head_dim"), [(6, 2, 16), (5, 5, 10), (7, 1, 12)])
@torch.inference_mode()
def test_matches_the_float64_reference(lens, q_heads, kv_heads, head_dim):
    case = Case(lens, q_heads=q_heads, kv_heads=kv_heads, head_dim=head_dim)
    case.attention.plan(case.batch)
    for layer in (1, 0):
        out = case.run(layer)
        assert out.shape == case.q[layer].shape
        assert out.dtype == torch.float32
        torch.testing.assert_close(out.double(), case.expected(layer), rtol=1e-5, atol=2e-6)


@torch.inference_mode()
def test_a_request_does_not_depend_on_its_neighbours():
    together = Case([(5, 300), (40, 1), (0, 9)])
    together.attention.plan(together.batch)
    out = together.run(0).split([300, 1, 9])
    for index, lens in enumerate(together.lens):
        alone = Case([lens])
        cached = lens[0]
        slots = alone.batch.slot_table[1, : sum(lens)].long()
        alone.pool.keys[0, slots] = together.keys[index][0]
        alone.pool.values[0, slots] = together.values[index][0]
        alone.attention.plan(alone.batch)
        start = sum(n for _, n in together.lens[:index])
        got = alone.attention.attend(
            0,
            together.q[0, start : start + lens[1]],
            together.keys[index][0, cached:],
            together.values[index][0, cached:],
            alone.batch,
        )
        assert torch.equal(got, out[index])


@torch.inference_mode()
def test_bfloat16():
    case = Case([(33, 20), (64, 1)], dtype=torch.bfloat16)
    case.attention.plan(case.batch)
    out = case.run(0)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), case.expected(0), rtol=2e-2, atol=2e-2)


def test_attend_without_a_plan_is_a_bug():
    case = Case([(0, 2)])
    with pytest.raises(AssertionError, match="plan"):
        case.run(0)


def test_kv_pool_layers_are_views_of_it():
    pool = DeviceKVPool(11, 3, 2, 10, torch.bfloat16, "cpu")
    assert pool.keys.nbytes + pool.values.nbytes == 11 * (2 * 3 * 2 * 10 * 2)
    keys, values = pool.layer(2)
    keys[4], values[4] = 1.0, 2.0
    assert pool.keys[2, 4].unique().tolist() == [1.0]
    assert pool.values[2, 4].unique().tolist() == [2.0]
    assert pool.keys.sum() == 20
