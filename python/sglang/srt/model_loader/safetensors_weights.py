"""Weights of a folder of safetensors files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch

from sglang.srt.errors import ConfigError


def iterate_safetensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields (name, CPU tensor) one at a time; files are memory-mapped, not read ahead.

    Raises ConfigError if a file is absent or broken.
    """
    from safetensors import SafetensorError, safe_open

    for path in _weight_files(folder):
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                for name in file.keys():  # noqa: SIM118 - not a dict, cannot be iterated
                    yield name, file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ConfigError(f"{path} cannot be read: {error}") from error


def _weight_files(folder: Path) -> list[Path]:
    index_file = folder / "model.safetensors.index.json"
    if index_file.is_file():
        try:
            names = set(json.loads(index_file.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, AttributeError) as error:
            raise ConfigError(f"{index_file} is not a valid index: {error!r}") from error
        absent = sorted(name for name in names if not (folder / name).is_file())
        if absent:
            raise ConfigError(
                f"{folder} lacks weight files that its index names: {', '.join(absent)}"
            )
        return [folder / name for name in sorted(names)]
    single = folder / "model.safetensors"
    if single.is_file():
        return [single]
    # Mistral's folders repeat all weights under other parameter names in consolidated*.safetensors.
    files = sorted(
        path for path in folder.glob("*.safetensors") if not path.name.startswith("consolidated")
    )
    if not files:
        raise ConfigError(f"{folder} holds no safetensors weights")
    return files
