"""profile_drift: the engine's meter, the clock, profiles that are kept, and a real run."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from drift_scheduler.estimator import Estimator
from drift_scheduler.lane import Phase
from drift_scheduler.lane_virtual import TimedWork, VirtualClock, VirtualLanes
from drift_scheduler.partition import Partition, PartitionTable
from drift_scheduler.profile import Kind, PaddedSizes, Profile, Sample, Split
from drift_scheduler.profile_grid import Limits
from drift_scheduler.profiler import DecodeBatch, PrefillBatch, Repetitions
from drift_scheduler.shapes import DecodeShape, PrefillShape
from sglang import profile_drift
from sglang.srt.benchmarks.one_batch.batches import Placement
from sglang.srt.benchmarks.one_batch.cases import DecodeCase, PrefillCase
from sglang.srt.errors import ConfigError
from sglang.srt.model_config import ModelConfig, resolve_model_source
from sglang.srt.model_executor.bring_up import bring_up
from sglang.srt.model_executor.prefill_graphs import TOKEN_SIZES
from sglang.srt.profiling import calibrate
from sglang.srt.profiling.calibrate import key_of, latencies_for, limits_of
from sglang.srt.profiling.graph_sizes import padded_sizes
from sglang.srt.profiling.key import cache_path, profile_key
from sglang.srt.profiling.meter import EngineMeter, engine_meter, riding
from sglang.srt.profiling.options import DEFAULT_MINUTES, parse_options
from sglang.srt.profiling.report import Findings, error_table, slowdowns, write_report
from sglang.srt.server_args import ServerArgs

ROOT = Path(__file__).parents[2]
LIMIT_S = 10.0
num_cores = len(os.sched_getaffinity(0))
needs_two_cores = pytest.mark.skipif(num_cores < 2, reason="needs two cores to split")

SPLIT = Partition(1, 100, 32)
TABLE = PartitionTable(132, (SPLIT,))


class TimedRun:
    """Layers of 1 ms for each request that decodes and 10 ms for each prompt."""

    indivisible = False

    def __init__(self, batch, slices):
        self.layer_s = 0.001 * batch.decode_reqs + 0.01 * (len(batch.rows) - batch.decode_reqs)
        self.slices = slices

    def slice_work(self, lane, first, last):
        self.slices.append((lane.phase, lane.partition.index, last - first))
        return TimedWork((last - first) * self.layer_s)

    def tokens(self):
        return []


class TimedRunner:
    num_layers = 6

    def __init__(self):
        self.slices = []

    def start(self, batch):
        return TimedRun(batch, self.slices)


@pytest.fixture
def virtual():
    """(EngineMeter on virtual lanes, its runner)"""
    clock = VirtualClock()
    lanes = VirtualLanes(TABLE, clock)
    runner = TimedRunner()

    def wait():
        end_s = lanes.next_completion_s()
        assert end_s is not None, "waiting for nothing"
        clock.advance_to(end_s)

    placement = Placement(
        torch.zeros(9, 64, dtype=torch.int32),
        num_slots=257,
        page_size=1,
        decode_rows=4,
        vocab_size=9,
        seed=0,
    )
    return EngineMeter(runner, lanes, placement, wait), runner


class TestMeter:
    def test_decode(self, virtual):
        meter, runner = virtual
        measured = meter.decode(SPLIT, DecodeBatch(3, 20), 5)
        assert measured.seconds == pytest.approx(6 * 0.003)
        assert (measured.layers, measured.clock_mhz) == (0, None)
        assert runner.slices == [(Phase.DECODE, 1, 6)] * 6

    def test_a_prefill_is_one_launch_on_the_whole_device(self, virtual):
        meter, runner = virtual
        measured = meter.prefill(TABLE.whole, PrefillBatch(8, 4, prompts=2), 2)
        assert measured.seconds == pytest.approx(6 * 0.02)
        assert measured.layers == 6
        assert runner.slices == [(Phase.PREFILL, 0, 6)] * 3

    def test_and_goes_in_slices_on_a_split(self, virtual):
        meter, runner = virtual
        assert meter.prefill(SPLIT, PrefillBatch(8), 1).seconds == pytest.approx(6 * 0.01)
        assert runner.slices == [(Phase.PREFILL, 1, 2)] * 3 * 2

    def test_prompts_ride_in_a_decode_step_of_the_whole_device(self, virtual):
        meter, runner = virtual
        measured = meter.fused(DecodeBatch(4, 20), PrefillBatch(8, 4), 3)
        assert measured.seconds == pytest.approx(6 * 0.014)
        assert runner.slices == [(Phase.DECODE, 0, 6)] * 4

    def test_side_by_side(self, virtual):
        meter, runner = virtual
        step, run = meter.side_by_side(
            SPLIT, DecodeBatch(4, 20), PrefillBatch(8, 4), Repetitions(4, 2)
        )
        assert (step.seconds, run.seconds) == pytest.approx((6 * 0.004, 6 * 0.01))
        assert (step.layers, run.layers) == (0, 6)
        assert {(phase, index) for phase, index, _ in runner.slices} == {
            (Phase.DECODE, 1),
            (Phase.PREFILL, 1),
        }

    def test_a_riding_prompt_comes_behind_the_steps_tokens(self):
        placement = Placement(
            torch.zeros(6, 32, dtype=torch.int32),
            num_slots=97,
            page_size=1,
            decode_rows=3,
            vocab_size=50,
            seed=0,
        )
        step = placement.decode(DecodeCase(3, 18))
        prompt = placement.prefill(PrefillCase(5, 7))
        batch = riding(step, prompt)
        assert batch.decode_reqs == 3
        assert not batch.is_decode
        assert batch.rows.tolist() == [1, 2, 3, 4]
        assert batch.positions.tolist() == [17, 17, 17, *range(7, 12)]
        assert batch.seq_lens.tolist() == [18, 18, 18, 12]
        assert batch.new_lens.tolist() == [1, 1, 1, 5]
        assert batch.sample_tokens.tolist() == [0, 1, 2, 7]
        assert batch.sample_positions.tolist() == [18, 18, 18, 12]
        assert batch.input_ids.tolist() == prompt.input_ids.tolist()
        assert len(np.unique(batch.token_slots)) == len(batch.table_slots) == 8


@pytest.fixture(scope="module")
def llama_8b():
    source = resolve_model_source(
        str(ROOT / "benchmark" / "models" / "llama-3.1-8b"), load_format="dummy"
    )
    return ModelConfig.load(source, dtype="bfloat16")


class TestKey:
    args = ServerArgs(model_path="m")
    cpu = torch.device("cpu")

    def key(self, config, args=args, attention_backend="torch_native"):
        return profile_key(args, config, self.cpu, total_sms=4, attention_backend=attention_backend)

    def test_what_timings_depend_on(self, llama_8b):
        key = self.key(llama_8b)
        assert key.gpu
        assert (key.sms, key.tp, key.dtype) == (4, 1, "bfloat16")
        assert key.model == ("32 layers of 4096, 32/8 heads of 128, mlp 14336, vocab 128256")
        assert {"sglang", "torch", "attention_backend"} <= key.versions.keys()
        assert "driver" not in key.versions

    def test_two_checkpoints_of_one_shape_share_a_profile(self, llama_8b):
        other = dataclasses.replace(llama_8b, context_length=4096, eos_token_ids=frozenset({7}))
        assert self.key(other) == self.key(llama_8b)

    def test_other_kernels_are_another_key_and_file(self, llama_8b, tmp_path):
        eager = dataclasses.replace(self.args, disable_cuda_graph=True)
        keys = [
            self.key(llama_8b),
            self.key(llama_8b, attention_backend="triton"),
            self.key(llama_8b, args=eager),
            self.key(dataclasses.replace(llama_8b, num_layers=31)),
        ]
        paths = [
            cache_path(key, brief=brief, folder=tmp_path) for key in keys for brief in (True, False)
        ]
        assert len(set(paths)) == 8
        assert {path.parent for path in paths} == {tmp_path}


class TestPaddedSizes:
    def test_none_without_graphs(self):
        runner = types.SimpleNamespace(graphs=None, prefill_graphs={}, slot_table=torch.zeros(5, 8))
        assert padded_sizes(TABLE, runner) == PaddedSizes()

    def test_sizes_are_asked_of_the_graphs(self):
        decode = types.SimpleNamespace(
            size_for=lambda reqs: next((size for size in (1, 2, 4) if size >= reqs), None)
        )
        prefill = types.SimpleNamespace(takes=lambda tokens, reqs, decode_reqs: tokens <= 512)
        runner = types.SimpleNamespace(
            graphs=decode,
            prefill_graphs={(Phase.PREFILL, 0): prefill},
            slot_table=torch.zeros(9, 8),
        )
        assert padded_sizes(TABLE, runner) == PaddedSizes(
            (1, 2, 4),
            tuple(size for size in TOKEN_SIZES if size <= 512),
        )


@pytest.fixture
def findings():
    """Decode takes 1 ms and 1 us a token of context, prefill 10 us a token; 1.5 times as long
    beside the other phase."""
    whole, split = Split(132, 132, True), Split(100, 32)

    def step(requests, context, **more):
        seconds = 1e-3 + 1e-6 * context
        return Sample(Kind.DECODE, whole, seconds, DecodeShape(requests, context), **more)

    def run(partition, tokens):
        shape = PrefillShape(tokens, 0, 0)
        return Sample(Kind.PREFILL, partition, 1e-5 * tokens, prefill=shape, layers=4)

    fitted = [step(n, n * 1000, clock_mhz=1900.0 + n) for n in (1, 2, 4, 8, 16)]
    fitted += [run(p, n) for p in (whole, split) for n in (64, 256, 1024, 4096)]
    fitted.append(
        Sample(
            Kind.PREFILL,
            split,
            1.5e-5 * 1024,
            DecodeShape(1, 1),
            PrefillShape(1024, 0, 0),
            layers=4,
            beside=True,
        )
    )
    checked = [step(3, 3000), dataclasses.replace(run(whole, 700), seconds=2 * 700e-5)]
    return Findings(Estimator.fit(fitted, 132), fitted, checked, 61.0, ["Checking: a note"])


class TestReport:
    def test_errors_of_fitted_and_held_out_samples(self, findings):
        lines = [line.split() for line in error_table(findings).splitlines()]
        assert lines[0][:3] == ["kind", "on", "fitted"]
        rows = {(kind, split): rest for kind, split, *rest in lines[1:]}
        assert rows["decode", "whole"][0] == "5"
        assert rows["decode", "whole"][3] == "1"
        assert rows["prefill", "whole"][0] == "4"
        # Twice as long as predicted: the prediction is half of what was measured.
        held_out_mean = float(rows["prefill", "whole"][4].rstrip("%"))
        assert held_out_mean == pytest.approx(50.0, abs=3.0)
        assert rows["prefill", "p100/d32"][3:] == ["0", "-", "-"]

    def test_slowdowns_are_against_the_estimate(self, findings):
        (slowdown,) = slowdowns(findings)
        assert (slowdown.kind, slowdown.partition) == (Kind.PREFILL, Split(100, 32))
        assert slowdown.factors == [pytest.approx(1.5, rel=0.03)]

    def test_the_file_has_tables_notes_and_plots(self, findings, tmp_path, llama_key):
        pytest.importorskip("matplotlib")
        path = write_report(tmp_path / "report", llama_key, findings)
        text = path.read_text()
        assert path.name == "report.md"
        assert "| decode | whole | 5 |" in text
        assert "| prefill | p100/d32 | 1 | 1.5" in text
        assert "- Checking: a note" in text
        assert "measured in 61 s" in text
        assert "| decode | whole | no | 5 | 1901 | 1906 | 1916 |" in text
        plots = {plot.name for plot in path.parent.glob("*.png")}
        assert plots == {"decode.png", "prefill.png", "slowdown.png"}
        assert all(f"({name})" in text for name in plots)
        assert all((path.parent / name).stat().st_size > 1000 for name in plots)

    def test_without_matplotlib_there_are_only_tables(
        self, findings, tmp_path, llama_key, monkeypatch, caplog
    ):
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        caplog.set_level(logging.INFO)
        path = write_report(tmp_path, llama_key, findings)
        assert "![" not in path.read_text()
        assert "matplotlib" in caplog.text

    @pytest.fixture
    def llama_key(self):
        config = types.SimpleNamespace(
            num_layers=4,
            hidden_size=8,
            num_heads=2,
            num_kv_heads=1,
            head_dim=4,
            intermediate_size=16,
            vocab_size=32,
            dtype=torch.float32,
        )
        return profile_key(
            ServerArgs(model_path="m"),
            config,
            torch.device("cpu"),
            total_sms=2,
            attention_backend="torch_native",
        )


class TestOptions:
    def test_defaults(self):
        options = parse_options(["--model-path", "m", "--enable-pd-multiplex"])
        assert options.minutes == DEFAULT_MINUTES
        assert (options.out, options.report) == (None, None)
        assert options.server.enable_pdmux

    def test_partitions_are_chosen_as_for_a_server(self):
        options = parse_options(["--model-path", "m", "--sm-group-num", "5"])
        assert options.server.policy().pdmux.sm_group_num == 5

    @pytest.mark.parametrize(
        ("flags", "complaint"),
        [
            ("--minutes 0", "--minutes: must be a positive number of minutes, got 0"),
            ("--minutes soon", "--minutes: must be a positive number"),
            ("--drift-profile x", "--drift-profile has no effect"),
            ("--pd-multiplex-policy chunked:512", "--pd-multiplex-policy has no effect"),
            ("--slo-tbt-ms 50", "--slo-tbt-ms has no effect"),
            ("--port 3", "--port has no effect"),
            ("--nonsense", "unknown flag: --nonsense"),
        ],
    )
    def test_refusals_name_the_flag(self, flags, complaint):
        with pytest.raises(ConfigError, match=complaint):
            parse_options(["--model-path", "m", *flags.split()])

    def test_bad_flags_end_with_2(self, capsys):
        assert profile_drift.main(["--model-path", "m", "--port", "3"]) == 2
        assert "profile_drift: error: --port has no effect" in capsys.readouterr().err

    def test_flags_are_read_without_torch(self):
        program = "import sys, sglang.profile_drift; print('torch' in sys.modules)"
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


@pytest.fixture
def flags_of(tiny_model_dir, tmp_path, monkeypatch):
    """The flags of a tiny engine, whose profiles are kept in a fresh folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    # It would log to this test's stderr for the rest of the session.
    monkeypatch.setattr("sglang.srt.logs.configure_logging", lambda level: None)
    return [
        *("--model-path", str(tiny_model_dir("llama")), "--load-format", "dummy"),
        *("--device", "cpu", "--max-total-tokens", "4096", "--max-running-requests", "20"),
        *("--sm-group-num", "3", "--chunked-prefill-size", "256"),
    ]


