"""FlashInferAttention: FlashInfer's paged prefill, our split-KV kernel for single tokens.

FlashInfer plans on the host once a batch and then runs every layer. It compiles its kernels on
first use, which takes nvcc and one or two minutes, and keeps them on disk.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch

from sgl_kernel.kv_store import store_kv
from sglang.srt.errors import ConfigError
from sglang.srt.layers.attention.base import KVPool
from sglang.srt.layers.attention.triton_backend import TritonAttention
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
    the prefill lanes of different partitions; the two phases need one each.
    """

    name = "flashinfer"

    def __init__(
        self, kv_pool: KVPool, config: ModelConfig, num_sms: int, workspace: torch.Tensor
    ) -> None:
        """Raises ConfigError if FlashInfer is absent or does not take the model's dtype."""
        if config.dtype not in _DTYPES:
            raise ConfigError(
                f"--attention-backend flashinfer takes bfloat16 and float16, not {config.dtype}"
            )
        if not is_installed():
            raise ConfigError(
                "--attention-backend flashinfer: pip install flashinfer-python, or take triton"
            )
        from flashinfer.prefill import BatchPrefillWithPagedKVCacheWrapper

        keys, _ = kv_pool.layer(0)
        on_hopper = torch.cuda.get_device_capability(keys.device) == (9, 0)
        self._wrapper: Any = BatchPrefillWithPagedKVCacheWrapper(
            workspace, "NHD", backend="fa3" if on_hopper else "fa2"
        )
        self._kv_pool = kv_pool
        self._config = config
        self._single_tokens = TritonAttention(kv_pool, config, num_sms)
        self._all_single = False

    def plan(self, batch: ForwardBatch) -> None:
        """See AttentionBackend.plan. Reads lengths on the host only."""
        self._all_single = max(batch.new_lens_host, default=0) <= 1
        if self._all_single:
            self._single_tokens.plan(batch)
            return
        config = self._config
        lengths = batch.seq_lens_host
        table = batch.slot_table.index_select(0, batch.rows)
        slots = torch.cat([table[i, :length] for i, length in enumerate(lengths)])
        self._wrapper.plan(
            _starts(batch.new_lens_host),
            _starts(lengths),
            slots,
            torch.ones(len(lengths), dtype=torch.int32),
            config.num_heads,
            config.num_kv_heads,
            config.head_dim,
            1,
            causal=True,
            q_data_type=config.dtype,
            kv_data_type=config.dtype,
            non_blocking=True,
        )

    def attend(
        self,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        batch: ForwardBatch,
    ) -> torch.Tensor:
        """See AttentionBackend.attend."""
        if self._all_single:
            return self._single_tokens.attend(layer, q, k, v, batch)
        keys, values = self._kv_pool.layer(layer)
        store_kv(k, v, keys, values, batch.token_slots)
        out: torch.Tensor = self._wrapper.run(
            q.contiguous(), (keys.unsqueeze(1), values.unsqueeze(1))
        )
        return out


def _starts(lengths: list[int]) -> torch.Tensor:
    """Prefix sums [n + 1] i32 on the host, pinned so that their copy does not wait."""
    sums = torch.zeros(len(lengths) + 1, dtype=torch.int32, pin_memory=True)
    sums[1:] = torch.tensor(lengths).cumsum(0)
    return sums
