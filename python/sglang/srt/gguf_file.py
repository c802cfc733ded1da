"""Opens GGUF files through the gguf package, with errors that name the file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from sglang.srt.errors import ConfigError

if TYPE_CHECKING:
    from gguf import GGUFReader, ReaderTensor


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """shape is outermost dimension first, as in PyTorch."""

    name: str
    shape: tuple[int, ...]
    encoded: ReaderTensor


class GgufFile:
    """A memory-mapped file. metadata holds single values; lists (the vocabulary) are left out."""

    def __init__(self, path: Path) -> None:
        """Raises ConfigError if the file cannot be read or is not a complete GGUF header."""
        reader = _open(path)
        self.path = path
        self.metadata: dict[str, Any] = {
            key: field.contents()
            for key, field in reader.fields.items()
            if not key.startswith("GGUF.") and len(field.types) == 1
        }
        self.tensors = {
            tensor.name: GgufTensor(tensor.name, tuple(tensor.shape.tolist()[::-1]), tensor)
            for tensor in reader.tensors
        }

    def require(self, key: str) -> Any:
        """The metadata value of `key`. Raises ConfigError if there is none, or a list."""
        if key not in self.metadata:
            raise ConfigError(f"{self.path} has no single value for the GGUF metadata key {key}")
        return self.metadata[key]

    def read(self, tensor: GgufTensor) -> npt.NDArray[np.float32]:
        """The dequantised tensor, a fresh array. Raises ConfigError if its format is unknown."""
        from gguf.quants import dequantize

        try:
            values = dequantize(tensor.encoded.data, tensor.encoded.tensor_type)
        except (NotImplementedError, ValueError) as error:
            raise ConfigError(f"{self.path}: {tensor.name} cannot be decoded: {error}") from error
        # Unquantised values are still a view of the read-only map.
        return np.array(values, dtype=np.float32, copy=None if values.flags.writeable else True)


def _open(path: Path) -> GGUFReader:
    from gguf import GGUFReader

    class PlainReader(GGUFReader):
        """Sees the mapped file as a plain array: of the class that numpy.memmap makes of each of
        a vocabulary's hundred thousand slices, a reader takes three times as long."""

        @property  # type: ignore[override]
        def data(self) -> npt.NDArray[np.uint8]:
            return self._plain

        @data.setter
        def data(self, mapped: npt.NDArray[np.uint8]) -> None:
            self._plain = mapped.view(np.ndarray)

    try:
        return PlainReader(path)
    # A damaged header surfaces as whatever numpy or the package trips over.
    except Exception as error:
        raise ConfigError(f"{path} cannot be read as a GGUF file: {error}") from error