@pytest.fixture
def engine(flags_of):
    """(args, executor) of a tiny engine with one split."""
    args = parse_options(flags_of).server
    executor = bring_up(args)
    yield args, executor
    executor.lanes.close()


class FixedTimes:
    """Runs what an engine's meter runs, and says that each token took 1 ms and each prompt 10 ms:
    what a busy machine measures has no order."""

    def __init__(self, meter):
        self.meter = meter

    def decode(self, partition, batch, times):
        measured = self.meter.decode(partition, batch, times)
        return dataclasses.replace(measured, seconds=self.step_s(batch), slowest_s=None)

    def prefill(self, partition, batch, times):
        measured = self.meter.prefill(partition, batch, times)
        return dataclasses.replace(measured, seconds=self.run_s(batch), slowest_s=None)

    def fused(self, decode, prefill, times):
        measured = self.meter.fused(decode, prefill, times)
        seconds = self.step_s(decode) + self.run_s(prefill)
        return dataclasses.replace(measured, seconds=seconds, slowest_s=None)

    def side_by_side(self, partition, decode, prefill, repetitions):
        step, run = self.meter.side_by_side(partition, decode, prefill, repetitions)
        return (
            dataclasses.replace(step, seconds=1.5 * self.step_s(decode), slowest_s=None),
            dataclasses.replace(run, seconds=2.0 * self.run_s(prefill), slowest_s=None),
        )

    @staticmethod
    def step_s(batch):
        return 1e-3 * batch.requests

    @staticmethod
    def run_s(batch):
        return batch.prompts * (0.01 + 1e-3 * batch.new)


