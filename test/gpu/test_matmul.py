"""The matrix products against float64: on a GPU, or under TRITON_INTERPRET=1.

Activations are views into tensors of NaN and results start as NaN: a read or a missing write too
many shows as NaN in the result.
"""

from __future__ import annotations

import os

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU, or TRITON_INTERPRET=1", allow_module_level=True)
if not INTERPRETED and torch.cuda.get_device_capability() != (9, 0):
    pytest.skip("needs a Hopper GPU", allow_module_level=True)

from sgl_kernel.elementwise_ref import silu_and_mul_ref  # noqa: E402
from sgl_kernel.matmul import matmul, matmul_ref, matmul_silu_and_mul  # noqa: E402
from sgl_kernel.tile import Tile  # noqa: E402
from sglang.srt.layers.matmul.tiles import tiles_for  # noqa: E402

pytestmark = [] if INTERPRETED else [pytest.mark.gpu]
needs_gpu = pytest.mark.skipif(INTERPRETED, reason="the interpreter has no GPU")

DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
# Norm of the error over norm of the exact result: the rounding of the result, twice if fused.
TOLERANCE = {torch.float16: 5e-4, torch.bfloat16: 4e-3}
SMS = 5
NAN = float("nan")

# The interpreter cuts bfloat16 off where hardware rounds, and gets float16 only.
# One tile of each form that the kernel has; on a GPU, in bfloat16, all that a server measures. Each
# of them is a compilation a dtype.
FORMS = [
    Tile(128, 256, 64, 4, 8, store_parts=2),
    Tile(128, 128, 64, 3, 4, programs_per_sm=2, store_parts=2),
    Tile(64, 256, 64, 4, 4, split_k=3),
    Tile(32, 128, 128, 5, 4, weight_first=True),
    Tile(16, 128, 128, 5, 4, weight_first=True, split_k=2),
]
KERNELS = [(tile, torch.float16) for tile in FORMS]
if not INTERPRETED:
    every = {
        tile: None
        for m in (16, 32, 64, 128, 256, 4096)
        for sms in (16, 32, 48, 100, 132)
        for tile in tiles_for(m, 4096, 4096, sms, fused=False)
    }
    KERNELS += [(tile, torch.bfloat16) for tile in dict.fromkeys([*FORMS, *every])]
# Tokens; results a row, which no tile divides; k, which no block divides.
SIZES = [(1, 336, 208), (17, 528, 1040), (130, 1104, 304)]
SIZES += [] if INTERPRETED else [(1, 4096, 4096), (61, 6144, 4096), (777, 2080, 1424)]

by_kernel = pytest.mark.parametrize(
    ("tile", "dtype"), KERNELS, ids=lambda value: str(value).removeprefix("torch.")
)


