"""Choice: which kernel computes a product. Plain data, so that a table of them can be kept."""

from __future__ import annotations

import enum
import functools
import importlib.util
from collections.abc import Callable
from typing import NamedTuple

import torch

from sgl_kernel.tile import Tile

# (x [m, k], weight [n, k], out [m, n] or, fused, [m, n // 2]): fills `out` on the current stream.
Product = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], object]


class Backend(enum.StrEnum):
    TORCH = "torch"
    TRITON = "triton"
    DEEP_GEMM = "deep_gemm"


class Choice(NamedTuple):
    """tile: of the Triton kernel; None with the other backends."""

    backend: Backend
    tile: Tile | None = None

    def __str__(self) -> str:
        return str(self.backend) if self.tile is None else f"{self.backend} {self.tile}"


TORCH = Choice(Backend.TORCH)

# DeepGEMM compiles anew, for a second, where the number of its blocks of 64 rows asks for another
# kernel: serving keeps to a few. Decode steps of 65 to 128 tokens have two blocks, all of them.
_DEEP_GEMM_PIECES = (4096, 2048)
_DEEP_GEMM_DECODE_TOKENS = 128


def deep_gemm_takes(m: int) -> bool:
    """Whether DeepGEMM is worth measuring at m tokens."""
    return m == _DEEP_GEMM_DECODE_TOKENS or deep_gemm_piece(m) > 0


def deep_gemm_piece(m: int) -> int:
    """The rows of one launch where DeepGEMM computes m or more; 0: all of them in one."""
    return next((piece for piece in _DEEP_GEMM_PIECES if piece <= m), 0)


def product_of(choice: Choice, num_sms: int, *, fused: bool = False) -> Product:
    """The kernel behind a choice, for a lane of so many SMs. fused: x @ weight.T, gate and up,
    then silu(gate) * up; only Triton has that. Raises ImportError without the backend's package.
    """
    if choice.backend is Backend.TORCH:
        assert not fused, "torch has no fused product"
        return _torch_product
    if choice.backend is Backend.DEEP_GEMM:
        assert not fused, "DeepGEMM has no fused product"
        return _deep_gemm_product(num_sms)
    from sgl_kernel.matmul import matmul, matmul_silu_and_mul

    kernel = matmul_silu_and_mul if fused else matmul
    tile = choice.tile
    assert tile is not None, choice

    def product(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
        kernel(x, weight, num_sms=num_sms, tile=tile, out=out)

    return product


def _torch_product(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
    torch.mm(x, weight.t(), out=out)


def _deep_gemm_product(num_sms: int) -> Product:
    import deep_gemm

    def product(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
        # Of the whole process: another lane may have set its own since.
        deep_gemm.set_num_sms(num_sms)
        deep_gemm.bf16_gemm_nt(x, weight, out)

    return product


@functools.cache
def installed(backend: Backend) -> bool:
    """Whether the backend's package is there; nothing is imported."""
    package = {Backend.TRITON: "triton", Backend.DEEP_GEMM: "deep_gemm"}.get(backend, "torch")
    return importlib.util.find_spec(package) is not None


def supports(backend: Backend, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the backend is there and takes this dtype on this device."""
    if backend is Backend.TORCH:
        return True
    if device.type != "cuda" or torch.cuda.get_device_capability(device) != (9, 0):
        return False
    if not installed(backend):
        return False
    if backend is Backend.DEEP_GEMM:
        return dtype == torch.bfloat16
    return dtype in (torch.bfloat16, torch.float16)
