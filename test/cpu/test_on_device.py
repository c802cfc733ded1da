from __future__ import annotations

import numpy as np
import pytest
import torch

from sglang.srt.layers.on_device import on_device

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "values",
    [np.arange(5), np.ones((2, 3), np.float32)[:, :1], np.zeros((0, 4), np.int32)],
)
def test_shape_dtype_and_values_stay(values):
    tensor = on_device(values, CPU)
    assert tensor.numpy().dtype == values.dtype
    np.testing.assert_array_equal(tensor.numpy(), values)


def test_a_cpu_needs_no_copy():
    values = np.arange(3)
    on_device(values, CPU)[0] = 7
    assert values[0] == 7