def operands(m: int, n: int, k: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """x as strided rows with NaN on every side, and a weight."""
    generator = torch.Generator().manual_seed(m + n + k)
    host = torch.full((m + 3, k + 24), NAN, dtype=dtype, device=DEVICE)
    x = host[1 : 1 + m, 8 : 8 + k]
    x.copy_(torch.randn((m, k), generator=generator))
    weight = torch.randn((n, k), generator=generator) / k**0.5
    return x, weight.to(DEVICE, dtype)


def poisoned(m: int, n: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """(a tensor of NaN, its first m rows): the rows behind must stay as they are."""
    host = torch.full((m + 2, n), NAN, dtype=dtype, device=DEVICE)
    return host, host[:m]


def relative_error(out: torch.Tensor, exact: torch.Tensor) -> float:
    assert out.isfinite().all(), f"{int((~out.isfinite()).sum())} elements are not finite"
    return float((out.double() - exact.double()).norm() / exact.double().norm())


def takes_halves(tile: Tile) -> bool:
    return not tile.weight_first or tile.block_n >= 128


@by_kernel
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_matmul(size: tuple[int, int, int], dtype: torch.dtype, tile: Tile) -> None:
    m, n, k = size
    x, weight = operands(m, n, k, dtype)
    host, out = poisoned(m, n, dtype)
    assert matmul(x, weight, num_sms=SMS, tile=tile, out=out) is out
    assert relative_error(out, matmul_ref(x, weight)) < TOLERANCE[dtype]
    assert host[m:].isnan().all()


@by_kernel
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_matmul_silu_and_mul(size: tuple[int, int, int], dtype: torch.dtype, tile: Tile) -> None:
    if not takes_halves(tile):
        pytest.skip("too narrow for a gate and an up projection")
    m, n, k = size
    x, weight = operands(m, n, k, dtype)
    host, out = poisoned(m, n // 2, dtype)
    assert matmul_silu_and_mul(x, weight, num_sms=SMS, tile=tile, out=out) is out
    exact = matmul_ref(x, weight)
    assert relative_error(out, silu_and_mul_ref(exact)) < 2 * TOLERANCE[dtype]
    rounded = silu_and_mul_ref(matmul(x, weight, num_sms=SMS, tile=tile))
    # The same sums, rounded where the separate kernels round: a last step here and there.
    assert int((out != rounded).sum()) <= max(2, out.numel() // 20)
    assert host[m:].isnan().all()


@by_kernel
def test_a_row_is_the_same_alone_in_a_batch_and_on_any_lane(tile: Tile, dtype: torch.dtype) -> None:
    x, weight = operands(70, 528, 1040, dtype)
    together = matmul(x, weight, num_sms=SMS, tile=tile)
    assert together.is_contiguous()
    assert torch.equal(matmul(x, weight, num_sms=1, tile=tile), together)
    assert torch.equal(matmul(x, weight, num_sms=132, tile=tile), together)
    for row in (0, 31, 69):
        assert torch.equal(
            matmul(x[row : row + 1], weight, num_sms=SMS, tile=tile)[0], together[row]
        )


@by_kernel
def test_no_tokens(tile: Tile, dtype: torch.dtype) -> None:
    x, weight = torch.empty((0, 64), dtype=dtype, device=DEVICE), operands(1, 256, 64, dtype)[1]
    assert matmul(x, weight, num_sms=SMS, tile=tile).shape == (0, 256)
    if takes_halves(tile):
        assert matmul_silu_and_mul(x, weight, num_sms=SMS, tile=tile).shape == (0, 128)


def test_refuses_what_does_not_fit() -> None:
    x, weight = operands(3, 256, 64, torch.float16)
    tile = FORMS[0]
    with pytest.raises(ValueError, match="must be \\[m, k\\] and \\[n, k\\]"):
        matmul(x, weight[:, :32], num_sms=SMS, tile=tile)
    with pytest.raises(ValueError, match="must be bfloat16 or float16 both"):
        matmul(x.float(), weight.float(), num_sms=SMS, tile=tile)
    with pytest.raises(ValueError, match="must be bfloat16 or float16 both"):
        matmul(x, weight.bfloat16(), num_sms=SMS, tile=tile)
    with pytest.raises(ValueError, match="multiples of 8"):
        matmul(x, weight[:252], num_sms=SMS, tile=tile)
    with pytest.raises(ValueError, match="multiples of 8"):
        matmul_silu_and_mul(x, weight[:248], num_sms=SMS, tile=tile)
    with pytest.raises(ValueError, match="x must have contiguous rows"):
        matmul(
            torch.empty((64, 8), dtype=x.dtype, device=DEVICE).t(), weight, num_sms=SMS, tile=tile
        )
    with pytest.raises(ValueError, match="weight must be contiguous"):
        matmul(x, weight.new_zeros((64, 256)).t(), num_sms=SMS, tile=tile)
    with pytest.raises(ValueError, match="num_sms must be at least 1"):
        matmul(x, weight, num_sms=0, tile=tile)
    with pytest.raises(ValueError, match="out must be contiguous"):
        matmul(x, weight, num_sms=SMS, tile=tile, out=x.new_zeros((3, 128)))
    with pytest.raises(ValueError, match="weight_first needs block_n of 128"):
        matmul_silu_and_mul(x, weight, num_sms=SMS, tile=Tile(16, 64, 64, 4, 4, weight_first=True))
    with pytest.raises(ValueError, match="2 \\* width"):
        matmul_silu_and_mul(x, weight[:255], num_sms=SMS, tile=tile)


@needs_gpu
def test_one_compilation_serves_any_number_of_tokens() -> None:
    from sgl_kernel.matmul import _matmul_kernel

    tile = FORMS[0]
    weight = operands(1, 512, 256, torch.bfloat16)[1]

    def compilations() -> int:
        return len(_matmul_kernel.device_caches[torch.cuda.current_device()][0])

    matmul(operands(1, 8, 256, torch.bfloat16)[0], weight, num_sms=SMS, tile=tile)
    before = compilations()
    for m in (2, 16, 17, 300):
        matmul(operands(m, 8, 256, torch.bfloat16)[0], weight, num_sms=SMS, tile=tile)
    wider = operands(1, 528, 272, torch.bfloat16)[1]
    matmul(operands(5, 8, 272, torch.bfloat16)[0], wider, num_sms=SMS, tile=tile)
    assert compilations() == before
