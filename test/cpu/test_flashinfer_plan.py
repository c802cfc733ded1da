"""Work lists of FlashInfer's prefill kernels: complete, balanced, and laid out as they expect."""

from __future__ import annotations

import logging
import sys
import time
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sglang.srt.layers.attention import flashinfer_module
from sglang.srt.layers.attention.flashinfer_module import DeviceWork, Fa3Module, load_fa3
from sglang.srt.layers.attention.flashinfer_plan import (
    Heads,
    PrefillShape,
    deal,
    max_items,
    pack,
)

TILE = 128
DEVICE_SMS = 132
LLAMA = Heads(num_heads=32, num_kv_heads=8, kv_bytes=512)

# (new, seq) of each request.
BATCHES = {
    "one token": [(1, 1)],
    "odd": [(5, 5), (129, 1000), (128, 128)],
    "no prefix": [(8192, 8192)],
    "long prefix": [(2048, 34816)],
    "several": [(2048, 4096)] * 4,
    "long and short": [(512, 66000)] + [(1, 9 + i) for i in range(200)],
    "many": [(1 + 37 * i % 300, 700 + 37 * i % 300) for i in range(300)],
    "nothing new": [(0, 10), (3, 3)],
}


def shape_of(lengths):
    new_lens = [new for new, _ in lengths]
    seq_lens = [seq for _, seq in lengths]
    return PrefillShape(new_lens, seq_lens, [1000 * i for i in range(len(lengths))])


def dealt(lengths, num_sms, heads=LLAMA, tile_rows=TILE, **more):
    return deal(
        shape_of(lengths),
        heads,
        tile_rows=tile_rows,
        num_sms=num_sms,
        num_ctas=DEVICE_SMS,
        **more,
    )


def item_costs(work, tile_rows=TILE):
    """Keys that each item attends and a constant, from its own fields."""
    end = np.minimum(work.seq_lens, work.seq_lens - work.new_lens + (work.tiles + 1) * tile_rows)
    return end.astype(np.int64) + 2 * tile_rows


def cta_costs(work):
    sums = np.concatenate([[0], np.cumsum(item_costs(work))])
    return np.diff(sums[work.cta_starts])


