"""Kernels against their plain-torch references: on a GPU, or under TRITON_INTERPRET=1 on the CPU.

Every tensor that a kernel must not read is poisoned with NaN, and so is all of `out` before it is
written: a read or a missing write too many shows as NaN in the result.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU, or TRITON_INTERPRET=1", allow_module_level=True)

from sgl_kernel.decode_attention import (  # noqa: E402
    DecodeScratch,
    decode_attention,
    decode_attention_ref,
)
from sgl_kernel.decode_cut import chunks_needed, most_chunks, num_chunks  # noqa: E402
from sgl_kernel.paged_batch import PagedBatch  # noqa: E402
from sgl_kernel.prefill_attention import prefill_attention, prefill_attention_ref  # noqa: E402
from sglang.srt.errors import ConfigError  # noqa: E402
from sglang.srt.layers.attention.triton_backend import TritonAttention  # noqa: E402
from sglang.srt.model_executor.forward_batch import ForwardBatch  # noqa: E402

pytestmark = [] if INTERPRETED else [pytest.mark.gpu]
needs_gpu = pytest.mark.skipif(INTERPRETED, reason="the interpreter has no GPU")

DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
# The interpreter keeps bfloat16 as raw integers and cannot multiply it.
DTYPES = [torch.float32, torch.float16] + ([] if INTERPRETED else [torch.bfloat16])
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}
# (query heads, kv heads, head size); the interpreter is slow and gets a sample.
SHAPES = [(9, 3, 64), (8, 2, 80)]
SHAPES += [] if INTERPRETED else [(3, 3, 64), (8, 2, 128), (16, 2, 96), (8, 8, 128)]
SM_COUNTS = (5, 2, 1) if INTERPRETED else (132, *range(8, 132, 12), 1)
CHUNK_BORDERS = [1, 31, 32, 33, 127, 128, 129, 257, 1023, 1024, 1025, 16385]
CHUNK_BORDERS += [] if INTERPRETED else [4096, 16384, 32767, 32768, 32769, 33791, 33792, 33793]
NAN = float("nan")


def name_of(value: Any) -> str | None:
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None


@dataclass
class Case:
    """Random requests over a poisoned pool. q is a strided view, as models hand it over."""

    q: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    batch: PagedBatch
    lens: list[tuple[int, int]]
    scale: float

    def poisoned_out(self) -> torch.Tensor:
        return torch.full(self.q.shape, NAN, dtype=self.q.dtype, device=DEVICE)

    def prefill(self, min_new_tokens: int = 1) -> torch.Tensor:
        out = self.poisoned_out()
        prefill_attention(
            self.q,
            self.k_cache,
            self.v_cache,
            self.batch,
            out,
            scale=self.scale,
            max_new_tokens=max((new for _, new in self.lens), default=0),
            min_new_tokens=min_new_tokens,
        )
        return out

    def scratch(self) -> DecodeScratch:
        lens = [prefix + new for prefix, new in self.lens if new == 1]
        scratch = DecodeScratch.allocate(
            chunks_needed(lens), self.q.shape[1], self.q.shape[2], DEVICE
        )
        for unread in (scratch.acc, scratch.norm, scratch.peak):
            unread.fill_(NAN)
        scratch.folded.fill_(-(2**20))
        return scratch

    def decode(self, num_sms: int = 4, scratch: DecodeScratch | None = None) -> torch.Tensor:
        out = self.poisoned_out()
        scratch = scratch or self.scratch()
        decode_attention(
            self.q,
            self.k_cache,
            self.v_cache,
            self.batch,
            out,
            scratch,
            scale=self.scale,
            num_sms=num_sms,
        )
        assert not scratch.arrived.any(), "a launch must leave its counters at 0"
        return out

    def reference(self) -> torch.Tensor:
        return prefill_attention_ref(
            self.q, self.k_cache, self.v_cache, self.batch, scale=self.scale
        )

    def only(self, req: int) -> Case:
        """The same sequence, in the same slots, without its neighbours."""
        starts = self.batch.new_starts.tolist()
        first, end = starts[req], starts[req + 1]
        batch = PagedBatch(
            self.batch.slot_table,
            self.batch.rows[req : req + 1].clone(),
            self.batch.seq_lens[req : req + 1].clone(),
            i32([0, end - first]),
        )
        q = self.q[first:end]
        return Case(q, self.k_cache, self.v_cache, batch, [self.lens[req]], self.scale)


def i32(values: Sequence[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def make_case(
    lens: Sequence[tuple[int, int]],
    heads: tuple[int, int] = (8, 2),
    head_dim: int = 64,
    dtype: torch.dtype = torch.float32,
) -> Case:
    """lens: (cached, new) of each request. Slots are scattered; a third of the pool is unused."""
    generator = torch.Generator().manual_seed(len(lens) * 1000 + head_dim)
    num_heads, num_kv_heads = heads
    totals = [prefix + new for prefix, new in lens]
    num_slots = sum(totals) * 3 // 2 + 16
    # Slot 0 stays unused and fills the table behind each sequence: reading it shows.
    order = torch.randperm(num_slots - 1, generator=generator) + 1
    rows = torch.randperm(len(lens) + 3, generator=generator)[: len(lens)]
    slot_table = torch.zeros((len(lens) + 3, max(totals, default=0) + 5), dtype=torch.int32)
    k_cache = torch.full((num_slots, num_kv_heads, head_dim), NAN)
    v_cache = torch.full((num_slots, num_kv_heads, head_dim), NAN)
    taken = 0
    for row, total in zip(rows.tolist(), totals, strict=True):
        slots = order[taken : taken + total]
        taken += total
        slot_table[row, :total] = slots.int()
        k_cache[slots] = torch.randn((total, num_kv_heads, head_dim), generator=generator)
        v_cache[slots] = torch.randn((total, num_kv_heads, head_dim), generator=generator)
    new_starts = list(itertools.accumulate((new for _, new in lens), initial=0))
    fused = torch.randn(
        (new_starts[-1], num_heads + 2 * num_kv_heads, head_dim), generator=generator
    )
    return Case(
        q=fused.to(DEVICE, dtype)[:, :num_heads],
        k_cache=k_cache.to(DEVICE, dtype),
        v_cache=v_cache.to(DEVICE, dtype),
        batch=PagedBatch(slot_table.to(DEVICE), rows.to(DEVICE), i32(totals), i32(new_starts)),
        lens=list(lens),
        scale=head_dim**-0.5,
    )


def assert_near(out: torch.Tensor, expected: torch.Tensor) -> None:
    assert out.isfinite().all(), f"{int((~out.isfinite()).sum())} elements are not finite"
    error = (out.double() - expected).norm() / expected.norm()
    assert error < TOLERANCE[out.dtype], f"relative error {error:.2e}"


@needs_gpu
def test_slots_beyond_two_to_the_31_elements() -> None:
    slots_total = 2**31 // (8 * 128) + 4096
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GiB of free GPU memory")
    k_cache = torch.empty((slots_total, 8, 128), dtype=torch.bfloat16, device=DEVICE)
    v_cache = torch.empty_like(k_cache)
    case = make_case([(0, 300), (699, 1)], heads=(8, 8), head_dim=128, dtype=torch.bfloat16)
    high = slots_total - 2000 + torch.arange(1000, device=DEVICE)
    k = torch.randn((1000, 8, 128), dtype=torch.bfloat16, device=DEVICE)
    v = torch.randn_like(k)
    k_cache[high], v_cache[high] = k, v
    table = torch.zeros((2, 1000), dtype=torch.int32, device=DEVICE)
    table[0, :300], table[1, :700] = high[:300].int(), high[300:].int()
    case.k_cache, case.v_cache = k_cache, v_cache
    case.batch = case.batch._replace(slot_table=table, rows=torch.arange(2, device=DEVICE))
    expected = case.reference()
    assert_near(case.prefill(), expected)
    assert_near(case.decode()[300:], expected[300:])


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_prefill_matches_the_reference(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    heads, head_dim = shape[:2], shape[2]
    case = make_case([(0, 1), (0, 37), (70, 5), (129, 66)], heads, head_dim, dtype)
    assert_near(case.prefill(), case.reference())


@pytest.mark.parametrize("new_len", [1, 2, 15, 16, 17, 31, 33, 64, 65, 128, 129])
def test_prefill_around_tile_borders(new_len: int) -> None:
    lens = [(0, new_len), (new_len, 1), (63, new_len), (64, new_len), (65, new_len)]
    case = make_case(lens, heads=(3, 1))
    assert_near(case.prefill(), case.reference())


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_prefill_of_long_sequences(head_dim: int, dtype: torch.dtype) -> None:
    case = make_case([(3000, 1111), (0, 2049), (8000, 3), (17, 700)], (8, 2), head_dim, dtype)
    assert_near(case.prefill(), case.reference())


def test_prefill_leaves_shorter_requests_alone() -> None:
    case = make_case([(5, 1), (20, 3), (0, 1), (9, 2), (4, 0)])
    out = case.prefill(min_new_tokens=2)
    starts = case.batch.new_starts.tolist()
    expected = case.reference()
    for req in (1, 3):
        rows = slice(starts[req], starts[req + 1])
        assert_near(out[rows], expected[rows])
    for req in (0, 2):
        assert out[starts[req]].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_prefill_of_a_request_does_not_depend_on_its_batch(dtype: torch.dtype) -> None:
    case = make_case([(0, 40), (133, 70), (64, 1), (1, 90)], (8, 2), 64, dtype)
    together = case.prefill()
    starts = case.batch.new_starts.tolist()
    for req in range(len(case.lens)):
        assert torch.equal(case.only(req).prefill(), together[starts[req] : starts[req + 1]])


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("cut", [1, 63, 100, 128, 517])
def test_prefill_does_not_depend_on_where_a_prompt_is_cut(cut: int, dtype: torch.dtype) -> None:
    whole = make_case([(40, 600)], (9, 3), 64, dtype)
    expected = whole.prefill()
    for first, end in ((0, cut), (cut, 600)):
        chunk = PagedBatch(
            whole.batch.slot_table, whole.batch.rows, i32([40 + end]), i32([0, end - first])
        )
        lens = [(40 + first, end - first)]
        part = Case(
            whole.q[first:end], whole.k_cache, whole.v_cache, chunk, lens, whole.scale
        ).prefill()
        assert torch.equal(part, expected[first:end])


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_decode_matches_the_reference(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    heads, head_dim = shape[:2], shape[2]
    case = make_case([(0, 1), (36, 1), (255, 1), (256, 1), (640, 1)], heads, head_dim, dtype)
    expected = decode_attention_ref(
        case.q, case.k_cache, case.v_cache, case.batch, scale=case.scale
    )
    assert_near(case.decode(), expected)
    torch.testing.assert_close(expected, case.reference())


def test_decode_of_more_query_heads_than_one_tile_of_sixteen() -> None:
    case = make_case([(300, 1), (11, 1)], heads=(20, 1))
    assert_near(case.decode(), case.reference())


@pytest.mark.parametrize("seq_len", CHUNK_BORDERS)
def test_decode_around_chunk_borders(seq_len: int) -> None:
    case = make_case([(seq_len - 1, 1), (3, 1), (seq_len // 2, 1)], heads=(2, 1))
    assert_near(case.decode(), case.reference())


def test_a_long_sequence_is_cut_into_few_chunks() -> None:
    lens = (0, 1, 128, 129, 1024, 1025, 16384, 16385)
    assert [num_chunks(n) for n in lens] == [1, 1, 1, 2, 8, 3, 32, 33]
    assert all(1 <= num_chunks(n) <= 64 for n in range(0, 2_000_000, 997))


@pytest.mark.parametrize("max_seq_len", [1, 700, 1024, 1025, 4097, 16385, 32768, 32769, 70_000])
def test_scratch_for_the_longest_sequence_holds_any_shorter_one(max_seq_len: int) -> None:
    assert most_chunks(max_seq_len) == max(map(num_chunks, range(max_seq_len + 1)))


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_decode_of_long_and_many_sequences(head_dim: int, dtype: torch.dtype) -> None:
    lens = [(40_000, 1), *((37 * i % 3001, 1) for i in range(150))]
    case = make_case(lens, (8, 2), head_dim, dtype)
    assert_near(case.decode(num_sms=132), case.reference())


def test_decode_takes_only_requests_with_one_new_token() -> None:
    case = make_case([(300, 1), (20, 3), (0, 1), (700, 2), (4, 0), (600, 1)])
    out = case.decode()
    expected = case.reference()
    decoded = [0, 4, 7]
    assert case.batch.new_starts.tolist() == [0, 1, 4, 5, 7, 7, 8]
    assert_near(out[decoded], expected[decoded])
    assert out[[1, 2, 3, 5, 6]].isnan().all()


def test_decode_of_an_empty_sequence_is_zero() -> None:
    case = make_case([(9, 1), (30, 1)])
    case.batch.seq_lens[0] = 0
    expected = decode_attention_ref(
        case.q, case.k_cache, case.v_cache, case.batch, scale=case.scale
    )
    out = case.decode()
    assert (out[0] == 0).all()
    assert_near(out, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_decode_depends_on_neither_batch_nor_sm_count(dtype: torch.dtype) -> None:
    case = make_case([(1200, 1), (17, 1), (256, 1), (600, 1)], (8, 2), 64, dtype)
    together = case.decode(num_sms=SM_COUNTS[0])
    for num_sms in SM_COUNTS[1:]:
        assert torch.equal(case.decode(num_sms=num_sms), together), num_sms
    for req in range(len(case.lens)):
        assert torch.equal(case.only(req).decode(num_sms=2), together[req : req + 1])


@needs_gpu
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_decode_of_a_long_batch_depends_on_neither_batch_nor_sm_count(head_dim: int) -> None:
    """Sequences of one block and of many runs; between them requests that do not decode."""
    lens = [(0, 1), (20_000, 1), (50, 3), (2047, 1), (2048, 1), (3, 0), (9001, 1), (63, 1)]
    case = make_case(lens, (8, 2), head_dim, torch.bfloat16)
    together = case.decode(num_sms=132)
    for num_sms in range(8, 132, 4):
        out = case.decode(num_sms=num_sms)
        assert torch.equal(out.nan_to_num(), together.nan_to_num()), num_sms
    starts = case.batch.new_starts.tolist()
    for req in (0, 1, 3, 6, 7):
        alone = case.only(req).decode(num_sms=40)
        assert torch.equal(alone, together[starts[req] : starts[req + 1]])


@needs_gpu
@pytest.mark.parametrize("num_sms", [16, 132])
def test_decode_gives_the_same_bits_however_often_it_runs(num_sms: int) -> None:
    """Programs that share a request arrive in another order each time; one scratch serves all."""
    case = make_case([(5000, 1), *((131 * i % 1501, 1) for i in range(60))], (32, 8), 128)
    case.q, case.k_cache, case.v_cache = (
        tensor.bfloat16() for tensor in (case.q, case.k_cache, case.v_cache)
    )
    scratch = case.scratch()
    expected = case.decode(num_sms, scratch)
    assert_near(expected, case.reference())
    for _ in range(300):
        assert torch.equal(case.decode(num_sms, scratch), expected)


@pytest.mark.parametrize("attend", [Case.prefill, Case.decode])
def test_attention_of_an_empty_batch_is_empty(attend: Any) -> None:
    assert attend(make_case([])).shape == (0, 8, 64)


def test_attention_refuses_what_does_not_fit() -> None:
    case = make_case([(5, 1)])
    case.k_cache = case.k_cache.half()
    with pytest.raises(ValueError, match="float16"):
        case.decode()
    case = make_case([(5, 1)])
    case.q = case.q[:, :7]
    with pytest.raises(ValueError, match="7 query heads are no multiple of 2"):
        case.prefill()


@dataclass
class OneLayerPool:
    k_cache: torch.Tensor
    v_cache: torch.Tensor

    def layer(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        assert index == 0
        return self.k_cache, self.v_cache


@dataclass
class HeadShape:
    """The part of a ModelConfig that attention reads."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    architecture: str = "TestForCausalLM"


