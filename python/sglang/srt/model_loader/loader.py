"""load_model: builds a model and fills it from whatever its source holds."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator

import torch

from sglang.srt.model_config import ModelConfig
from sglang.srt.model_loader.gguf_weights import iterate_gguf
from sglang.srt.model_loader.safetensors_weights import iterate_safetensors
from sglang.srt.model_source import ModelSource
from sglang.srt.models import build_model
from sglang.srt.models.decoder import Decoder

logger = logging.getLogger(__name__)

_DUMMY_STD = 0.02


def load_model(
    source: ModelSource, config: ModelConfig, device: torch.device | str, *, seed: int = 0
) -> Decoder:
    """A CausalLM on `device` with the weights of `source`.

    seed: decides the random weights of the "dummy" format; equal seeds give equal weights on one
    kind of device. Raises ConfigError if the weights are absent or do not fit the config.
    """
    start_s = time.perf_counter()
    model = build_model(config, device)
    fill_model(model, source, config, seed=seed)
    weight_bytes = sum(tensor.nbytes for tensor in model.named_parameters().values())
    logger.info(
        "Loaded %s as %s: %.2f GB of %s weights on %s in %.1f s",
        source.name,
        config.architecture,
        weight_bytes / 1e9,
        str(config.dtype).removeprefix("torch."),
        model.device,
        time.perf_counter() - start_s,
    )
    return model


def fill_model(model: Decoder, source: ModelSource, config: ModelConfig, *, seed: int = 0) -> None:
    """Writes the weights of `source` to a model's parameters. Raises ConfigError as load_model."""
    if source.weight_format == "dummy":
        _fill_randomly(model, seed)
    else:
        model.load_weights(read_weights(source, config))


def read_weights(source: ModelSource, config: ModelConfig) -> Iterator[tuple[str, torch.Tensor]]:
    """(Hugging Face name, CPU tensor) one at a time. Raises ConfigError."""
    if source.gguf_file is not None:
        return iterate_gguf(source.gguf_file, config)
    return iterate_safetensors(source.folder)


def _fill_randomly(model: Decoder, seed: int) -> None:
    generator = torch.Generator(device=model.device).manual_seed(seed)
    for name, parameter in model.named_parameters().items():
        if "norm" in name:
            parameter.fill_(1.0)
        else:
            parameter.normal_(0.0, _DUMMY_STD, generator=generator)