@pytest.mark.parametrize("num_sms", [8, 84, 116, 132])
@pytest.mark.parametrize("name", BATCHES)
def test_every_tile_of_every_head_is_done_once(name, num_sms):
    lengths = BATCHES[name]
    work = dealt(lengths, num_sms)
    done = Counter(
        zip(work.requests.tolist(), work.tiles.tolist(), work.heads.tolist(), strict=True)
    )
    expected = {
        (request, tile, head)
        for request, (new, _) in enumerate(lengths)
        for tile in range(-(-new // TILE))
        for head in range(LLAMA.num_heads)
    }
    assert set(done) == expected
    assert set(done.values()) == {1}


@pytest.mark.parametrize("name", BATCHES)
def test_items_carry_their_requests_lengths_and_places(name):
    lengths = BATCHES[name]
    work = dealt(lengths, 100)
    starts = np.cumsum([0, *(new for new, _ in lengths)])
    for field, values in {
        "new_lens": [new for new, _ in lengths],
        "seq_lens": [seq for _, seq in lengths],
        "token_starts": starts[:-1],
        "kv_starts": [1000 * i for i in range(len(lengths))],
    }.items():
        assert getattr(work, field).tolist() == np.asarray(values)[work.requests].tolist(), field


@pytest.mark.parametrize("num_sms", [1, 8, 84, 116, 132])
@pytest.mark.parametrize("name", BATCHES)
def test_only_the_lanes_ctas_have_work(name, num_sms):
    work = dealt(BATCHES[name], num_sms)
    assert work.cta_starts.shape == (DEVICE_SMS + 1,)
    assert work.cta_starts[0] == 0
    assert (np.diff(work.cta_starts) >= 0).all()
    assert (work.cta_starts[num_sms:] == len(work.tiles)).all()


@pytest.mark.parametrize("num_sms", [8, 68, 84, 100, 116, 132])
@pytest.mark.parametrize("name", BATCHES)
def test_ctas_are_balanced(name, num_sms):
    """No longer than heaviest-first dealing guarantees: 4/3 of any lower bound."""
    work = dealt(BATCHES[name], num_sms)
    items = np.sort(item_costs(work))[::-1]
    bound = max(items.sum() / num_sms, items[0])
    if len(items) > num_sms:  # two of the heaviest num_sms + 1 share a CTA
        bound = max(bound, items[num_sms - 1] + items[num_sms])
    assert cta_costs(work).max() <= 4 / 3 * bound


@pytest.mark.parametrize("num_sms", [68, 84, 100, 116, 132])
def test_a_long_prefill_leaves_no_cta_idle(num_sms):
    costs = cta_costs(dealt(BATCHES["no prefix"], num_sms))[:num_sms]
    assert costs.max() <= 1.03 * costs.mean()


def test_a_cta_starts_with_its_heaviest_item_of_a_section():
    work = dealt(BATCHES["long prefix"], 84, section_bytes=1 << 60)
    costs = item_costs(work)
    for cta in range(84):
        mine = costs[work.cta_starts[cta] : work.cta_starts[cta + 1]]
        assert (np.diff(mine) <= 0).all()


def test_heads_whose_keys_fit_the_cache_come_first():
    """8,192 tokens of one kv head are 4 MiB: with room for 8, two kv heads, which 8 heads share."""
    work = dealt(BATCHES["no prefix"], 116, section_bytes=8 << 20)
    sections = work.heads // 8
    for cta in range(116):
        mine = sections[work.cta_starts[cta] : work.cta_starts[cta + 1]]
        assert (np.diff(mine) >= 0).all()


def test_balance_comes_before_the_cache():
    """One heavy request: head by head its tiles would come last onto CTAs that are busy."""
    lengths = [(128, 120_000)] + [(128, 4000)] * 256
    work = dealt(lengths, 116, section_bytes=1)
    costs = cta_costs(work)[:116]
    assert costs.max() <= 1.03 * max(costs.mean(), 120_000 + 2 * TILE)


def test_dealing_is_fast(time_of):
    lengths = [(8192, 8192 + 32768)]
    assert time_of(lambda: dealt(lengths, 116)) < 20e-3  # 1 ms on a machine of its own


@pytest.fixture
def time_of():
    def best(work):
        times = []
        for _ in range(5):
            start = time.perf_counter()
            work()
            times.append(time.perf_counter() - start)
        return min(times)

    return best


@pytest.mark.parametrize("name", BATCHES)
def test_lists_lie_where_the_plan_says(name):
    work = dealt(BATCHES[name], 116)
    packed = pack(work)
    assert packed.ints.dtype == np.int32
    lists = [
        work.tiles,
        work.token_starts,
        work.kv_starts,
        work.new_lens,
        work.seq_lens,
        work.heads,
        work.cta_starts,
        work.requests,
    ]
    *offsets, same_for_all_heads = packed.info
    assert len(offsets) == 8
    assert same_for_all_heads == 0
    assert all(offset % 16 == 0 for offset in offsets)
    raw = packed.ints.tobytes()
    for offset, values in zip(offsets, lists, strict=True):
        read = np.frombuffer(raw, np.int32, len(values), offset)
        assert read.tolist() == values.tolist()
    assert packed.ints[packed.kv_starts].tolist() == work.kv_starts.tolist()
    assert packed.ints[packed.requests].tolist() == work.requests.tolist()


def walk(ints, info, cta, q, k, v, out, group):
    """What one CTA of the kernel does with the packed work lists."""
    offsets = [offset // 4 for offset in info[:8]]
    begin, end = ints[offsets[6] + cta], ints[offsets[6] + cta + 1]
    for item in range(begin, end):
        tile, token_start, kv_start, new_len, seq_len, head = (
            int(ints[offset + item]) for offset in offsets[:6]
        )
        for row in range(tile * TILE, min(new_len, (tile + 1) * TILE)):
            seen = seq_len - new_len + row + 1
            keys = k[kv_start : kv_start + seen, head // group]
            weights = torch.softmax(keys @ q[token_start + row, head] * 4**-0.5, 0)
            out[token_start + row, head] = weights @ v[kv_start : kv_start + seen, head // group]


@pytest.mark.parametrize("num_sms", [1, 5])
def test_the_lists_compute_causal_attention(num_sms):
    lengths = [(130, 130), (1, 60), (20, 33)]
    new_lens, seq_lens = [new for new, _ in lengths], [seq for _, seq in lengths]
    kv_starts = [0, 130, 190]
    heads = Heads(num_heads=4, num_kv_heads=2, kv_bytes=16)
    packed = pack(
        deal(
            PrefillShape(new_lens, seq_lens, kv_starts),
            heads,
            tile_rows=TILE,
            num_sms=num_sms,
            num_ctas=7,
        )
    )
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(sum(new_lens), 4, 4, generator=generator)
    k, v = (torch.randn(sum(seq_lens), 2, 4, generator=generator) for _ in range(2))
    out = torch.full_like(q, torch.nan)
    for cta in range(7):
        walk(packed.ints, packed.info, cta, q, k, v, out, group=2)

    for queries, result, start, seq in zip(
        q.split(new_lens), out.split(new_lens), kv_starts, seq_lens, strict=True
    ):
        mask = torch.ones(len(queries), seq).tril(seq - len(queries)).bool()
        expected = torch.nn.functional.scaled_dot_product_attention(
            queries.transpose(0, 1),
            k[start : start + seq].transpose(0, 1).repeat_interleave(2, 0),
            v[start : start + seq].transpose(0, 1).repeat_interleave(2, 0),
            attn_mask=mask,
        ).transpose(0, 1)
        torch.testing.assert_close(result, expected, atol=1e-5, rtol=1e-4)


# The parameters of FlashInfer 0.6.14's functions.
COMMON = """maybe_lse mask_mode layout window_left enable_pdl maybe_custom_mask maybe_mask_indptr
maybe_alibi_slopes maybe_prefix_len_ptr maybe_token_pos_in_items_ptr maybe_max_item_len_ptr
logits_soft_cap sm_scale scale_q scale_k scale_v rope_scale rope_theta token_pos_in_items_len"""
BUFFERS = "float_workspace_buffer int_workspace_buffer plan_info_vec q"
RAGGED = f"{BUFFERS} k v qo_indptr kv_indptr o {COMMON}"
PAGED = (
    f"{BUFFERS} paged_k_cache paged_v_cache qo_indptr paged_kv_indptr paged_kv_indices"
    f" paged_kv_last_page_len o {COMMON} workspace_size"
)


def function_of(names, calls):
    """A function with these parameters that notes what it is called with."""
    scope = {"calls": calls}
    exec(f"def run({', '.join(names.split())}): calls.append(dict(locals()))", scope)
    return scope["run"]


def test_kernels_get_tensors_as_they_are():
    calls = []
    module = Fa3Module(function_of(RAGGED, calls), function_of(PAGED, calls), head_dim=64)
    work = DeviceWork(torch.zeros(8, dtype=torch.int32), [0] * 9)
    fused = torch.zeros(3, 8, 64)
    q, k, v = fused.split((4, 2, 2), dim=1)
    keys, values = torch.zeros(2, 10, 2, 64)
    slots, out = torch.zeros(5, dtype=torch.int32), torch.zeros(3, 4, 64)
    module.ragged(work, q, k, v, out)
    module.paged(work, q, keys, values, slots, out)
    ragged, paged = calls
    for call in calls:
        assert call["int_workspace_buffer"] is work.ints
        assert call["plan_info_vec"] is work.info
        assert call["o"] is out
        assert call["sm_scale"] == 64**-0.5
    assert ragged["k"] is k and ragged["v"] is v
    assert paged["paged_kv_indices"] is slots
    assert paged["paged_k_cache"].shape == (10, 1, 2, 64)
    assert paged["paged_k_cache"].data_ptr() == keys.data_ptr()


@pytest.mark.parametrize("changed", [RAGGED + " new_one", RAGGED.replace(" window_left", "")])
def test_other_parameters_are_refused(changed):
    with pytest.raises(TypeError):
        Fa3Module(function_of(changed, []), function_of(PAGED, []), head_dim=64)


@pytest.fixture
def fake_flashinfer(monkeypatch):
    """Puts a FlashInfer in place whose kernels have these parameters."""

    def install(version, ragged=RAGGED, paged=PAGED):
        functions = SimpleNamespace(
            ragged_run=function_of(ragged, []), paged_run=function_of(paged, [])
        )
        prefill = SimpleNamespace(get_batch_prefill_module=lambda *args: functions)
        monkeypatch.setitem(sys.modules, "flashinfer", SimpleNamespace(__version__=version))
        monkeypatch.setitem(sys.modules, "flashinfer.prefill", prefill)

    load_fa3.cache_clear()
    yield install
    load_fa3.cache_clear()


def load():
    return load_fa3(torch.bfloat16, 128, torch.device("cpu"))


@pytest.mark.parametrize(
    ("version", "ragged", "reason"),
    [("0.7.0", RAGGED, "known are 0.6."), ("0.6.99", RAGGED + " new_one", "new_one")],
)
def test_an_unknown_flashinfer_is_named_in_the_log(
    fake_flashinfer, caplog, version, ragged, reason
):
    fake_flashinfer(version, ragged)
    with caplog.at_level(logging.WARNING):
        assert load() is None
    assert version in caplog.text
    assert "public wrapper" in caplog.text
    assert reason in caplog.text


@pytest.mark.parametrize("error", [float("nan"), 0.5])
def test_kernels_that_compute_something_else_are_refused(
    fake_flashinfer, caplog, monkeypatch, error
):
    fake_flashinfer("0.6.14")
    monkeypatch.setattr(flashinfer_module, "_trial_error", lambda *args: error)
    assert load() is None
    assert "differs from torch" in caplog.text


def test_kernels_that_agree_are_taken(fake_flashinfer, monkeypatch):
    fake_flashinfer("0.6.14")
    monkeypatch.setattr(flashinfer_module, "_trial_error", lambda *args: 1e-3)
    assert isinstance(load(), Fa3Module)


@pytest.mark.parametrize("name", BATCHES)
def test_with_a_capacity_the_layout_is_the_same_for_every_batch(name):
    lengths = BATCHES[name]
    tokens = sum(new for new, _ in lengths)
    capacity = max_items(tokens, len(lengths), LLAMA.num_heads, TILE)
    work = dealt(lengths, 132)
    assert len(work.tiles) <= capacity
    packed = pack(work, capacity)
    empty = pack(
        deal(PrefillShape([], [], []), LLAMA, tile_rows=TILE, num_sms=132, num_ctas=132), capacity
    )
    assert packed.info == empty.info
    assert len(packed.ints) == len(empty.ints)
    assert not empty.ints.any(), "without requests no CTA has work"
    starts = packed.info[2] // 4
    assert packed.ints[starts : starts + len(work.kv_starts)].tolist() == work.kv_starts.tolist()


def test_new_tokens_may_begin_behind_other_rows():
    lengths = BATCHES["odd"]
    shape = shape_of(lengths)
    options = {"tile_rows": TILE, "num_sms": 100, "num_ctas": DEVICE_SMS}
    at_zero = deal(shape, LLAMA, **options)
    behind = deal(shape._replace(first_token=7), LLAMA, **options)
    assert (behind.token_starts - at_zero.token_starts == 7).all()
    assert (behind.kv_starts == at_zero.kv_starts).all()
