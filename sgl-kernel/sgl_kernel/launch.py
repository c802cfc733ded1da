"""Launcher: Triton launches at a few microseconds of host time each.

Triton inspects every argument of every launch to find the compilation that fits, which costs tens
of microseconds: more than the kernels of a short prefill take. A launcher asks Triton once for each
key, and then hands the same compiled kernel the new pointers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

# Triton compiles apart what is aligned to 16 bytes; fresh allocations always are.
_ALIGNMENT_MASK = 15

Grid = tuple[int, int, int]
# (grid, arguments of the kernel, constants included)
_Launch = Callable[[Grid, Sequence[Any]], None]


class Launcher:
    """Launches one kernel, whose parameters must come in this order:

    tensors     pointers, or None
    counts      integers on which the kernel is not specialised (`do_not_specialize`)
    scalars     integers and floats on which it may be
    constants   constexpr

    Compilations are kept for each device, dtypes, scalars, constants and options: whatever differs
    from launch to launch, such as a number of tokens, belongs into `counts`. Triton's launch hooks,
    which its own profiler sets, see the first launch of each only.
    """

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel
        self._ready: dict[tuple[Any, ...], _Launch] = {}
        # The interpreter's kernels have no parameters, and nothing to be ready.
        self._masks = [
            0 if parameter.do_not_specialize_on_alignment else _ALIGNMENT_MASK
            for parameter in getattr(kernel, "params", ())
        ]

    def __call__(
        self,
        grid: Grid,
        tensors: Sequence[torch.Tensor | None],
        counts: tuple[int, ...],
        scalars: tuple[int | float, ...],
        constants: tuple[Any, ...],
        **options: Any,
    ) -> None:
        """Runs on the current stream of the first tensor's device. options: num_warps and such."""
        pointers: list[int | None] = []
        dtypes: list[torch.dtype | None] = []
        misaligned = 0
        for tensor, mask in zip(tensors, self._masks, strict=False):
            if tensor is None:
                pointers.append(None)
                dtypes.append(None)
            else:
                pointer = tensor.data_ptr()
                pointers.append(pointer)
                dtypes.append(tensor.dtype)
                misaligned |= pointer & mask
        first = tensors[0]
        assert first is not None, "the first tensor tells the device"
        key = (first.get_device(), *dtypes, *scalars, *constants, *options.values())
        launch = None if misaligned else self._ready.get(key)
        if launch is not None:
            launch(grid, (*pointers, *counts, *scalars, *constants))
            return
        compiled = self._kernel[grid](*tensors, *counts, *scalars, *constants, **options)
        if compiled is not None and not misaligned:
            self._ready[key] = _launch_of(compiled, first.get_device())


def _launch_of(compiled: Any, device: int) -> _Launch:
    """What launches a compiled kernel with the least between: its C function, where this version of
    Triton shows it and the kernel needs no scratch of Triton's; else Triton's own way."""
    from triton.runtime import driver

    launcher = compiled.run
    try:
        launch, cooperative = launcher.launch, launcher.launch_cooperative_grid
        programmatic = launcher.launch_pdl
        scratch_bytes = launcher.global_scratch_size + launcher.profile_scratch_size
        current_stream = driver.active.get_current_stream
    except AttributeError:
        scratch_bytes = 1
    if scratch_bytes:
        return lambda grid, arguments: compiled[grid](*arguments)
    function, metadata = compiled.function, compiled.packed_metadata

    def direct(grid: Grid, arguments: Sequence[Any]) -> None:
        launch(
            *grid,
            current_stream(device),
            function,
            cooperative,
            programmatic,
            None,  # scratch of the kernel and of Triton's profiler
            None,
            metadata,
            None,  # launch metadata and hooks, which are the profiler's too
            None,
            None,
            *arguments,
        )

    return direct
