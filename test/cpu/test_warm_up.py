from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from drift_scheduler.lane import Phase
from drift_scheduler.lane_cpu import CpuLanes
from sglang.srt.layers.linear import Linear
from sglang.srt.model_executor import warm_up
from sglang.srt.model_executor.warm_up import load_products, load_sampling
from sglang.srt.models.base import HiddenState, LayerLinears


class CountingLinear(Linear):
    """Notes the rows of what it multiplies."""

    def __call__(self, x):
        rows_seen.setdefault(self.weight.shape, []).append(len(x))
        return super().__call__(x)


rows_seen: dict[torch.Size, list[int]] = {}


class Model:
    def __init__(self):
        self.linears = tuple(
            CountingLinear(torch.zeros(shape), None) for shape in ((6, 4), (4, 4), (4, 8))
        )
        self.logits_rows = []

    def layer_linears(self):
        return LayerLinears(self.linears, gate_ups=())

    def embed(self, ids):
        return HiddenState(torch.zeros(len(ids), 4), None)

    def logits(self, state, tokens):
        assert state.residual is None and tokens is None
        self.logits_rows.append(len(state.hidden))


@pytest.fixture
def lane():
    lanes = CpuLanes()
    yield lanes.lane(Phase.PREFILL, lanes.table.whole)
    lanes.close()


@pytest.mark.parametrize(
    ("max_tokens", "expected"),
    [
        (82, [82, 80, 79, 72, 71, *range(64, 0, -1)]),
        (80, [80, 79, 72, 71, *range(64, 0, -1)]),
        (64, [*range(64, 0, -1)]),
        (60, [*range(60, 0, -1)]),
        (1, [1]),
    ],
)
def test_products_of_all_kinds_of_sizes_run_once_the_largest_first(lane, max_tokens, expected):
    rows_seen.clear()
    model = Model()
    load_products(model, lane, max_tokens=max_tokens, max_reqs=3)
    assert rows_seen == {linear.weight.shape: expected for linear in model.linears}
    assert model.logits_rows == [3, 2, 1]


@pytest.mark.parametrize(("vocab_size", "max_reqs"), [(100, 3), (5000, 64)])
def test_random_tokens_are_drawn_from_all_numbers_of_rows(lane, monkeypatch, vocab_size, max_reqs):
    seen = []

    def sample(logits, positions, batch):
        (part,) = batch.parts
        seen.append((len(logits), part.cut_width))
        return draw(logits, positions, batch)

    draw = warm_up.sample
    monkeypatch.setattr(warm_up, "sample", sample)
    config = SimpleNamespace(vocab_size=vocab_size, dtype=torch.float32)
    load_sampling(config, lane, torch.device("cpu"), max_reqs=max_reqs)
    rows = [count for count in (1, 2, 4, 8, 16, 32) if count <= max_reqs]
    widths = [k for k in (2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048) if k < vocab_size]
    assert seen == [(count, width) for count in rows for width in (*widths, vocab_size)]
