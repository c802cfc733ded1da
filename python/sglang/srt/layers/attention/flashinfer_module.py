"""FlashInfer's SM90 prefill kernels without its wrappers.

The wrappers' run() spends about 100 us a layer on the host and fills the result with zeros first;
their plan() does not know of lanes. What is called here lies one step below: functions of
FlashInfer 0.6 that it does not promise to keep. So load_fa3() looks at their parameters, tries
them on a small batch against plain torch, and says no if anything differs.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from sglang.srt.layers.attention.flashinfer_plan import (
    Heads,
    PackedWork,
    PrefillShape,
    deal,
    pack,
)

logger = logging.getLogger(__name__)

HEAD_DIMS = (64, 128, 256)
_VERSIONS = "0.6."
_TOLERANCE = 2e-2

# New and cached tokens of the requests that the kernels are tried on, more than one tile included.
_TRIAL_RAGGED = ((200, 200), (3, 3))
_TRIAL_PAGED = ((130, 333), (1, 40))

# int codes of flashinfer.utils.MaskMode.CAUSAL and TensorLayout.NHD.
_CAUSAL = 1
_NHD = 0

_WORK_ARGUMENTS = {
    "float_workspace_buffer",
    "int_workspace_buffer",
    "plan_info_vec",
    "q",
    "qo_indptr",
    "o",
}
_RAGGED_ARGUMENTS = {"k", "v", "kv_indptr"}
_PAGED_ARGUMENTS = {
    "paged_k_cache",
    "paged_v_cache",
    "paged_kv_indptr",
    "paged_kv_indices",
    "paged_kv_last_page_len",
}

Run = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class DeviceWork:
    """Work lists on the device. ints [n] i32: see PackedWork; info: the kernel's plan."""

    ints: torch.Tensor
    info: list[int]


def upload(packed: PackedWork, target: torch.Tensor | torch.device) -> DeviceWork:
    """One asynchronous copy on the current stream, to a new tensor or into the one given. The
    pinned memory is the copy's own: a later plan cannot overwrite it before the copy has run."""
    pinned = torch.empty(len(packed.ints), dtype=torch.int32, pin_memory=True)
    pinned.numpy()[:] = packed.ints
    if isinstance(target, torch.device):
        return DeviceWork(pinned.to(target, non_blocking=True), packed.info)
    return DeviceWork(target.copy_(pinned, non_blocking=True), packed.info)


def tile_rows(head_dim: int) -> int:
    """New tokens that a CTA takes at a time; the kernels and their plan must agree on it."""
    return 192 if head_dim == 64 else 128


