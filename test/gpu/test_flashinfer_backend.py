"""FlashInfer's prefill over our pool, and decode rows beside it, against plain torch in float64."""

from __future__ import annotations

import copy
import shutil
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("flashinfer", reason="needs flashinfer-python")
if shutil.which("nvcc") is None:
    pytest.skip("FlashInfer compiles its kernels with nvcc", allow_module_level=True)

from sglang.srt.layers.attention import flashinfer_prefill
from sglang.srt.layers.attention.flashinfer_backend import WORKSPACE_BYTES, FlashInferAttention
from sglang.srt.layers.attention.flashinfer_module import load_fa3
from sglang.srt.mem_cache.kv_pool import DeviceKVPool
from sglang.srt.model_executor.forward_batch import ForwardBatch

pytestmark = pytest.mark.timeout(600)  # the first test compiles

HEADS, KV_HEADS = 32, 8
CONTEXT = 4096
SLOTS = 12000
TOLERANCE = 1e-2
DECODE = [(1, 9), (1, 2000), (1, 1)]

# (new, seq) of each request that prefills.
PREFILLS = {
    "no prefix": [(300, 300), (1, 1), (130, 130), (1000, 1000)],
    "one tile": [(5, 5)],
    "prefix": [(300, 300), (1, 77), (64, 1500), (127, 128)],
    "long": [(700, 3999)],
    "single tokens": [(1, 9), (1, 2000)],
    "many": [(1 + 7 * i % 40, 41 + 17 * i % 70) for i in range(100)],
}


def reference(q, keys, values, slots, new_tokens):
    """q [new, heads, dim] over keys and values of slots [seq], causal at the end; float64."""
    group = q.shape[1] // keys.shape[1]
    k = keys[slots].double().repeat_interleave(group, 1)
    v = values[slots].double().repeat_interleave(group, 1)
    scores = torch.einsum("qhd,khd->hqk", q.double(), k) * q.shape[2] ** -0.5
    seq = len(slots)
    hidden = torch.ones(new_tokens, seq, device=q.device).triu(seq - new_tokens + 1).bool()
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, v)


class Case:
    """A batch over a pool of one layer, its slots scattered, the new tokens stored in it."""

    def __init__(self, device, prefill, decode=(), dtype=torch.bfloat16, head_dim=128, heads=HEADS):
        generator = torch.Generator(device).manual_seed(1)

        def random(*shape):
            return torch.randn(shape, generator=generator, device=device).to(dtype)

        self.lengths = lengths = [*decode, *prefill]
        self.pool = DeviceKVPool(SLOTS, 1, KV_HEADS, head_dim, dtype, device)
        # Slots that belong to nobody hold nan, which must not reach any result.
        self.pool.keys.fill_(torch.nan)
        self.pool.values.fill_(torch.nan)
        keys, values = self.pool.layer(0)
        order = torch.randperm(SLOTS - 1, generator=generator, device=device) + 1
        rows = torch.randperm(len(lengths) + 3, generator=generator, device=device)[: len(lengths)]
        table = torch.zeros(len(lengths) + 3, CONTEXT, dtype=torch.int32, device=device)
        taken, new_slots = 0, []
        for row, (new, seq) in zip(rows.tolist(), lengths, strict=True):
            slots = order[taken : taken + seq]
            taken += seq
            table[row, :seq] = slots
            new_slots.append(slots[seq - new :])
            keys[slots] = random(seq, KV_HEADS, head_dim)
            values[slots] = random(seq, KV_HEADS, head_dim)
        new_lens, seq_lens = ([pair[i] for pair in lengths] for i in (0, 1))
        self.starts = torch.tensor([0, *new_lens]).cumsum(0)
        token_slots = torch.cat(new_slots).long()
        self.batch = ForwardBatch(
            decode_reqs=len(decode),
            token_slots=token_slots,
            positions=torch.zeros(sum(new_lens), dtype=torch.int64, device=device),
            rows=rows,
            seq_lens=torch.tensor(seq_lens, dtype=torch.int32, device=device),
            new_lens=torch.tensor(new_lens, dtype=torch.int32, device=device),
            new_starts=self.starts.to(device, torch.int32),
            slot_table=table,
            new_lens_host=new_lens,
            seq_lens_host=seq_lens,
        )
        self.config = SimpleNamespace(
            architecture="Test",
            dtype=dtype,
            num_heads=heads,
            num_kv_heads=KV_HEADS,
            head_dim=head_dim,
        )
        # Keys and values are views of the fused projection, strided over tokens; queries are not.
        self.q = random(sum(new_lens), heads, head_dim)
        fused = random(sum(new_lens), heads + 2 * KV_HEADS, head_dim)
        self.k, self.v = fused[:, heads : heads + KV_HEADS], fused[:, heads + KV_HEADS :]
        self.k.copy_(keys[token_slots])
        self.v.copy_(values[token_slots])

    def leading(self, count):
        """The same case with its first requests only."""
        part, batch = copy.copy(self), self.batch
        tokens = int(self.starts[count])
        part.lengths = self.lengths[:count]
        part.q, part.k, part.v = self.q[:tokens], self.k[:tokens], self.v[:tokens]
        part.batch = ForwardBatch(
            decode_reqs=min(count, batch.decode_reqs),
            token_slots=batch.token_slots[:tokens],
            positions=batch.positions[:tokens],
            rows=batch.rows[:count],
            seq_lens=batch.seq_lens[:count],
            new_lens=batch.new_lens[:count],
            new_starts=batch.new_starts[: count + 1],
            slot_table=batch.slot_table,
            new_lens_host=batch.new_lens_host[:count],
            seq_lens_host=batch.seq_lens_host[:count],
        )
        return part

    def backend(self, num_sms):
        workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=self.q.device)
        return FlashInferAttention(self.pool, self.config, num_sms, workspace)

    def attend(self, attention):
        return attention.attend(0, self.q, self.k, self.v, self.batch)

    def run(self, num_sms):
        attention = self.backend(num_sms)
        attention.plan(self.batch)
        return self.attend(attention)

    def check(self, out):
        assert out.shape == self.q.shape
        assert out.is_contiguous()
        keys, values = self.pool.layer(0)
        for i, (new, seq) in enumerate(self.lengths):
            tokens = slice(int(self.starts[i]), int(self.starts[i + 1]))
            slots = self.batch.slot_table[self.batch.rows[i], :seq].long()
            expected = reference(self.q[tokens], keys, values, slots, new)
            error = (out[tokens].double() - expected).norm() / expected.norm()
            assert error < TOLERANCE, f"request {i}: {error:.1e}"