def make_backend(case: Case, num_sms: int = 4) -> TritonAttention:
    _, num_heads, head_dim = case.q.shape
    shape: Any = HeadShape(num_heads, case.k_cache.shape[1], head_dim, case.q.dtype)
    return TritonAttention(OneLayerPool(case.k_cache, case.v_cache), shape, num_sms)


def forward_batch(case: Case) -> ForwardBatch:
    table, rows, seq_lens, new_starts = case.batch
    new_lens = [new for _, new in case.lens]
    totals = [prefix + new for prefix, new in case.lens]
    positions = [p for prefix, new in case.lens for p in range(prefix, prefix + new)]
    req_of_token = torch.repeat_interleave(torch.tensor(new_lens, dtype=torch.int64)).to(DEVICE)
    position = torch.tensor(positions, dtype=torch.int64, device=DEVICE)
    return ForwardBatch(
        decode_reqs=len(new_lens) if all(new == 1 for new in new_lens) else 0,
        token_slots=table[rows[req_of_token], position].long(),
        positions=position,
        rows=rows,
        seq_lens=seq_lens,
        new_lens=i32(new_lens),
        new_starts=new_starts,
        slot_table=table,
        new_lens_host=new_lens,
        seq_lens_host=totals,
    )


def attend(backend: TritonAttention, case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """Result of the backend for new keys and values, and the reference's."""
    batch = forward_batch(case)
    shape = (batch.num_tokens, 2 * case.k_cache.shape[1], case.q.shape[2])
    k, v = torch.randn(shape, device=DEVICE).to(case.q.dtype).chunk(2, dim=1)
    case.k_cache[batch.token_slots], case.v_cache[batch.token_slots] = k, v
    backend.plan(batch)
    out = backend.attend(0, case.q, k, v, batch)
    return out, case.reference()


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize(
    "lens",
    [
        [(0, 20), (100, 7)],
        [(300, 1), (7, 1)],
        [(700, 1), (0, 20), (0, 1), (64, 3)],
        [(5, 0), (600, 1)],
        [],
    ],
    ids=["prefill", "decode", "both", "one-empty", "nothing"],
)
def test_backend_attends_any_mix(lens: list[tuple[int, int]], dtype: torch.dtype) -> None:
    case = make_case(lens, dtype=dtype)
    out, expected = attend(make_backend(case), case)
    assert out.shape == case.q.shape
    if lens:
        assert_near(out, expected)


def test_backend_gives_a_decode_row_the_same_bits_beside_a_prefill() -> None:
    case = make_case([(700, 1), (0, 20), (64, 1)])
    mixed, _ = attend(make_backend(case), case)
    assert torch.equal(case.only(0).decode(num_sms=2), mixed[:1])
    assert torch.equal(case.only(2).decode(num_sms=2), mixed[21:])


def test_backend_grows_its_scratch_until_it_is_reserved() -> None:
    case = make_case([(2000, 1), (900, 1)])
    backend = make_backend(case)
    for part in (case.only(1), case):
        out, expected = attend(backend, part)
        assert_near(out, expected)
    reserved = make_backend(case)
    reserved.reserve(max_reqs=1, max_seq_len=1024)
    out, expected = attend(reserved, case.only(1))
    assert_near(out, expected)
    with pytest.raises(AssertionError, match="12 chunks exceed the 8"):
        reserved.plan(forward_batch(case))


def test_backend_refuses_a_cache_of_another_dtype() -> None:
    case = make_case([(5, 1)])
    case.q = case.q.half()
    with pytest.raises(ConfigError, match="KV cache of the model's dtype"):
        make_backend(case)


@needs_gpu
def test_one_captured_graph_serves_any_lengths() -> None:
    case = make_case([(2999, 1), (2999, 1), (2999, 1)], (8, 2), 128, torch.bfloat16)
    backend = make_backend(case, num_sms=132)
    backend.reserve(max_reqs=3, max_seq_len=3000)
    batch = forward_batch(case)
    k = torch.randn((3, 2, 128), dtype=torch.bfloat16, device=DEVICE)
    v = torch.randn_like(k)
    backend.plan(batch)
    backend.attend(0, case.q, k, v, batch)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = backend.attend(0, case.q, k, v, batch)
    for lens in ([3000, 17, 256], [257, 2048, 1], [3000, 3000, 3000]):
        batch.seq_lens.copy_(i32(lens))
        out.fill_(NAN)
        graph.replay()
        assert_near(out, case.reference())


@needs_gpu
def test_programs_of_the_whole_device_cover_its_sms_at_one_time() -> None:
    from sgl_kernel.sm_ids import SmTrace, record_sm_ids, sm_ids_used

    num_sms = torch.cuda.get_device_properties(DEVICE).multi_processor_count
    trace = SmTrace.allocate(4 * num_sms, DEVICE)
    record_sm_ids(trace, spin_ns=1000)
    record_sm_ids(trace, spin_ns=2_000_000)
    assert sm_ids_used(trace) == frozenset(range(num_sms))
    assert ((trace.stop_ns - trace.start_ns) >= 2_000_000).all()
    assert trace.start_ns.max() < trace.stop_ns.min()