@pytest.fixture
def fixed_times(monkeypatch):
    monkeypatch.setattr(
        "sglang.srt.profiling.meter.engine_meter",
        lambda *given, **named: FixedTimes(engine_meter(*given, **named)),
    )


def start(args, executor, **more):
    return latencies_for(
        args,
        executor.lanes,
        executor.runner,
        num_slots=executor.num_slots,
        prefill_tokens=executor.prefill_tokens,
        **more,
    )


@needs_two_cores
class TestRun:
    def test_a_profile_is_measured_kept_and_found_by_the_next_start(
        self, flags_of, tmp_path, capsys, monkeypatch
    ):
        flags = [*flags_of, "--minutes", "0.08", "--disable-tqdm"]
        assert profile_drift.main(flags) == 0
        printed = capsys.readouterr().out
        (path,) = (tmp_path / "cache").rglob("latency-*.json")
        assert f"Profile: {path}" in printed
        assert "held out" in printed
        report = path.with_name(f"{path.stem}-report") / "report.md"
        assert f"Report: {report}" in printed
        assert "Relative error" in report.read_text()

        kinds = {
            (sample["kind"], sample["partition"][2], sample["beside"])
            for sample in json.loads(path.read_text())["samples"]
        }
        assert {("decode", True, False), ("prefill", True, False)} <= kinds
        assert {("decode", False, False), ("prefill", False, False)} <= kinds

        args = parse_options(flags_of).server
        executor = bring_up(args)
        try:
            monkeypatch.setattr(calibrate, "_calibrate", None)  # would not be callable
            latencies = start(args, executor)
        finally:
            executor.lanes.close()
        step = latencies.decode(DecodeShape(4, 400), executor.lanes.table.whole, None)
        assert 0 < step.expected_s <= step.worst_s

    def test_a_folder_that_cannot_be_written_is_told_at_once(self, flags_of, tmp_path, capsys):
        blocked = tmp_path / "file"
        blocked.touch()
        assert profile_drift.main([*flags_of, "--out", str(blocked / "profile.json")]) == 2
        assert "error: --out:" in capsys.readouterr().err


