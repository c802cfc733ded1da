"""Opens GGUF files: single metadata values and tensors.

The gguf package's own reader makes an array object of every vocabulary entry and merge rule, which
takes seconds a file, and a server opens its file several times. Nothing here needs those lists, so
they are skipped; decoding the quantised blocks is left to the package.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sglang.srt.errors import ConfigError

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_DEFAULT_ALIGNMENT = 32
_STRING, _ARRAY = 8, 9
# Value type -> struct code, all little-endian.
_SCALARS = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """shape is outermost dimension first, as in PyTorch; type_id names the block format."""

    name: str
    shape: tuple[int, ...]
    type_id: int
    offset_bytes: int


class GgufFile:
    """A memory-mapped file. metadata holds scalars and strings; lists are left out."""

    def __init__(self, path: Path) -> None:
        """Raises ConfigError if the file cannot be read or is not a complete GGUF header."""
        self.path = path
        try:
            with path.open("rb") as file:
                self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            header = _HeaderReader(self._bytes)
            num_tensors, num_values = header.counts()
            self.metadata = header.metadata(num_values)
            self.tensors = header.tensors(num_tensors)
            alignment = int(self.metadata.get("general.alignment", _DEFAULT_ALIGNMENT))
            self._data_start = -(-header.offset // alignment) * alignment
        except (OSError, ValueError, struct.error, ZeroDivisionError) as error:
            raise ConfigError(f"{path} cannot be read as a GGUF file: {error}") from error

    def require(self, key: str) -> Any:
        """The metadata value of `key`. Raises ConfigError if there is none, or a list."""
        if key not in self.metadata:
            raise ConfigError(f"{self.path} has no single value for the GGUF metadata key {key}")
        return self.metadata[key]

    def read(self, tensor: GgufTensor) -> npt.NDArray[np.float32]:
        """The dequantised tensor, a fresh array. Raises ConfigError if its format is unknown."""
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize, quant_shape_to_byte_shape

        try:
            block_type = GGMLQuantizationType(tensor.type_id)
            byte_shape = quant_shape_to_byte_shape(tensor.shape, block_type)
            blocks = np.frombuffer(
                self._bytes,
                dtype=np.uint8,
                count=int(np.prod(byte_shape)),
                offset=self._data_start + tensor.offset_bytes,
            )
            values = dequantize(blocks.reshape(byte_shape), block_type)
        except (NotImplementedError, ValueError) as error:
            raise ConfigError(f"{self.path}: {tensor.name} cannot be decoded: {error}") from error
        # Unquantised values are still a view of the read-only map.
        return values if values.flags.writeable else values.copy()


class _HeaderReader:
    """Reads values one after the other; offset is where the next one starts."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self.offset = 0

    def counts(self) -> tuple[int, int]:
        """(tensors, metadata values), after checking magic and version."""
        if self._data[:4] != _MAGIC:
            raise ValueError("it does not start with GGUF")
        self.offset = 4
        version = self._scalar("<I")
        if version not in _VERSIONS:
            raise ValueError(f"version {version} is not one of {_VERSIONS}")
        return self._scalar("<Q"), self._scalar("<Q")

    def metadata(self, count: int) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for _ in range(count):
            key = self._string()
            type_id = self._scalar("<I")
            if type_id == _ARRAY:
                self._skip_array()
            else:
                values[key] = self._value(type_id)
        return values

    def tensors(self, count: int) -> dict[str, GgufTensor]:
        tensors = {}
        for _ in range(count):
            name = self._string()
            num_dims = self._scalar("<I")
            innermost_first = [self._scalar("<Q") for _ in range(num_dims)]
            type_id, offset_bytes = self._scalar("<I"), self._scalar("<Q")
            tensors[name] = GgufTensor(name, tuple(innermost_first[::-1]), type_id, offset_bytes)
        return tensors

    def _scalar(self, code: str) -> Any:
        (value,) = struct.unpack_from(code, self._data, self.offset)
        self.offset += struct.calcsize(code)
        return value

    def _string(self) -> str:
        length = self._scalar("<Q")
        end = self.offset + length
        if end > len(self._data):
            raise ValueError("the file ends within a string")
        text = self._data[self.offset : end].decode("utf-8")
        self.offset = end
        return text

    def _value(self, type_id: int) -> Any:
        if type_id == _STRING:
            return self._string()
        if type_id not in _SCALARS:
            raise ValueError(f"unknown metadata type {type_id}")
        return self._scalar(_SCALARS[type_id])

    def _skip_array(self) -> None:
        item_type, count = self._scalar("<I"), self._scalar("<Q")
        if item_type in _SCALARS:
            self.offset += count * struct.calcsize(_SCALARS[item_type])
        elif item_type == _STRING:
            for _ in range(count):
                length = self._scalar("<Q")
                self.offset += length
        else:
            raise ValueError(f"unknown list of metadata type {item_type}")
