"""The fused element-wise kernels against plain torch: on a GPU, or under TRITON_INTERPRET=1.

Inputs are views into tensors of NaN and outputs start as NaN where the caller owns them: a read or
a missing write too many shows as NaN in the result.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU, or TRITON_INTERPRET=1", allow_module_level=True)

from sgl_kernel.elementwise_ref import (  # noqa: E402
    HeadNorm,
    add_rms_norm_ref,
    rms_norm_ref,
    rotate_and_store_ref,
    silu_and_mul_ref,
)
from sgl_kernel.greedy import greedy_tokens, greedy_tokens_ref  # noqa: E402
from sgl_kernel.rms_norm import add_rms_norm, rms_norm  # noqa: E402
from sgl_kernel.rotate_and_store import rotate_and_store  # noqa: E402
from sgl_kernel.silu_and_mul import silu_and_mul  # noqa: E402

pytestmark = [] if INTERPRETED else [pytest.mark.gpu]
needs_gpu = pytest.mark.skipif(INTERPRETED, reason="the interpreter has no GPU")

DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
# The interpreter cuts bfloat16 off where hardware rounds.
DTYPES = [torch.float32, torch.float16] + ([] if INTERPRETED else [torch.bfloat16])
# Norm of the error over norm of the exact result.
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
EPS = 1e-5
NAN = float("nan")

# SmolLM2, Llama 3 and what lies around them; a multiple of nothing, and narrower than a warp.
WIDTHS = [1, 5, 48, 576, 1000, 4096, 8192]
WIDTHS += [] if INTERPRETED else [896, 1536, 2047, 2049, 5120, 16384, 28672, 32768]
# (q heads, kv heads, head_dim): Llama 3, SmolLM2, tiny odd halves, more heads than one program has.
SHAPES = [(32, 8, 128), (9, 3, 64), (6, 2, 10), (5, 1, 80)]
SHAPES += [] if INTERPRETED else [(8, 8, 256), (64, 8, 128), (12, 2, 128), (3, 3, 96), (1, 1, 2)]


def name_of(value: Any) -> str | None:
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None


by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
by_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
by_norm = pytest.mark.parametrize("with_norm", [False, True], ids=["plain", "normed"])


def random(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Normal numbers whose rows differ in scale."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator)
    if len(shape) > 1:
        values *= torch.rand((shape[0], *(1,) * (len(shape) - 1)), generator=generator) * 4 + 0.1
    return values.to(DEVICE, dtype)


def in_poison(x: torch.Tensor) -> torch.Tensor:
    """The same values as a view with strided rows, NaN on every side."""
    rows, width = x.shape
    host = torch.full((rows + 2, width + 24), NAN, dtype=x.dtype, device=x.device)
    view = host[1:-1, 8 : 8 + width]
    view.copy_(x)
    return view


def relative_error(out: torch.Tensor, exact: torch.Tensor) -> float:
    assert out.isfinite().all(), f"{int((~out.isfinite()).sum())} elements are not finite"
    return float((out.double() - exact).norm() / exact.norm())


def assert_steps_apart(out: torch.Tensor, expected: torch.Tensor, scale: float = 0.0) -> None:
    """Equal but for rounding: a last step of the dtype here and there, relative to an element or,
    where results are differences, to `scale`."""
    eps = torch.finfo(out.dtype).eps
    steps = 32 if out.dtype == torch.float32 else 2
    torch.testing.assert_close(out, expected, rtol=steps * eps, atol=steps * eps * scale)
    if out.dtype != torch.float32:
        assert int((out != expected).sum()) <= max(1, out.numel() // 100)


def rms_norm_exact(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    wide = x.double()
    return wide * (wide.square().mean(-1, keepdim=True) + EPS).rsqrt() * weight.double()


@by_dtype
@pytest.mark.parametrize("width", WIDTHS)
def test_rms_norm(width: int, dtype: torch.dtype) -> None:
    x = in_poison(random(7, width, dtype=dtype))
    weight = random(width, dtype=dtype, seed=1)
    out = rms_norm(x, weight, EPS)
    assert out.is_contiguous() and out.dtype == dtype
    assert relative_error(out, rms_norm_exact(x, weight)) < TOLERANCE[dtype]
    assert_steps_apart(out, rms_norm_ref(x, weight, EPS))


@by_dtype
@pytest.mark.parametrize("width", WIDTHS)
def test_add_rms_norm(width: int, dtype: torch.dtype) -> None:
    x = in_poison(random(7, width, dtype=dtype))
    residual = in_poison(random(7, width, dtype=dtype, seed=1))
    weight = random(width, dtype=dtype, seed=2)
    x_before, residual_before = x.clone(), residual.clone()
    out, total = add_rms_norm(x, residual, weight, EPS)
    expected, expected_total = add_rms_norm_ref(x, residual, weight, EPS)
    assert torch.equal(total, expected_total)
    assert relative_error(out, rms_norm_exact(total, weight)) < TOLERANCE[dtype]
    assert_steps_apart(out, expected)
    assert torch.equal(x, x_before) and torch.equal(residual, residual_before)


@by_dtype
def test_a_row_is_normed_alike_alone_and_in_any_batch(dtype: torch.dtype) -> None:
    x, residual = random(40, 576, dtype=dtype), random(40, 576, dtype=dtype, seed=1)
    weight = random(576, dtype=dtype, seed=2)
    together, _ = add_rms_norm(x, residual, weight, EPS)
    for row in (0, 17, 39):
        alone, total = add_rms_norm(x[row : row + 1], residual[row : row + 1], weight, EPS)
        assert torch.equal(alone, together[row : row + 1])
        assert torch.equal(rms_norm(total, weight, EPS), alone)


def test_norm_of_zeros_and_of_large_numbers_is_finite() -> None:
    weight = torch.ones(64, device=DEVICE)
    assert (rms_norm(torch.zeros((2, 64), device=DEVICE), weight, EPS) == 0).all()
    large = torch.full((2, 64), 1e18, device=DEVICE)
    torch.testing.assert_close(rms_norm(large, weight, EPS), torch.ones_like(large))


def test_norms_refuse_what_does_not_fit() -> None:
    x, weight = torch.zeros((3, 64), device=DEVICE), torch.ones(64, device=DEVICE)
    with pytest.raises(ValueError, match="must be \\[rows, width\\]"):
        rms_norm(x, weight[:32], EPS)
    with pytest.raises(ValueError, match="width up to 32768"):
        rms_norm(x.new_zeros((1, 32769)), x.new_zeros(32769), EPS)
    with pytest.raises(ValueError, match=r"weight torch\.float16"):
        rms_norm(x, weight.half(), EPS)
    with pytest.raises(ValueError, match="contiguous"):
        rms_norm(torch.zeros((64, 64), device=DEVICE).t(), weight, EPS)
    with pytest.raises(ValueError, match="differ"):
        add_rms_norm(x, x[:2], weight, EPS)


@by_dtype
@pytest.mark.parametrize("width", [1, 67, 1536, 2048, 2049, 14336])
def test_silu_and_mul(width: int, dtype: torch.dtype) -> None:
    gate_up = in_poison(random(5, 2 * width, dtype=dtype))
    out = silu_and_mul(gate_up)
    assert out.is_contiguous() and out.dtype == dtype
    gate, up = gate_up.double().chunk(2, dim=-1)
    assert relative_error(out, gate * gate.sigmoid() * up) < TOLERANCE[dtype]
    assert_steps_apart(out, silu_and_mul_ref(gate_up))
    given = torch.full_like(out, torch.nan)
    assert silu_and_mul(gate_up, given) is given
    torch.testing.assert_close(given, out, rtol=0, atol=0)


def test_silu_of_extreme_gates() -> None:
    gates = [-1e4, -200.0, -89.0, -88.0, -20.0, -0.0, 0.0, 20.0, 100.0, 1e4]
    gate_up = torch.tensor([gates + [2.0] * len(gates)], device=DEVICE)
    gate = gate_up[:, : len(gates)].double()
    expected = (gate * gate.sigmoid() * 2).float()
    torch.testing.assert_close(silu_and_mul(gate_up), expected, rtol=1e-5, atol=1e-36)


def test_silu_and_mul_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="2 \\* width"):
        silu_and_mul(torch.zeros((3, 7), device=DEVICE))
    with pytest.raises(ValueError, match="contiguous"):
        silu_and_mul(torch.zeros((8, 8), device=DEVICE).t())
    gate_up = torch.zeros((3, 8), device=DEVICE)
    for out in (
        torch.zeros((3, 8), device=DEVICE),
        torch.zeros((3, 8), device=DEVICE)[:, :4],
        torch.zeros((3, 4), device=DEVICE, dtype=torch.bfloat16),
    ):
        with pytest.raises(ValueError, match="out must be contiguous"):
            silu_and_mul(gate_up, out)


class Rotated:
    """A fused projection of 11 tokens inside a poisoned tensor, with tables and poisoned caches."""

    def __init__(self, shape: tuple[int, int, int], dtype: torch.dtype, with_norm: bool) -> None:
        self.num_heads, self.num_kv_heads, head_dim = shape
        num_heads = self.num_heads + 2 * self.num_kv_heads
        values = random(11, num_heads * head_dim, dtype=dtype)
        self.heads = in_poison(values).unflatten(1, (num_heads, head_dim))
        self.before = self.heads.clone()
        # Out of order, one of them twice; what no token is at is NaN.
        self.positions = torch.tensor([9, 0, 63, 1, 2, 40, 41, 42, 9, 62, 17], device=DEVICE)
        self.slots = torch.tensor([3, 30, 31, 0, 7, 8, 2, 29, 5, 11, 10], device=DEVICE)
        angles = torch.rand((64, head_dim // 2), generator=torch.Generator().manual_seed(2)) * 7
        unused = torch.ones(64, dtype=torch.bool)
        unused[self.positions.cpu()] = False
        angles[unused] = NAN
        self.cos, self.sin = angles.cos().to(DEVICE), angles.sin().to(DEVICE)
        weights = random(2, head_dim, dtype=dtype, seed=3)
        self.norm = HeadNorm(weights[0], weights[1], EPS) if with_norm else None
        self.caches = self.new_caches(32)

    def new_caches(self, slots: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Poisoned keys and values, each with a gap between slots."""
        head_dim = self.heads.shape[2]
        shape = (2, slots, self.num_kv_heads + 1, head_dim)
        both = torch.full(shape, NAN, dtype=self.heads.dtype, device=DEVICE)
        return both[0, :, : self.num_kv_heads], both[1, :, : self.num_kv_heads]

    def apply(self, rotate: Any, heads: torch.Tensor) -> torch.Tensor:
        """The queries; keys and values are in self.caches."""
        queries: torch.Tensor = rotate(
            heads,
            self.cos,
            self.sin,
            self.positions,
            *self.caches,
            self.slots,
            num_heads=self.num_heads,
            norm=self.norm,
        )
        return queries

    def everything(self, rotate: Any) -> torch.Tensor:
        """q, k and v side by side [tokens, heads, head_dim], from a fresh copy and fresh caches."""
        heads = in_poison(self.before.flatten(1)).unflatten(1, self.before.shape[1:])
        self.caches = self.new_caches(32)
        q = self.apply(rotate, heads)
        assert q.is_contiguous()
        k, v = (cache[self.slots] for cache in self.caches)
        in_place = heads[:, self.num_heads : self.num_heads + self.num_kv_heads]
        assert torch.equal(in_place, k), "the keys are rotated where they lie, too"
        others = torch.ones(32, dtype=torch.bool, device=DEVICE)
        others[self.slots] = False
        for cache in self.caches:
            assert cache[others].isnan().all(), "another slot was written"
        return torch.cat((q, k, v), dim=1)

    def exact(self) -> torch.Tensor:
        """All heads in float64."""
        heads = self.before.double()
        q, k, v = heads.split((self.num_heads, self.num_kv_heads, self.num_kv_heads), dim=1)
        if self.norm is not None:
            q = rms_norm_exact(q, self.norm.q_weight)
            k = rms_norm_exact(k, self.norm.k_weight)
        cos, sin = (t[self.positions].double()[:, None] for t in (self.cos, self.sin))
        first, second = torch.cat((q, k), dim=1).chunk(2, dim=-1)
        rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
        return torch.cat((rotated, v), dim=1)