class Fa3Module:
    """The two SM90 prefill kernels for one dtype and head size. Causal, no window, no scales.

    q, out [tokens, q_heads, head_dim] contiguous. Rows of out that no tile covers stay as they
    are. Neither call synchronises.
    """

    def __init__(self, ragged_run: Run, paged_run: Run, head_dim: int) -> None:
        """Raises TypeError if the functions do not take the arguments that they will get."""
        common: dict[str, Any] = {
            "maybe_lse": None,
            "mask_mode": _CAUSAL,
            "layout": _NHD,
            "window_left": -1,
            "enable_pdl": False,
            "maybe_custom_mask": None,
            "maybe_mask_indptr": None,
            "maybe_alibi_slopes": None,
            "maybe_prefix_len_ptr": None,
            "maybe_token_pos_in_items_ptr": None,
            "maybe_max_item_len_ptr": None,
            "logits_soft_cap": 0.0,
            "sm_scale": head_dim**-0.5,
            "scale_q": None,
            "scale_k": None,
            "scale_v": None,
            "rope_scale": 1.0,
            "rope_theta": 1e4,
            "token_pos_in_items_len": 0,
        }
        of_paged = {**common, "workspace_size": 0}
        _check_takes(ragged_run, _WORK_ARGUMENTS | _RAGGED_ARGUMENTS | common.keys())
        _check_takes(paged_run, _WORK_ARGUMENTS | _PAGED_ARGUMENTS | of_paged.keys())
        self._ragged_run = functools.partial(ragged_run, **common)
        self._paged_run = functools.partial(paged_run, **of_paged)

    def ragged(
        self,
        work: DeviceWork,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        """k, v [tokens, kv_heads, head_dim], strided over tokens and heads by multiples of 16
        bytes; work.kv_starts are rows of them."""
        ints = work.ints
        # Where the SM90 kernels look at none but the work lists, they get those for all.
        self._ragged_run(
            float_workspace_buffer=ints,
            int_workspace_buffer=ints,
            plan_info_vec=work.info,
            q=q,
            k=k,
            v=v,
            qo_indptr=ints,
            kv_indptr=ints,
            o=out,
        )

    def paged(
        self,
        work: DeviceWork,
        q: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        slots: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        """keys, values [slots, kv_heads, head_dim], of equal strides. slots [n] i32; work.kv_starts
        are places in it, from where a request's slots follow one another."""
        ints = work.ints
        self._paged_run(
            float_workspace_buffer=ints,
            int_workspace_buffer=ints,
            plan_info_vec=work.info,
            q=q,
            paged_k_cache=keys.unsqueeze(1),
            paged_v_cache=values.unsqueeze(1),
            qo_indptr=ints,
            paged_kv_indptr=ints,
            paged_kv_indices=slots,
            paged_kv_last_page_len=ints,
            o=out,
        )


@functools.cache
def load_fa3(dtype: torch.dtype, head_dim: int, device: torch.device) -> Fa3Module | None:
    """The kernels, compiled if this machine never did; None, and a line in the log, if this
    FlashInfer is not one that we know how to call. The device must be an SM90 GPU.

    Raises what FlashInfer raises if they do not compile.
    """
    flashinfer = importlib.import_module("flashinfer")
    try:
        return _load(str(flashinfer.__version__), dtype, head_dim, device)
    except _UnknownFlashInfer as reason:
        logger.warning(
            "FlashInfer %s: prefill goes through its public wrapper, more slowly on lanes (%s)",
            flashinfer.__version__,
            reason,
        )
        return None


class _UnknownFlashInfer(Exception):
    """Its functions are not the ones that we know."""


def _load(version: str, dtype: torch.dtype, head_dim: int, device: torch.device) -> Fa3Module:
    if not version.startswith(_VERSIONS):
        raise _UnknownFlashInfer(f"known are {_VERSIONS}*")
    logger.info("Loading FlashInfer's SM90 kernels; their first compilation takes two minutes")
    try:
        functions: Any = importlib.import_module("flashinfer.prefill").get_batch_prefill_module(
            "fa3",
            dtype,
            dtype,
            dtype,
            torch.int32,
            head_dim,
            head_dim,
            0,  # no position encoding
            False,  # no sliding window
            False,  # no cap on logits
            False,  # sums in f32
        )
        module = Fa3Module(functions.ragged_run, functions.paged_run, head_dim)
    except (AttributeError, TypeError) as problem:
        raise _UnknownFlashInfer(repr(problem)) from problem
    try:
        error = _trial_error(module, dtype, head_dim, device)
    except (TypeError, ValueError, RuntimeError) as problem:
        raise _UnknownFlashInfer(repr(problem)) from problem
    if not error < _TOLERANCE:
        raise _UnknownFlashInfer(f"a trial differs from torch by {error:.1e}")
    return module


def _check_takes(run: Run, names: set[str]) -> None:
    """Raises TypeError unless `run` may be called with these arguments and no others."""
    inspect.signature(run).bind(**dict.fromkeys(names))


def _trial_error(
    module: Fa3Module, dtype: torch.dtype, head_dim: int, device: torch.device
) -> float:
    """Largest relative error of both kernels on a small batch; nan counts as an error."""
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    errors = []
    for lengths in (_TRIAL_RAGGED, _TRIAL_PAGED):
        paged = lengths is _TRIAL_PAGED
        new_lens = [new for new, _ in lengths]
        seq_lens = [seq for _, seq in lengths]
        kv_starts = [sum(seq_lens[:i]) for i in range(len(lengths))]
        work = deal(
            PrefillShape(new_lens, seq_lens, kv_starts),
            Heads(num_heads=4, num_kv_heads=2, kv_bytes=4 * head_dim),
            tile_rows=tile_rows(head_dim),
            num_sms=3,  # fewer than there are items, so that a CTA goes through several
            num_ctas=torch.cuda.get_device_properties(device).multi_processor_count,
        )
        on_device = upload(pack(work), device)
        q = random(sum(new_lens), 4, head_dim)
        out = torch.full_like(q, torch.nan)
        if paged:
            keys, values = random(600, 2, head_dim), random(600, 2, head_dim)
            slots = torch.randperm(600, generator=generator, device=device).to(torch.int32)
            module.paged(on_device, q, keys, values, slots, out)
            keys, values = keys[slots.long()], values[slots.long()]
        else:
            fused = random(sum(seq_lens), 8, head_dim)  # as a fused projection leaves them
            keys, values = fused[:, 4:6], fused[:, 6:]
            module.ragged(on_device, q, keys, values, out)
        expected = torch.cat(
            [
                _causal(queries, keys[start : start + seq], values[start : start + seq])
                for queries, start, seq in zip(q.split(new_lens), kv_starts, seq_lens, strict=True)
            ]
        )
        errors.append(float((out.float() - expected).norm() / expected.norm()))
    return float(np.max(errors))  # keeps nan, which max() may lose


def _causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """q [new, heads, dim] at the end of k, v [seq, kv_heads, dim]; float32."""
    group = q.shape[1] // k.shape[1]
    keys, values = (x.float().repeat_interleave(group, dim=1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q.float(), keys) * q.shape[2] ** -0.5
    later = torch.ones(len(q), len(k), device=q.device).triu(len(k) - len(q) + 1).bool()
    weights = scores.masked_fill(later, -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, values)