@pytest.fixture
def poisoned(monkeypatch):
    """Results start as nan, so that a row that is never written shows."""
    plain = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda x, **more: plain(x, **more).fill_(torch.nan))


@pytest.fixture
def on_hopper(device):
    if torch.cuda.get_device_capability(device) != (9, 0):
        pytest.skip("needs an SM90 GPU")


@pytest.mark.parametrize("name", PREFILLS)
@pytest.mark.parametrize("num_sms", [8, 84, 116, 132])
def test_prefill(device, poisoned, name, num_sms):
    case = Case(device, PREFILLS[name])
    case.check(case.run(num_sms))


@pytest.mark.parametrize("name", ["no prefix", "prefix", "single tokens"])
@pytest.mark.parametrize("num_sms", [8, 132])
def test_decode_rows_ride_with_a_prefill(device, poisoned, name, num_sms):
    case = Case(device, PREFILLS[name], decode=DECODE)
    case.check(case.run(num_sms))


def test_decode_alone(device, poisoned):
    case = Case(device, [], decode=DECODE)
    case.check(case.run(132))


def test_a_decode_row_does_not_depend_on_its_batch(device):
    together = Case(device, PREFILLS["prefix"], decode=DECODE)
    alone = together.leading(len(DECODE))
    assert torch.equal(together.run(100)[: len(DECODE)], alone.run(132))


@pytest.mark.parametrize("name", ["no prefix", "prefix"])
def test_as_many_kv_heads_as_query_heads(device, poisoned, name):
    case = Case(device, PREFILLS[name], heads=KV_HEADS)
    case.check(case.run(116))


@pytest.mark.parametrize("name", ["no prefix", "prefix"])
def test_small_heads(device, poisoned, name):
    """They have tiles of their own size. Compiles once more."""
    case = Case(device, PREFILLS[name], head_dim=64)
    case.check(case.run(116))


def test_the_number_of_sms_does_not_change_the_result(device):
    for name in ("no prefix", "prefix"):
        case = Case(device, PREFILLS[name])
        first, *others = (case.run(num_sms) for num_sms in (132, 116, 7))
        assert all(torch.equal(first, other) for other in others)


def test_a_plan_outlives_the_other_phases_plans(device, poisoned):
    """Prefill in slices of layers, decode steps planned and run between them."""
    prefill = Case(device, PREFILLS["prefix"])
    decode = Case(device, [], decode=DECODE)
    prefill_lane, decode_lane = prefill.backend(84), decode.backend(48)
    prefill_lane.plan(prefill.batch)
    prefill.check(prefill.attend(prefill_lane))
    decode_lane.plan(decode.batch)
    decode.check(decode.attend(decode_lane))
    prefill.check(prefill.attend(prefill_lane))


def test_plans_follow_one_another_without_waiting(device, poisoned):
    """A second plan is made while the first one's copy still waits in the stream."""
    whole = Case(device, PREFILLS["many"])
    half = whole.leading(len(PREFILLS["many"]) // 2)
    attention = whole.backend(116)
    torch.cuda.synchronize()
    torch.cuda._sleep(200_000_000)
    results = []
    for case in (whole, half, whole):
        attention.plan(case.batch)
        results.append((case, case.attend(attention)))
    for case, out in results:
        case.check(out)


def test_the_kernels_are_called_directly(device, on_hopper):
    """Else this file would test the fallback without saying so."""
    assert load_fa3(torch.bfloat16, 128, device) is not None


@pytest.mark.parametrize("backend", ["fa3", "fa2"])
@pytest.mark.parametrize("name", ["no prefix", "prefix", "many"])
def test_the_public_wrapper_does_the_same(device, on_hopper, poisoned, monkeypatch, backend, name):
    case = Case(device, PREFILLS[name], decode=DECODE)
    attention = case.backend(132)
    workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
    wrapper = flashinfer_prefill.WrapperPrefill(case.pool, case.config, workspace, backend)
    monkeypatch.setattr(attention, "_prefill", wrapper)
    attention.plan(case.batch)
    case.check(case.attend(attention))


def test_planning_launches_without_waiting(device, on_hopper):
    """plan() and attend() return while the stream is busy: nothing synchronises."""
    case = Case(device, PREFILLS["prefix"], decode=DECODE)
    attention = case.backend(116)
    attention.plan(case.batch)
    case.attend(attention)  # Triton compiles
    torch.cuda.synchronize()
    torch.cuda._sleep(2_000_000_000)  # about a second
    busy = torch.cuda.Event()
    busy.record()
    attention.plan(case.batch)
    out = case.attend(attention)
    assert not busy.query()
    case.check(out)
