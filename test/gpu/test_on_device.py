from __future__ import annotations

import numpy as np
import torch

from sglang.srt.layers.on_device import on_device


def test_the_device_gets_what_the_array_was_at_the_call(device):
    values = np.arange(100_000).reshape(100, 1000)[:, ::2]
    tensor = on_device(values, device)
    expected = values.copy()
    values[:] = -1
    assert tensor.dtype == torch.int64
    np.testing.assert_array_equal(tensor.cpu().numpy(), expected)
