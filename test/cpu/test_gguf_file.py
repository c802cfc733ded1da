"""GgufFile against the gguf package's own writer and reader."""

from __future__ import annotations

import gguf
import numpy as np
import pytest

from sglang.srt.errors import ConfigError
from sglang.srt.gguf_file import GgufFile


def write(path, add):
    writer = gguf.GGUFWriter(path, "llama")
    add(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_values_of_every_type_and_lists_between_them(tmp_path):
    def add(writer):
        writer.add_uint8("u8", 200)
        writer.add_array("words", ["a", "", "Grüße"])
        writer.add_int8("i8", -3)
        writer.add_uint16("u16", 65000)
        writer.add_array("numbers", [1, 2, 3])
        writer.add_int16("i16", -3000)
        writer.add_uint32("u32", 2**31 + 1)
        writer.add_int32("i32", -(2**31))
        writer.add_array("flags", [True, False])
        writer.add_uint64("u64", 2**60)
        writer.add_int64("i64", -(2**60))
        writer.add_float32("f32", 0.5)
        writer.add_float64("f64", 0.1)
        writer.add_bool("bool", True)
        writer.add_string("text", "世界")

    file = GgufFile(write(tmp_path / "a.gguf", add))
    assert file.metadata == {
        "general.architecture": "llama",
        "u8": 200,
        "i8": -3,
        "u16": 65000,
        "i16": -3000,
        "u32": 2**31 + 1,
        "i32": -(2**31),
        "u64": 2**60,
        "i64": -(2**60),
        "f32": 0.5,
        "f64": 0.1,
        "bool": True,
        "text": "世界",
    }
    with pytest.raises(ConfigError, match="no single value for the GGUF metadata key words"):
        file.require("words")


@pytest.mark.parametrize("alignment", [32, 64])
@pytest.mark.parametrize("block_type", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_1"])
def test_tensors_are_decoded_as_the_package_does(block_type, alignment, tmp_path):
    block_type = gguf.GGMLQuantizationType[block_type]
    rng = np.random.default_rng(0)
    originals = {"odd": rng.normal(size=(3, 32)), "even": rng.normal(size=(5, 2, 64))}

    def add(writer):
        writer.add_custom_alignment(alignment)
        for name, values in originals.items():
            blocks = gguf.quants.quantize(values.astype(np.float32), block_type)
            writer.add_tensor(name, blocks, raw_dtype=block_type)

    path = write(tmp_path / "a.gguf", add)
    file = GgufFile(path)
    assert list(file.tensors) == ["odd", "even"]
    for reference in gguf.GGUFReader(path).tensors:
        values = file.read(file.tensors[reference.name])
        expected = gguf.quants.dequantize(reference.data, reference.tensor_type)
        assert values.dtype == np.float32
        assert values.flags.writeable
        np.testing.assert_array_equal(values, expected)
        assert values.shape == originals[reference.name].shape
        assert np.abs(values - originals[reference.name]).max() < 0.5


def test_a_format_that_cannot_be_decoded(tmp_path):
    path = write(
        tmp_path / "a.gguf", lambda writer: writer.add_tensor("x", np.zeros(4, dtype=np.int32))
    )
    file = GgufFile(path)
    with pytest.raises(ConfigError, match="x cannot be decoded"):
        file.read(file.tensors["x"])
