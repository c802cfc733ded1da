"""Models by architecture."""

from __future__ import annotations

import torch

from sglang.srt.architectures import check_supported
from sglang.srt.model_config import ModelConfig
from sglang.srt.models.decoder import Decoder

__all__ = ["build_model"]


def build_model(config: ModelConfig, device: torch.device | str) -> Decoder:
    """A CausalLM with uninitialised weights. Raises ConfigError if there is no such model."""
    check_supported(config.architecture)
    return Decoder(config, device)