@by_dtype
@by_norm
@by_shape
def test_rotate_and_store(shape: tuple[int, int, int], with_norm: bool, dtype: torch.dtype) -> None:
    case = Rotated(shape, dtype, with_norm)
    expected = case.everything(rotate_and_store_ref)
    out = case.everything(rotate_and_store)
    assert relative_error(out, case.exact()) < TOLERANCE[dtype]
    values = slice(case.num_heads + case.num_kv_heads, None)
    assert torch.equal(out[:, values], case.before[:, values])
    if case.norm is None:
        assert torch.equal(out, expected)
    else:
        largest = float(case.norm.q_weight.abs().max().maximum(case.norm.k_weight.abs().max()))
        assert_steps_apart(out, expected, scale=largest * shape[2] ** 0.5)


def test_values_that_are_not_finite_are_stored_as_they_are() -> None:
    case = Rotated((9, 3, 64), torch.float32, with_norm=True)
    case.heads[2, 12:, 3], case.heads[2, 12:, 40] = float("inf"), float("-inf")
    expected = case.heads[2, 12:].clone()
    case.apply(rotate_and_store, case.heads)
    assert torch.equal(case.caches[1][case.slots[2]], expected)


@by_norm
def test_a_token_is_rotated_alike_alone_and_in_any_batch(with_norm: bool) -> None:
    case = Rotated((9, 3, 64), torch.float32, with_norm)
    alone, positions, slots = case.before[4:5].clone(), case.positions, case.slots
    together = case.apply(rotate_and_store, case.heads)
    case.positions, case.slots = positions[4:5], slots[4:5]
    assert torch.equal(case.apply(rotate_and_store, alone), together[4:5])


