"""bench_one_batch: floors against numbers worked out by hand, batches, streams, and a real run."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from drift_scheduler.lane import Phase
from drift_scheduler.lane_virtual import TimedWork, VirtualClock, VirtualLanes
from drift_scheduler.partition import Partition, PartitionTable
from sglang import bench_one_batch
from sglang.srt.benchmarks.environment import recorded_flags
from sglang.srt.benchmarks.one_batch import session
from sglang.srt.benchmarks.one_batch.batches import Placement
from sglang.srt.benchmarks.one_batch.cases import (
    DEFAULT_DECODE,
    DEFAULT_PREFILL,
    DecodeCase,
    GenerationCase,
    PrefillCase,
    pool_tokens,
)
from sglang.srt.benchmarks.one_batch.floors import (
    Rates,
    decode_work,
    layer_parameters,
    prefill_work,
    rates,
    weight_bytes,
)
from sglang.srt.benchmarks.one_batch.machine import MachineProbe, ProbeSizes
from sglang.srt.benchmarks.one_batch.measure import Bench, Repetitions
from sglang.srt.benchmarks.one_batch.options import Split, parse_options
from sglang.srt.benchmarks.one_batch.report import limits_line, table
from sglang.srt.benchmarks.one_batch.session import run
from sglang.srt.errors import ConfigError
from sglang.srt.model_config import ModelConfig, resolve_model_source
from sglang.srt.profiling.nvml import GpuState, GpuWatch

ROOT = Path(__file__).parents[2]
num_cores = len(os.sched_getaffinity(0))
needs_two_cores = pytest.mark.skipif(num_cores < 2, reason="needs two cores to split")
SMALL_PROBE = ProbeSizes(copy_bytes=1 << 16, copy_buffers=2, matrix_side=32, repetitions=2)


@pytest.fixture(scope="module")
def llama_8b() -> ModelConfig:
    source = resolve_model_source(
        str(ROOT / "benchmark" / "models" / "llama-3.1-8b"), load_format="dummy"
    )
    return ModelConfig.load(source, dtype="bfloat16")


class TestFloors:
    """Llama-3.1-8B: 32 layers, 32 query and 8 KV heads of 128, 4,096 wide, 14,336 in the MLP."""

    h100 = Rates(copy_bytes=3e12, matrix_flops=765e12, attention_flops=500e12)

    def test_weights(self, llama_8b):
        # A layer: 2 x (32 + 8) x 128 x 4096 + 3 x 14336 x 4096; LM head: 128256 x 4096.
        assert layer_parameters(llama_8b) == 32 * 218_103_808 == 6_979_321_856
        assert weight_bytes(llama_8b) == 2 * (6_979_321_856 + 525_336_576)

    def test_tied_embeddings_are_the_lm_head(self, llama_8b):
        tied = dataclasses.replace(llama_8b, tie_word_embeddings=True)
        assert layer_parameters(tied) == layer_parameters(llama_8b)
        assert weight_bytes(tied) == weight_bytes(llama_8b)

    def test_decode_reads_weights_and_cache(self, llama_8b):
        work = decode_work(llama_8b, DecodeCase(48, 8800))
        assert work.moved_bytes == 15_009_316_864 + 48 * 8800 * 131_072
        assert work.floor_s(self.h100) * 1e3 == pytest.approx(23.458, abs=1e-3)

    def test_decode_of_one_is_bound_by_the_weights(self, llama_8b):
        work = decode_work(llama_8b, DecodeCase(1, 1024))
        assert work.floor_s(self.h100) * 1e3 == pytest.approx(5.048, abs=1e-3)

    def test_prefill_of_a_long_prompt(self, llama_8b):
        work = prefill_work(llama_8b, PrefillCase(8192))
        # 114,350 GFLOP in matrices, 8192 x 8193 / 2 pairs x 4 x 32 x 32 x 128 in attention.
        assert work.matrix_flops == 2 * (8192 * 6_979_321_856 + 525_336_576)
        assert work.attention_flops == 33_558_528 * 524_288
        assert work.floor_s(self.h100) * 1e3 == pytest.approx(149.477 + 35.189, abs=2e-3)

    def test_prefill_behind_a_cached_prefix(self, llama_8b):
        work = prefill_work(llama_8b, PrefillCase(2048, 32768))
        assert work.attention_flops == (2048 * 32768 + 2048 * 2049 // 2) * 524_288
        assert work.floor_s(self.h100) * 1e3 == pytest.approx(37.370 + 72.569, abs=2e-3)

    def test_requests_do_not_see_each_other(self, llama_8b):
        one = prefill_work(llama_8b, PrefillCase(512, 1024))
        four = prefill_work(llama_8b, PrefillCase(512, 1024, requests=4))
        assert four.attention_flops == 4 * one.attention_flops
        assert four.matrix_flops == 4 * one.matrix_flops
        assert four.moved_bytes == one.moved_bytes + 3 * 1536 * 131_072

    def test_a_short_prefill_is_bound_by_the_weights(self, llama_8b):
        work = prefill_work(llama_8b, PrefillCase(16))
        assert work.floor_s(self.h100) == pytest.approx(work.moved_bytes / 3e12)

    def test_attention_rate(self):
        assert rates(3e12, 700e12, whole_gpu=True).attention_flops == 500e12
        assert rates(1e10, 1e11, whole_gpu=False).attention_flops == pytest.approx(1e11 * 500 / 765)


class TestCases:
    @pytest.mark.parametrize("text", ["8192+0", "2048+32768", "4x512+8192"])
    def test_prefill_reads_what_it_prints(self, text):
        assert str(PrefillCase.parse(text)) == text

    def test_nothing_cached_may_be_left_out(self):
        assert PrefillCase.parse("4x512") == PrefillCase(512, 0, 4)

    def test_decode_reads_what_it_prints(self):
        assert str(DecodeCase.parse("48x8800")) == "48x8800"

    @pytest.mark.parametrize("text", ["", "0", "0+5", "0x4+4", "x", "1+2+3", "-4"])
    def test_no_prefill(self, text):
        with pytest.raises(ValueError, match="expected NEW"):
            PrefillCase.parse(text)

    @pytest.mark.parametrize("text", ["48", "0x5", "5x0", "axb"])
    def test_no_decode(self, text):
        with pytest.raises(ValueError, match="expected BATCHxLENGTH"):
            DecodeCase.parse(text)

    def test_slots_come_in_pages(self):
        assert pool_tokens(DecodeCase(3, 17), page_size=16) == 3 * 32


class TestOptions:
    def test_defaults_are_those_of_an_8b_model(self):
        options = parse_options(["--model-path", "m"])
        assert (options.decode, options.prefill) == (DEFAULT_DECODE, DEFAULT_PREFILL)
        assert options.generation == ()

    def test_given_cases_replace_the_defaults(self):
        options = parse_options(["--model-path", "m", "--decode", "4x8", "2x4", "--dtype", "half"])
        assert options.decode == (DecodeCase(4, 8), DecodeCase(2, 4))
        assert options.prefill == ()
        assert options.server.dtype == "half"

    def test_sglang_cases_are_combined(self):
        flags = ["--batch-size", "1", "12", "--input-len", "256", "512", "--output-len", "32"]
        options = parse_options(["--model-path", "m", *flags])
        assert options.generation == tuple(
            GenerationCase(*case) for case in itertools.product((1, 12), (256, 512), (32,))
        )
        assert options.decode == options.prefill == ()

    def test_splits_are_sorted_by_decode_share(self):
        options = parse_options(["--model-path", "m", "--partition", "84/48", "p116/d16"])
        assert options.splits == (Split(116, 16), Split(84, 48))

    @pytest.mark.parametrize(
        ("flags", "complaint"),
        [
            ("--port 3", "--port has no effect"),
            ("--enable-pdmux", "--enable-pdmux has no effect"),
            ("--profile", "known in SGLang but not supported.*--profile"),
            ("--decode 4x4 --nonsense", "unknown flag: --nonsense"),
            ("--decode 4", "--decode: expected BATCHxLENGTH"),
            ("--decode-steps 1", "--decode-steps: must be an integer of at least 2"),
            ("--partition 84", "--partition: expected PREFILL/DECODE"),
            ("--partition 84/48 60/48", "--partition names a decode share twice"),
            ("--co-run", "--co-run needs --partition"),
            ("--co-run --partition 84/48 --decode 4x4", "--co-run needs both"),
        ],
    )
    def test_refusals_name_the_flag(self, flags, complaint):
        with pytest.raises(ConfigError, match=complaint):
            parse_options(["--model-path", "m", *flags.split()])

    @pytest.mark.parametrize("module", ["bench_one_batch", "bench_offline_throughput"])
    def test_flags_are_read_without_torch(self, module):
        program = f"import sys, sglang.{module}; print('torch' in sys.modules)"
        path = os.pathsep.join([str(ROOT / "python"), str(ROOT)])
        done = subprocess.run(
            [sys.executable, "-c", program],
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
            env={**os.environ, "PYTHONPATH": path},
        )
        assert done.stdout.strip() == "False"


@pytest.fixture(params=[1, 4])
def placement(request):
    """(placement, slot table, page size): 96 slots and a scratch page, 3 decode rows."""
    page_size = request.param
    slot_table = torch.zeros(6, 32, dtype=torch.int32)
    placed = Placement(
        slot_table,
        num_slots=96 + page_size,
        page_size=page_size,
        decode_rows=3,
        vocab_size=50,
        seed=0,
    )
    return placed, slot_table, page_size


class TestPlacement:
    def test_decode_step(self, placement):
        placed, slot_table, page_size = placement
        batch = placed.decode(DecodeCase(3, 18))
        assert batch.is_decode
        assert batch.rows.tolist() == batch.sample_rows.tolist() == [1, 2, 3]
        assert batch.positions.tolist() == [17] * 3
        assert batch.seq_lens.tolist() == [18] * 3
        assert batch.new_lens.tolist() == [1] * 3
        assert batch.sample_positions.tolist() == [18] * 3
        assert batch.table_index.tolist() == [32 * row + 17 for row in (1, 2, 3)]
        slots = slot_table[1:4, :18].numpy()
        assert batch.token_slots.tolist() == batch.table_slots.tolist() == slots[:, 17].tolist()
        assert len(np.unique(slots)) == 3 * 18
        assert slots.min() >= page_size
        assert slots.max() < 96 + page_size
        assert not np.array_equal(np.sort(slots.reshape(-1)), slots.reshape(-1))

    def test_slots_of_a_page_lie_together(self, placement):
        placed, slot_table, page_size = placement
        placed.decode(DecodeCase(2, 16))
        pages = slot_table[1:3, :16].reshape(-1, page_size)
        assert torch.equal(pages - pages[:, :1], torch.arange(page_size).expand_as(pages))
        assert torch.all(pages[:, 0] % page_size == 0)

    def test_prefill_of_two_requests(self, placement):
        placed, slot_table, _ = placement
        batch = placed.prefill(PrefillCase(5, 7, requests=2))
        assert not batch.is_decode
        assert batch.rows.tolist() == [4, 5]
        assert batch.positions.tolist() == [*range(7, 12)] * 2
        assert batch.seq_lens.tolist() == [12, 12]
        assert batch.new_lens.tolist() == [5, 5]
        assert batch.sample_tokens.tolist() == [4, 9]
        assert batch.token_slots.tolist() == slot_table[4:6, 7:12].reshape(-1).tolist()
        assert len(batch.input_ids) == 10
        assert batch.input_ids.max() < 50

    def test_phases_meet_only_when_the_pool_is_too_small_for_both(self, placement):
        placed, slot_table, _ = placement
        placed.decode(DecodeCase(3, 20))
        placed.prefill(PrefillCase(16, 16))
        assert not np.isin(slot_table[4, :32].numpy(), slot_table[1:4, :20].numpy()).any()

    def test_a_sequence_grows_into_its_own_slots(self, placement):
        placed, slot_table, _ = placement
        sequences = placed.sequences(2, 10)
        prompt = sequences.fill(0, 8, placed.draw_ids(16))
        step = sequences.step(9)
        assert prompt.token_slots.tolist() == slot_table[1:3, :8].reshape(-1).tolist()
        assert step.token_slots.tolist() == slot_table[1:3, 8].tolist()


class TimedRun:
    """Layers that take 1 ms in decode, 10 ms in prefill, times `slowness`."""

    indivisible = False

    def __init__(self, batch, slowness):
        self.layer_s = (0.001 if batch.is_decode else 0.01) * slowness
        self.slices = 0

    def slice_work(self, lane, first, last):
        self.slices += 1
        return TimedWork((last - first) * self.layer_s)

    def tokens(self):
        return []


class TimedRunner:
    """Each run takes `growth` times as long as the one before."""

    num_layers = 4

    def __init__(self, growth=1.0):
        self.growth = growth
        self.runs = []

    def start(self, batch):
        self.runs.append(TimedRun(batch, self.growth ** len(self.runs)))
        return self.runs[-1]


class VirtualBench:
    """A Bench on virtual lanes, whose clock jumps to the next completion."""

    def __init__(self, repetitions, runner=None):
        split = Partition(1, 100, 32)
        self.clock = VirtualClock()
        self.lanes = VirtualLanes(PartitionTable(132, (split,)), self.clock)
        self.decode_lane = self.lanes.lane(Phase.DECODE, split)
        self.prefill_lane = self.lanes.lane(Phase.PREFILL, split)
        self.bench = Bench(runner or TimedRunner(), repetitions, self.wait)
        placed = Placement(
            torch.zeros(4, 16, dtype=torch.int32),
            num_slots=33,
            page_size=1,
            decode_rows=2,
            vocab_size=9,
            seed=0,
        )
        self.step = placed.decode(DecodeCase(2, 8))
        self.prompt = placed.prefill(PrefillCase(4, 4))

    def wait(self):
        end_s = self.lanes.next_completion_s()
        assert end_s is not None, "waiting for nothing"
        self.clock.advance_to(end_s)


class TestStreams:
    def test_decode_keeps_its_lane_busy(self):
        virtual = VirtualBench(Repetitions(decode_steps=6, prefill_runs=1, warm_up=2))
        times = virtual.bench.decode(virtual.decode_lane, virtual.step)
        assert times.step.count == 6
        assert times.step.median == times.step.p90 == pytest.approx(4.0)
        assert times.gap_ms == pytest.approx(0.0)
        assert times.steps_per_s == pytest.approx(250.0)
        assert virtual.clock.now_s == pytest.approx(8 * 0.004)

    @pytest.mark.parametrize("slice_layers", [1, 3, 4])
    def test_prefill_runs_all_layers_however_it_is_sliced(self, slice_layers):
        virtual = VirtualBench(Repetitions(decode_steps=2, prefill_runs=3, warm_up=0))
        times = virtual.bench.prefill(virtual.prefill_lane, virtual.prompt, slice_layers)
        assert times.run.count == 3
        assert times.run.median == pytest.approx(40.0)
        assert times.runs_per_s == pytest.approx(25.0)
        assert virtual.clock.now_s == pytest.approx(3 * 0.04)

    def test_a_device_that_slows_down_slows_ways_in_turn_alike(self):
        runner = TimedRunner(growth=1.01)
        virtual = VirtualBench(Repetitions(decode_steps=2, prefill_runs=10, warm_up=2), runner)
        whole, sliced = virtual.bench.prefill_in_turn(virtual.prefill_lane, virtual.prompt, [4, 1])
        assert [run.slices for run in runner.runs] == [1, 4] * 12
        assert whole.run.count == sliced.run.count == 10
        assert sliced.run.median / whole.run.median == pytest.approx(1.01)
        took_s = [run.layer_s * 4 for run in runner.runs[4:]]
        assert whole.runs_per_s == pytest.approx(10 / sum(took_s[::2]))
        assert sliced.runs_per_s == pytest.approx(10 / sum(took_s[1::2]))

    def test_side_by_side_counts_only_what_ran_beside_the_other(self):
        virtual = VirtualBench(Repetitions(decode_steps=10, prefill_runs=3, warm_up=1))
        decode, prefill = virtual.bench.side_by_side(
            virtual.decode_lane, virtual.step, virtual.prefill_lane, virtual.prompt, 1
        )
        # Warm from 40 ms on, the end of the first prefill; three more prefills end at 160 ms.
        assert prefill.run.count == 3
        assert decode.step.count in (30, 31, 32)
        assert decode.step.median == pytest.approx(4.0)
        assert prefill.run.median == pytest.approx(40.0)
        assert decode.steps_per_s == pytest.approx(250.0)

    def test_side_by_side_waits_for_the_slower_phase(self):
        virtual = VirtualBench(Repetitions(decode_steps=100, prefill_runs=1, warm_up=1))
        decode, prefill = virtual.bench.side_by_side(
            virtual.decode_lane, virtual.step, virtual.prefill_lane, virtual.prompt, 4
        )
        assert decode.step.count >= 100
        assert prefill.run.count >= 9


def test_the_probe_reports_positive_rates(tiny_lanes):
    lane = tiny_lanes.lane(Phase.PREFILL, tiny_lanes.table.whole)
    found = MachineProbe(torch.device("cpu"), torch.float32, SMALL_PROBE).measure(lane)
    assert found.copy_bytes > 0
    assert found.matrix_flops > 0
    assert found.attention_flops == pytest.approx(found.matrix_flops * 500 / 765)


@pytest.fixture
def tiny_lanes():
    from drift_scheduler.lane_cpu import CpuLanes

    lanes = CpuLanes()
    yield lanes
    lanes.close()


@pytest.fixture
def options_of(tiny_model_dir, tmp_path):
    """options_of("--decode 2x8 ...") for the tiny model, quick, its results in a fresh folder."""

    def make(flags: str):
        return parse_options(
            [
                *("--model-path", str(tiny_model_dir("llama")), "--device", "cpu"),
                *("--result-filename", str(tmp_path / "results" / "out.jsonl")),
                *("--decode-steps", "4", "--prefill-runs", "2", "--warm-up", "1"),
                "--disable-tqdm",
                *flags.split(),
            ]
        )

    return make


class TestRun:
    def test_every_case_becomes_a_line(self, options_of, capsys):
        options = options_of(
            "--decode 3x20 --prefill 2x8+4 --batch-size 2 --input-len 6 --output-len 4 1 "
            "--run-name trial --page-size 4"
        )
        rows = run(options, SMALL_PROBE)
        lines = [json.loads(line) for line in options.result_file.read_text().splitlines()]
        assert lines == rows
        assert [row["case"] for row in rows] == [
            "decode 3x20",
            "prefill 2x8+4",
            "generate 2x6->4",
            "generate 2x6->1",
        ]
        decode, prefill, generated, single = rows
        for row in (decode, prefill):
            assert row["p10_ms"] <= row["ms"] <= row["p90_ms"]
            assert row["ratio"] == pytest.approx(row["ms"] / row["floor_ms"])
        assert decode["repetitions"] == 4
        assert decode["cpu_ms"] >= 0
        assert decode["launch_ms"] > 0
        assert prefill["slice_layers"] == 1
        assert prefill["slicing_percent"] == pytest.approx(
            100 * (prefill["sliced_ms"] / prefill["ms"] - 1)
        )
        assert generated["overall_throughput"] == pytest.approx(20 / generated["total_latency"])
        assert generated["total_latency"] >= generated["prefill_latency"]
        assert "median_decode_latency" not in single
        for row in rows:
            assert row["run_name"] == "trial"
            assert row["environment"]["seed"] == 0
            assert row["environment"]["flags"] == recorded_flags(options.command)
            assert row["environment"]["versions"]["torch"]
        printed = capsys.readouterr().out
        assert "decode lane of whole" in printed
        assert "decode 3x20" in printed

    def test_a_line_says_what_state_the_gpu_was_in(self, options_of, monkeypatch, capsys):
        states = [GpuState(1755.0, 420.0, 700.0, 55.0, ())]
        watch = GpuWatch(lambda: states[-1], what="state", interval_s=0.001)
        monkeypatch.setattr(session, "watch_device", lambda device, interval_s: watch)
        states.append(GpuState(1305.0, 699.5, 700.0, 64.0, ("power cap",)))
        rows = run(options_of("--decode 2x8 --prefill 8+0"), SMALL_PROBE)
        for row in rows:
            assert row["sm_clock_mhz"] == 1305.0
            assert row["power_w"] == 699.5
            assert row["limited_by"] == ("power cap",)
        printed = capsys.readouterr().out
        assert "1305" in printed
        assert "Clock held down, of 2 cases: power cap in 2" in printed
        assert not watch._thread.is_alive()

    @needs_two_cores
    def test_splits_and_pairs(self, options_of):
        split = f"{num_cores - 1}/1"
        rows = run(
            options_of(f"--decode 2x12 --prefill 16+0 --partition {split} --co-run"), SMALL_PROBE
        )
        name = f"p{num_cores - 1}/d1"
        assert [(row["case"], row["partition"], row["beside"]) for row in rows] == [
            ("decode 2x12", "whole", None),
            ("prefill 16+0", "whole", None),
            ("decode 2x12", name, None),
            ("prefill 16+0", name, None),
            ("decode 2x12", name, "prefill 16+0"),
            ("prefill 16+0", name, "decode 2x12"),
        ]
        assert rows[4]["alone_ms"] == rows[2]["ms"]
        assert rows[5]["alone_ms"] == rows[3]["ms"]
        assert rows[4]["repetitions"] >= 4
        assert rows[5]["repetitions"] >= 2

    def test_a_pool_that_cannot_hold_the_case(self, options_of):
        with pytest.raises(ConfigError, match=r"9000000x500 takes 4500000000 tokens.*--decode"):
            run(options_of("--decode 9000000x500 --mem-fraction-static 0.001"), SMALL_PROBE)

    def test_a_pool_that_was_asked_too_small(self, options_of):
        with pytest.raises(ConfigError, match=r"--max-total-tokens 39: 2x20 takes 40 tokens"):
            run(options_of("--decode 2x20 --max-total-tokens 39"), SMALL_PROBE)

    def test_a_case_beyond_the_context(self, options_of):
        with pytest.raises(ConfigError, match=r"1x513 is longer than the context of 512.*--decode"):
            run(options_of("--decode 1x513"), SMALL_PROBE)

    def test_a_split_that_does_not_add_up(self, options_of):
        with pytest.raises(ConfigError, match=f"--partition 1000/1 does not divide {num_cores}"):
            run(options_of("--decode 1x8 --partition 1000/1"), SMALL_PROBE)

    def test_bad_flags_end_with_2(self, capsys):
        assert bench_one_batch.main(["--model-path", "m", "--port", "3"]) == 2
        assert "--port has no effect" in capsys.readouterr().err


def test_tables_align_numbers_right_and_leave_out_empty_columns():
    rows = [
        {"case": "decode 1x8", "partition": "whole", "beside": None, "ms": 1.5, "floor_ms": 10.0},
        {"case": "prefill 8+0", "partition": "p1/d1", "beside": None, "ms": 100.25, "floor_ms": 1},
    ]
    assert table(rows).splitlines() == [
        "case         on         ms  floor",
        "decode 1x8   whole    1.50  10.00",
        "prefill 8+0  p1/d1  100.25   1.00",
    ]


def test_limits_are_counted_by_case():
    rows = [{"limited_by": ("power cap",)}, {"limited_by": ("power cap", "power brake")}, {}]
    assert limits_line(rows) == "Clock held down, of 3 cases: power cap in 2, power brake in 1"
    assert limits_line([{}, {"limited_by": ()}]) == ""


def test_recorded_flags_leave_out_where_the_result_lies():
    command = ["--decode", "4x4", "--result-filename", "a/b.jsonl", "--warm-up=1"]
    assert recorded_flags(command) == ["--decode", "4x4", "--warm-up=1"]
    assert recorded_flags(["--result-filename=x", "--co-run"]) == ["--co-run"]
