"""Which kernel a lane takes: lookup, tuning by scripted measurements, and tables on disk."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from drift_scheduler.lane import Phase
from drift_scheduler.lane_cpu import CpuLanes
from sgl_kernel.tile import Tile
from sglang.srt.cache_folder import default_folder
from sglang.srt.layers.linear import Linear
from sglang.srt.layers.matmul import lane_matmul
from sglang.srt.layers.matmul.base import TorchMatmul
from sglang.srt.layers.matmul.cache import TableCache
from sglang.srt.layers.matmul.choice import TORCH, Backend, Choice, deep_gemm_piece
from sglang.srt.layers.matmul.lane_matmul import LaneMatmul
from sglang.srt.layers.matmul.product_bench import Case
from sglang.srt.layers.matmul.table import LaneTable, Shape, measured_tokens, rung
from sglang.srt.layers.matmul.tiles import best_split, tiles_for
from sglang.srt.layers.matmul.tune_lanes import tables_of, tune_lanes
from sglang.srt.layers.matmul.tuner import Tuner, cases

TILE = Tile(128, 256, 64, 4, 8, store_parts=2)
TRITON = Choice(Backend.TRITON, TILE)
DEEP_GEMM = Choice(Backend.DEEP_GEMM)
SHAPE = Shape(64, 32)
ALL = frozenset(Backend)


@pytest.mark.parametrize(
    ("m", "expected"),
    [(1, 16), (16, 16), (17, 64), (65, 256), (257, 256), (1023, 256), (1024, 1024), (5000, 1024)],
)
def test_few_tokens_take_the_rung_that_holds_them_and_many_the_one_below(
    m: int, expected: int
) -> None:
    ladder = (16, 64, 256, 1024)
    assert ladder[rung(ladder, m)] == expected


def test_the_top_rung_serves_what_is_above_it() -> None:
    assert rung((16, 32), 200) == 1
    assert rung((512, 1024), 300) == 0


def test_measured_tokens_cover_the_limit() -> None:
    assert measured_tokens(Phase.DECODE, 1) == (16,)
    assert measured_tokens(Phase.DECODE, 40) == (16, 32, 64)
    assert measured_tokens(Phase.PREFILL, 8192)[-1] == 8192
    assert measured_tokens(Phase.PREFILL, 2048)[-1] == 2048


class Recorder:
    """Stands in for product_of: computes with torch and notes (choice, rows)."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[Choice, int]] = []
        monkeypatch.setattr(lane_matmul, "product_of", self.product_of)

    def product_of(self, choice: Choice, num_sms: int, *, fused: bool = False) -> Any:
        def product(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
            self.calls.append((choice, x.shape[0]))
            result = x @ weight.t()
            gate, up = result.chunk(2, dim=-1)
            out.copy_(torch.nn.functional.silu(gate) * up if fused else result)

        return product


def lane(products: dict[int, Choice], fused: dict[int, Choice | None] | None = None) -> LaneMatmul:
    table = LaneTable({SHAPE: products}, {SHAPE: fused} if fused else {})
    return LaneMatmul(16, table, torch.float32)


def linear(*, bias: bool = False) -> Linear:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(SHAPE, generator=generator)
    return Linear(weight, torch.randn(SHAPE.n, generator=generator) if bias else None)


def test_a_lane_computes_with_what_its_table_names(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(monkeypatch)
    matmul = lane({16: TRITON, 64: TORCH})
    for m in (0, 3, 60):
        x = torch.randn(m, SHAPE.k)
        for layer in (linear(), linear(bias=True)):
            torch.testing.assert_close(matmul(x, layer), layer(x))
    assert recorder.calls == [(TRITON, 3), (TRITON, 3)]


def test_pieces_have_their_compiled_size_and_the_rest_takes_a_lower_rung(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recorder = Recorder(monkeypatch)
    matmul = lane({64: TORCH, 1024: TRITON, 2048: DEEP_GEMM, 4096: DEEP_GEMM, 8192: DEEP_GEMM})
    layer = linear()
    x = torch.randn(8192 + 2048 + 1500, SHAPE.k)
    torch.testing.assert_close(matmul(x, layer), layer(x))
    assert recorder.calls == [
        (DEEP_GEMM, 4096),
        (DEEP_GEMM, 4096),
        (DEEP_GEMM, 2048),
        (TRITON, 1500),
    ]
    x = torch.randn(2050, SHAPE.k)
    torch.testing.assert_close(matmul(x, layer), layer(x))
    assert recorder.calls[4:] == [(DEEP_GEMM, 2048)]


def test_fewer_rows_than_the_smallest_piece_are_left_to_torch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recorder = Recorder(monkeypatch)
    matmul = lane({2048: DEEP_GEMM})
    layer = linear()
    for m in (300, 2048 + 300):
        x = torch.randn(m, SHAPE.k)
        torch.testing.assert_close(matmul(x, layer), layer(x))
    assert recorder.calls == [(DEEP_GEMM, 2048)]


def test_deep_gemm_never_runs_rows_that_it_did_not_compile() -> None:
    assert [deep_gemm_piece(m) for m in (1, 2047, 2048, 4095, 4096, 8192)] == [
        0,
        0,
        2048,
        2048,
        4096,
        4096,
    ]


def test_gate_and_up_are_fused_where_that_won(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(monkeypatch)
    matmul = lane({16: TORCH}, {16: TRITON, 64: None})
    plain = TorchMatmul()
    for m, layer in ((3, linear()), (40, linear()), (3, linear(bias=True))):
        x = torch.randn(m, SHAPE.k)
        torch.testing.assert_close(matmul.gate_up_silu(x, layer), plain.gate_up_silu(x, layer))
    assert recorder.calls == [(TRITON, 3)]


def test_what_was_not_tuned_is_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(monkeypatch)
    matmul = lane({16: TRITON})
    other = Linear(torch.randn(8, SHAPE.k), None)
    x = torch.randn(3, SHAPE.k)
    torch.testing.assert_close(matmul(x, other), other(x))
    double = Linear(linear().weight.double(), None)
    assert matmul(x.double(), double).dtype == torch.float64
    columns = torch.randn(SHAPE.k, 3).t()
    torch.testing.assert_close(matmul(columns, linear()), linear()(columns))
    assert recorder.calls == []


class ScriptedBench:
    """Seconds and errors by choice; what is not named takes a second and is exact."""

    def __init__(
        self,
        seconds: dict[Choice | tuple[Choice, bool], float],
        errors: dict[Choice, float] | None = None,
        broken: frozenset[Choice] = frozenset(),
    ) -> None:
        self._seconds = seconds
        self._errors = errors or {}
        self._broken = broken
        self.measured: list[tuple[Case, Choice]] = []

    def seconds(
        self, lane: Any, case: Case, choice: Choice, *, in_one: bool, replays: int
    ) -> float:
        self.measured.append((case, choice))
        if choice in self._broken:
            raise RuntimeError("out of resource: shared memory")
        return self._seconds.get((choice, in_one), self._seconds.get(choice, 1.0))

    def error(self, lane: Any, case: Case, choice: Choice, *, in_one: bool) -> float:
        return self._errors.get(choice, 0.0)


@pytest.fixture
def lanes():
    lanes = CpuLanes(0)
    yield lanes
    lanes.close()


def tune(lanes: CpuLanes, bench: ScriptedBench, allowed: Any = ALL, m: int = 4096) -> LaneTable:
    decode = lanes.lane(Phase.DECODE, lanes.table.whole)
    return Tuner(bench, allowed).tune(decode, [SHAPE], [SHAPE], [m])


def some_tiles(m: int, fused: bool = False) -> list[Choice]:
    return [Choice(Backend.TRITON, tile) for tile in tiles_for(m, *SHAPE, 2, fused=fused)]


def test_the_fastest_wins_and_torch_stays_within_three_percent(lanes: CpuLanes) -> None:
    fast = some_tiles(4096)[1]
    for seconds, expected in ((0.5, fast), (0.96, fast), (0.98, TORCH), (1.5, TORCH)):
        table = tune(lanes, ScriptedBench({fast: seconds}))
        assert table.products[SHAPE][4096] == expected


def test_a_fused_kernel_may_lose_little_to_the_best_two_steps(lanes: CpuLanes) -> None:
    """It moves less memory, which counts beside another lane and does not show alone."""
    tile = some_tiles(4096, fused=True)[0]
    for seconds, expected in ((0.5, tile), (0.61, tile), (0.63, None)):
        table = tune(lanes, ScriptedBench({DEEP_GEMM: 0.6, (tile, True): seconds}))
        assert table.products[SHAPE][4096] == DEEP_GEMM
        assert table.fused[SHAPE][4096] == expected


def test_a_wrong_or_broken_kernel_is_named_and_dropped(
    lanes: CpuLanes, caplog: pytest.LogCaptureFixture
) -> None:
    wrong, right, broken = some_tiles(4096)[:3]
    bench = ScriptedBench(
        {wrong: 0.2, right: 0.5, broken: 0.1},
        errors={wrong: float("nan")},
        broken=frozenset({broken}),
    )
    with caplog.at_level(logging.WARNING):
        table = tune(lanes, bench)
    assert table.products[SHAPE][4096] == right
    assert f"{wrong} drops out" in caplog.text and "relative error nan" in caplog.text
    assert f"{broken} drops out" in caplog.text and "shared memory" in caplog.text


def test_a_broken_torch_is_not_hidden(lanes: CpuLanes) -> None:
    with pytest.raises(RuntimeError, match="out of resource"):
        tune(lanes, ScriptedBench({}, broken=frozenset({TORCH})))


@pytest.mark.parametrize("allowed", [{Backend.TORCH}, {Backend.TRITON}, {Backend.DEEP_GEMM}])
def test_only_allowed_backends_are_measured(lanes: CpuLanes, allowed: set[Backend]) -> None:
    bench = ScriptedBench({})
    tune(lanes, bench, allowed)
    assert {choice.backend for _, choice in bench.measured} <= allowed | {Backend.TORCH}
    # DeepGEMM compiles for every number of rows: few tokens are not its business.
    small = ScriptedBench({})
    tune(lanes, small, allowed, m=64)
    assert DEEP_GEMM not in {choice for _, choice in small.measured}


def test_a_vocabulary_is_not_measured_with_many_rows() -> None:
    wide = Shape(128256, 4096)
    assert [case.m for case in cases([wide], [], [64, 2048, 8192])] == [64, 2048]


def test_splits_fill_the_sms_and_only_where_that_pays() -> None:
    tile = Tile(16, 128, 128, 5, 4, weight_first=True)
    assert best_split(tile, 16, 4096, 4096, 32) == 1  # 32 tiles on 32 SMs
    assert best_split(tile, 16, 4096, 14336, 48) == 3  # 96 pieces: two whole waves
    assert best_split(tile, 16, 4096, 1024, 132) == 1  # parts would be too short
    for m in (1, 64, 100, 300, 4096):
        for tile in tiles_for(m, 4096, 14336, 48, fused=False, rare=True):
            parts = 4 if tile.split_k > 1 else 2
            result = parts * tile.block_m * tile.block_n // tile.store_parts
            stages = 2 * tile.stages * (tile.block_m + tile.block_n) * tile.block_k
            assert result + stages <= 227 << 10, tile


def test_tables_survive_the_disk(tmp_path: Path) -> None:
    table = LaneTable(
        {SHAPE: {16: TRITON, 64: TORCH, 4096: DEEP_GEMM}}, {SHAPE: {16: None, 64: TRITON}}
    )
    TableCache(tmp_path / "new", {"gpu": "H100"}).store({16: table, 116: table})
    assert TableCache(tmp_path / "new", {"gpu": "H100"}).load() == {16: table, 116: table}
    assert TableCache(tmp_path / "new", {"gpu": "H200"}).load() == {}
    assert len(list((tmp_path / "new").iterdir())) == 1


@pytest.mark.parametrize(
    "spoil",
    [
        lambda file: "{",
        lambda file: "[]",
        lambda file: json.dumps(file | {"key": {"gpu": "other"}}),
        lambda file: json.dumps(file | {"lanes": {"sixteen": {}}}),
        lambda file: json.dumps(file | {"lanes": {"16": {"products": [], "fused": None}}}),
        lambda file: json.dumps(file).replace('"torch"', '"cutlass"'),
        lambda file: json.dumps(file).replace('"block_m"', '"rows"'),
        lambda file: json.dumps(file).replace('"triton"', '"torch"'),
    ],
)
def test_a_broken_or_foreign_file_is_told_and_ignored(
    spoil: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = TableCache(tmp_path, {"gpu": "H100"})
    cache.store({16: LaneTable({SHAPE: {16: TRITON, 64: TORCH}}, {})})
    cache.path.write_text(spoil(json.loads(cache.path.read_text())))
    with caplog.at_level(logging.WARNING):
        assert cache.load() == {}
    assert "tuned anew" in caplog.text and str(cache.path) in caplog.text


def test_a_folder_that_cannot_be_written_is_no_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    with caplog.at_level(logging.WARNING):
        TableCache(tmp_path / "file", {}).store({})
    assert "not kept" in caplog.text


def test_the_default_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "sglang-drift"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_folder() == Path.home() / ".cache" / "sglang-drift"


def test_a_second_start_measures_nothing_and_a_third_only_what_is_new(
    lanes: CpuLanes, tmp_path: Path
) -> None:
    whole = lanes.lane(Phase.DECODE, lanes.table.whole)
    fast = some_tiles(64)[0]
    benches: list[ScriptedBench] = []

    def make_bench() -> ScriptedBench:
        benches.append(ScriptedBench({fast: 0.5}))
        return benches[-1]

    def start(tokens: dict[int, list[int]]) -> dict[int, LaneTable]:
        cache = TableCache(tmp_path, {"gpu": "H100"})
        lane_of = dict.fromkeys(tokens, whole)
        return tables_of(lane_of, [SHAPE], [], tokens, cache, make_bench, ALL)

    first = start({16: [64, 256]})
    assert first[16].products[SHAPE][64] == fast
    assert start({16: [64, 256]}) == first
    assert len(benches) == 1
    assert start({16: [64, 256], 116: [64]})[16] == first[16]
    assert {case.m for case, _ in benches[1].measured} == {64}
    start({16: [64, 256, 512]})
    assert len(benches) == 3


def test_without_a_gpu_every_lane_takes_torch(lanes: CpuLanes, tmp_path: Path) -> None:
    matmuls = tune_lanes(
        lanes,
        [linear()],
        max_prefill_tokens=2048,
        max_decode_reqs=64,
        dtype=torch.float32,
        device=torch.device("cpu"),
        allowed=ALL,
        cache_folder=tmp_path,
    )
    assert set(matmuls) == {(Phase.PREFILL, 0), (Phase.DECODE, 0)}
    assert all(isinstance(matmul, TorchMatmul) for matmul in matmuls.values())
    assert not list(tmp_path.iterdir())