def test_rotate_and_store_reads_any_head_stride() -> None:
    case = Rotated((9, 3, 64), torch.float32, with_norm=True)
    head_major = case.before.transpose(0, 1).contiguous().transpose(0, 1)
    assert head_major.stride(0) < head_major.stride(1)
    rotated = case.apply(rotate_and_store, head_major)
    assert torch.equal(rotated, case.apply(rotate_and_store, case.heads))


def test_rotate_and_store_refuses_what_does_not_fit() -> None:
    case = Rotated((9, 3, 64), torch.float32, with_norm=True)
    assert case.norm is not None
    with pytest.raises(ValueError, match="do not fit 9 query heads"):
        case.apply(rotate_and_store, case.heads[:, :14])
    with pytest.raises(ValueError, match="do not fit"):
        case.apply(rotate_and_store, case.heads[..., :32])
    with pytest.raises(ValueError, match="positions must be contiguous"):
        case.apply(rotate_and_store, case.heads[:5])
    with pytest.raises(ValueError, match=r"heads are torch\.float16, cache"):
        case.apply(rotate_and_store, case.heads.half())
    keys, values = case.caches
    case.caches = keys.half(), values.half()
    with pytest.raises(ValueError, match="q_weight must be contiguous"):
        case.apply(rotate_and_store, case.heads.half())
    case.caches = keys, values[:8]
    with pytest.raises(ValueError, match="one shape"):
        case.apply(rotate_and_store, case.heads)
    case.caches = keys, values
    case.cos = case.cos.half()
    with pytest.raises(ValueError, match="must be float32"):
        case.apply(rotate_and_store, case.heads)