@needs_two_cores
class TestLatenciesFor:
    def test_a_first_start_calibrates_and_a_second_one_does_not(
        self, engine, tmp_path, monkeypatch, caplog, fixed_times
    ):
        args, executor = engine
        caplog.set_level(logging.INFO)
        latencies = start(args, executor, folder=tmp_path, budget_s=10.0)
        assert "Calibrated the latency model" in caplog.text
        assert "python -m sglang.profile_drift" in caplog.text
        (path,) = tmp_path.glob("*.brief.json")
        table = executor.lanes.table
        for partition in (table.whole, *table.splits):
            for tokens in (32, 256):
                alone = latencies.prefill(PrefillShape.of([(tokens, 0)]), partition, None)
                assert alone.expected_s == pytest.approx(0.01 + 1e-3 * tokens, rel=0.05)
        (split,) = table.splits
        beside = DecodeShape(16, 16 * 128)
        run = latencies.prefill(PrefillShape.of([(256, 256)]), split, beside)
        assert run.expected_s == pytest.approx(2 * 0.266, rel=0.05)

        monkeypatch.setattr(calibrate, "_calibrate", None)
        again = start(args, executor, folder=tmp_path)
        shape = DecodeShape(2, 100)
        assert again.decode(shape, table.whole, None) == latencies.decode(shape, table.whole, None)
        assert path.exists()

    def test_a_profile_of_another_division_is_not_enough(self, engine, tmp_path, monkeypatch):
        args, executor = engine
        key = key_of(args, executor.lanes, executor.runner)
        step = Sample(Kind.DECODE, Split.of(executor.lanes.table.whole), 0.001, DecodeShape(1, 10))
        run = Sample(
            Kind.PREFILL,
            Split.of(executor.lanes.table.whole),
            0.001,
            prefill=PrefillShape.of([(10, 0)]),
            layers=3,
        )
        Profile(key, [step, run]).save(cache_path(key, brief=True, folder=tmp_path))
        split = Split.of(executor.lanes.table.splits[0])
        both = [step, run, *(dataclasses.replace(s, partition=split) for s in (step, run))]
        monkeypatch.setattr(calibrate, "_calibrate", lambda *given: Profile(key, both))
        start(args, executor, folder=tmp_path)
        (path,) = tmp_path.glob("*.brief.json")
        assert len(Profile.load(path, key).samples) == 4

    def test_a_damaged_cache_is_measured_anew(self, engine, tmp_path, caplog):
        args, executor = engine
        key = key_of(args, executor.lanes, executor.runner)
        path = cache_path(key, brief=True, folder=tmp_path)
        path.write_text("{")
        start(args, executor, folder=tmp_path, budget_s=0.5)
        assert "left aside" in caplog.text
        assert Profile.load(path, key).samples

    def test_a_foreign_profile_is_refused_by_flag(self, engine, tmp_path):
        args, executor = engine
        key = key_of(args, executor.lanes, executor.runner)
        foreign = dataclasses.replace(key, gpu="another")
        path = tmp_path / "profile.json"
        Profile(foreign, []).save(path)
        args = dataclasses.replace(args, drift_profile=str(path))
        with pytest.raises(ConfigError, match=r"^--drift-profile: .*gpu: found 'another'"):
            start(args, executor)

    def test_a_profile_without_a_phase_is_refused_by_flag(self, engine, tmp_path):
        args, executor = engine
        key = key_of(args, executor.lanes, executor.runner)
        path = tmp_path / "profile.json"
        Profile(key, []).save(path)
        args = dataclasses.replace(args, drift_profile=str(path))
        with pytest.raises(ConfigError, match=r"^--drift-profile: no decode sample"):
            start(args, executor)

    def test_what_a_guard_learnt_is_taken_up(self, engine, tmp_path, caplog):
        args, executor = engine
        key, whole = key_of(args, executor.lanes, executor.runner), executor.lanes.table.whole
        samples = [
            Sample(Kind.DECODE, Split.of(whole), 0.001, DecodeShape(1, 10)),
            Sample(Kind.PREFILL, Split.of(whole), 0.001, None, PrefillShape.of([(10, 0)]), 3),
        ]
        path = tmp_path / "profile.json"
        Profile(key, samples).save(path)
        args = dataclasses.replace(args, drift_profile=str(path))
        latencies = start(args, executor)
        split = Split.of(executor.lanes.table.splits[0])
        assert f"--drift-profile has nothing of {split}" in caplog.text
        for _ in range(3):
            latencies.guard.observe(Kind.DECODE, Split.of(whole), DecodeShape(1, 10), None, 1.4)
        Profile(key, samples, latencies.guard.rows()).save(path)
        again = start(args, executor)
        forecast = again.decode(DecodeShape(1, 10), whole, None)
        assert forecast == latencies.decode(DecodeShape(1, 10), whole, None)
        assert forecast.worst_s >= 0.0014

    def test_limits_leave_out_what_is_not_for_requests(self, engine):
        args, executor = engine
        assert limits_of(
            args,
            executor.runner,
            num_slots=executor.num_slots,
            prefill_tokens=executor.prefill_tokens,
        ) == Limits(256, 20, 4096, 512, 1)
