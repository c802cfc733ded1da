"""FlashInferAttention: FlashInfer's prefill, our split-KV kernel for requests that decode.

FlashInfer compiles its kernels when they are first needed, which takes nvcc and one or two
minutes, and keeps them on disk.
"""

from __future__ import annotations

import importlib

import torch

from sgl_kernel.decode_attention import DecodeScratch
from sglang.srt.errors import ConfigError
from sglang.srt.layers.attention.base import KVPool
from sglang.srt.layers.attention.decode_rows import DecodeRows
from sglang.srt.layers.attention.flashinfer_module import HEAD_DIMS, load_fa3
from sglang.srt.layers.attention.flashinfer_prefill import (
    LanePrefill,
    Prefill,
    PrefillRequests,
    WrapperPrefill,
)
from sglang.srt.model_config import ModelConfig
from sglang.srt.model_executor.forward_batch import ForwardBatch

WORKSPACE_BYTES = 128 << 20
_DTYPES = (torch.bfloat16, torch.float16)


def is_installed() -> bool:
    """Whether FlashInfer can be imported here."""
    try:
        importlib.import_module("flashinfer.prefill")
    except ImportError:
        return False
    return True


class FlashInferAttention:
    """One lane's attention.

    workspace [WORKSPACE_BYTES] u8 may be shared by lanes that never run at the same time, such as
    the prefill lanes of different partitions; the two phases need one each. On Hopper it stays
    unused, since work lists belong to the plan that made them.
    """

    name = "flashinfer"

    def __init__(
        self, kv_pool: KVPool, config: ModelConfig, num_sms: int, workspace: torch.Tensor
    ) -> None:
        """Loads the kernels, which compiles them if this machine never did.

        Raises ConfigError if FlashInfer is absent or does not take the model's dtype.
        """
        if config.dtype not in _DTYPES:
            raise ConfigError(
                f"--attention-backend flashinfer takes bfloat16 and float16, not {config.dtype}"
            )
        if not is_installed():
            raise ConfigError(
                "--attention-backend flashinfer: pip install flashinfer-python, or take triton"
            )
        self._made_of = kv_pool, config, num_sms, workspace
        self._decode = DecodeRows(kv_pool, config, num_sms)
        self._prefill = _prefill(kv_pool, config, num_sms, workspace)
        self._has_decode = False
        self._has_prefill = False
        self._is_reserved = False
        self.planned: ForwardBatch | None = None

    def sibling(self) -> FlashInferAttention:
        """Another one for the same lane, for launches that run in turn with this one's."""
        return FlashInferAttention(*self._made_of)

    def reserve(
        self,
        max_tokens: int,
        max_prefill_reqs: int,
        *,
        decode: tuple[int, DecodeScratch] | None,
        slot_table: torch.Tensor,
    ) -> bool:
        """From now on launches of any planned batch within these bounds take the same arguments,
        so that one captured graph serves all; False, and nothing happens, if the kernels cannot.

        decode: most requests that decode in such a batch, and scratch for them; None for none.
        Every batch planned later must keep within the bounds.
        """
        if not isinstance(self._prefill, LanePrefill):
            return False
        self._prefill.reserve(max_tokens, max_prefill_reqs)
        if decode is not None:
            self._decode.reserve(*decode, slot_table)
        self._has_decode, self._has_prefill = decode is not None, True
        self._is_reserved = True
        return True

    def plan(self, batch: ForwardBatch) -> None:
        """See AttentionBackend.plan. Reads lengths on the host only."""
        first = batch.decode_reqs
        if not self._is_reserved:
            self._has_decode = first > 0
            self._has_prefill = batch.num_reqs > first
        if self._has_decode:
            self._decode.plan(batch)
        if self._has_prefill:
            self._prefill.plan(
                PrefillRequests(
                    rows=batch.rows[first:],
                    new_lens=batch.new_lens_host[first:],
                    seq_lens=batch.seq_lens_host[first:],
                    slot_table=batch.slot_table,
                    first_token=first,
                )
            )
        self.planned = batch

    def attend(
        self,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        batch: ForwardBatch,
    ) -> torch.Tensor:
        """See AttentionBackend.attend."""
        out = torch.empty_like(q)
        if self._has_decode:
            self._decode.attend(layer, q, out)
        if self._has_prefill:
            self._prefill.attend(layer, q, k, v, out)
        return out


def _prefill(
    kv_pool: KVPool, config: ModelConfig, num_sms: int, workspace: torch.Tensor
) -> Prefill:
    device = kv_pool.layer(0)[0].device
    if torch.cuda.get_device_capability(device) != (9, 0) or config.head_dim not in HEAD_DIMS:
        return WrapperPrefill(kv_pool, config, workspace, "fa2")
    module = load_fa3(config.dtype, config.head_dim, device)
    if module is None:
        return WrapperPrefill(kv_pool, config, workspace, "fa3")
    return LanePrefill(kv_pool, config, num_sms, module)