@by_dtype
@pytest.mark.parametrize("width", [1, 7, 4096, 4097, 49152 if not INTERPRETED else 5000])
def test_greedy_tokens(width: int, dtype: torch.dtype) -> None:
    logits = in_poison(random(6, width, dtype=dtype, seed=width))
    logits[1] = 0.5
    logits[2] = float("-inf")
    logits[3, width // 2 :] = logits[3].max()
    logits[4] = float("-inf")
    logits[4, -1] = -7.0
    out = torch.full((6,), -1, dtype=torch.int64, device=DEVICE)
    assert greedy_tokens(logits, out) is out
    assert torch.equal(out, greedy_tokens_ref(logits))
    assert out[1] == out[2] == 0
    assert out[4] == width - 1


def test_greedy_tokens_of_nan_stay_in_the_vocabulary() -> None:
    assert 0 <= int(greedy_tokens(torch.full((1, 99), NAN, device=DEVICE))) < 99


def test_greedy_tokens_refuses_what_does_not_fit() -> None:
    logits = torch.zeros((3, 8), device=DEVICE)
    with pytest.raises(ValueError, match="rows, vocab_size"):
        greedy_tokens(logits[0])
    with pytest.raises(ValueError, match="float32, bfloat16 or float16"):
        greedy_tokens(logits.double())
    with pytest.raises(ValueError, match="out must be contiguous i64"):
        greedy_tokens(logits, torch.zeros(2, dtype=torch.int64, device=DEVICE))


@by_dtype
def test_no_tokens(dtype: torch.dtype) -> None:
    empty = torch.empty((0, 64), dtype=dtype, device=DEVICE)
    weight = torch.ones(64, dtype=dtype, device=DEVICE)
    assert rms_norm(empty, weight, EPS).shape == (0, 64)
    assert [part.shape for part in add_rms_norm(empty, empty, weight, EPS)] == [(0, 64), (0, 64)]
    assert silu_and_mul(empty).shape == (0, 32)
    case = Rotated((9, 3, 64), dtype, with_norm=False)
    case.positions, case.slots = case.positions[:0], case.slots[:0]
    assert case.apply(rotate_and_store, case.heads[:0]).shape == (0, 9, 64)
    assert greedy_tokens(empty).shape == (0,)


@needs_gpu
def test_more_than_two_to_the_31_elements() -> None:
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB of free GPU memory")
    # More rows than any grid dimension but the first allows; the last ones lie beyond 2^31.
    wide = torch.zeros((76_000, 28_672), dtype=torch.bfloat16, device=DEVICE)
    last = random(3, 28_672, dtype=torch.bfloat16)
    wide[-3:] = last
    weight = random(28_672, dtype=torch.bfloat16, seed=1)
    assert torch.equal(silu_and_mul(wide)[-3:], silu_and_mul(last))
    normed, total = add_rms_norm(wide, wide, weight, EPS)
    assert torch.equal(total[-3:], last + last)
    assert torch.equal(normed[-3:], rms_norm(last + last, weight, EPS))
    del normed, total
    heads = wide.view(76_000, 224, 128)
    case = Rotated((200, 12, 128), torch.bfloat16, with_norm=False)
    case.positions = torch.arange(76_000, device=DEVICE) % 3
    case.cos, case.sin = torch.rand((2, 3, 64), device=DEVICE)
    case.slots = torch.arange(76_000, device=DEVICE)
    case.caches = case.new_caches(76_000)
    q = case.apply(rotate_and_store, heads)
    k, v = (cache[-3:].clone() for cache in case.caches)
    case.positions, case.slots = case.positions[-3:], case.slots[:3]
    expected = case.apply(rotate_and_store_ref, last.view(3, 224, 128).clone())
    assert torch.equal(q[-3:], expected)
    assert torch.equal(k, case.caches[0][:3])
    assert torch.equal(v, case.caches[1][:3])


@needs_gpu
@by_norm
def test_layers_take_the_kernels_for_tensors_on_a_gpu(
    with_norm: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sglang.srt.layers import activation, norm, rope, sampler

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the torch path was taken")

    x, weight = random(4, 64, dtype=torch.bfloat16), random(64, dtype=torch.bfloat16, seed=1)
    expected = (rms_norm(x, weight, EPS), *add_rms_norm(x, x, weight, EPS), silu_and_mul(x))
    monkeypatch.setattr(norm, "rms_norm_ref", refuse)
    monkeypatch.setattr(norm, "add_rms_norm_ref", refuse)
    monkeypatch.setattr(activation, "silu_and_mul_ref", refuse)
    monkeypatch.setattr(rope, "rotate_and_store_ref", refuse)
    found = (
        norm.rms_norm(x, weight, EPS),
        *norm.add_rms_norm(x, x, weight, EPS),
        activation.silu_and_mul(x),
    )
    for ours, kernels in zip(found, expected, strict=True):
        assert torch.equal(ours, kernels)
    case = Rotated((9, 3, 64), torch.bfloat16, with_norm)
    rotated = case.apply(rotate_and_store, case.before.clone())
    ours = rope.rotate_and_store(
        case.heads,
        rope.Rotation(case.cos, case.sin),
        case.positions,
        *case.caches,
        case.slots,
        num_heads=case.num_heads,
        norm=case.norm,
    )
    assert torch.equal(ours, rotated)
    assert torch.equal(sampler.likeliest(x), greedy_tokens(x))
