"""`python -m drift_scheduler.simulate`: a trace and a profile in, a table and JSON out."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest

from drift_scheduler.partition import Partition
from drift_scheduler.profile import Kind, Profile, ProfileError, ProfileKey, Sample, Split
from drift_scheduler.shapes import DecodeShape, PrefillShape
from drift_scheduler.simulate import main
from drift_scheduler.simulation.machine import load_machine
from drift_scheduler.simulation.trace import TraceError, read_trace

TOTAL_SMS = 8
SPLITS = ((6, 2), (4, 4))


def decode_s(shape: DecodeShape, sms: int) -> float:
    return (0.008 + 1e-4 * shape.requests + 1e-7 * shape.context) * TOTAL_SMS / sms


def prefill_s(shape: PrefillShape, sms: int) -> float:
    return (0.002 + 5e-5 * shape.tokens + 1e-9 * shape.cross) * TOTAL_SMS / sms


def make_profile(model: str = "4 layers of 64") -> Profile:
    samples = []
    for prefill_sms, decode_sms in (*SPLITS, (TOTAL_SMS, TOTAL_SMS)):
        split = Split(prefill_sms, decode_sms, exclusive=prefill_sms == TOTAL_SMS)
        for requests in (1, 8, 64):
            for each in (128, 1024, 4096):
                decode = DecodeShape(requests, requests * each)
                seconds = decode_s(decode, decode_sms)
                samples.append(Sample(Kind.DECODE, split, seconds, decode))
        for tokens in (64, 512, 2048, 8192):
            for cached in (0, 4096):
                prefill = PrefillShape.of([(tokens, cached)])
                seconds = prefill_s(prefill, prefill_sms)
                samples.append(Sample(Kind.PREFILL, split, seconds, prefill=prefill, layers=4))
    return Profile(ProfileKey("a device", TOTAL_SMS, model, 1, "bfloat16"), samples)


@pytest.fixture(scope="module")
def profile_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("profile") / "profile.json"
    make_profile().save(path)
    return path


@pytest.fixture
def trace_path(tmp_path: Path) -> Path:
    rows = [
        {
            "timestamp": 250 * i,
            "input_length": 700 + 100 * (i % 5),
            "output_length": 10 + i % 7,
            "hash_ids": [i % 4, *range(1000 + 10 * i, 1000 + 10 * i + (700 + i % 5 * 100) // 512)],
        }
        for i in range(40)
    ]
    return write_trace(tmp_path / "trace.jsonl.gz", rows)


def write_trace(path: Path, rows: list[dict]) -> Path:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def run(trace: Path, profile: Path, *options: str) -> int:
    return main(["--trace", str(trace), "--profile", str(profile), *options])


SLO = ("--slo-ttft-ms", "500", "--slo-ttft-ms-per-token", "0.5", "--slo-tbt-ms", "40")


@pytest.mark.parametrize(
    "policy", ["adaptive", "static:4/4", "temporal", "chunked:512", "table", "turns"]
)
def test_every_policy_serves_a_trace(policy, trace_path, profile_path, tmp_path, capsys):
    out = tmp_path / "out.json"
    assert run(trace_path, profile_path, "--policy", policy, *SLO, "--json", str(out)) == 0
    result = json.loads(out.read_text())
    summary = result["summary"]
    assert summary["finished"] == summary["offered"] == 40
    assert summary["output_tokens"] == sum(10 + i % 7 for i in range(40))
    assert summary["attainment"] == 1.0
    assert summary["goodput_rps"] == pytest.approx(40 / summary["duration_s"])
    # 36 of the 40 prompts find the one block that they share with an earlier one.
    assert summary["cached_share"] == pytest.approx(36 * 512 / (40 * 900))
    assert result["options"]["policy"] == policy
    assert result["wall_s"] > 0
    printed = capsys.readouterr().out
    assert policy in printed
    assert "attainment            100.0%" in printed


def test_times_are_those_of_the_profile(profile_path, tmp_path):
    trace = write_trace(
        tmp_path / "one.jsonl",
        [{"timestamp": 3000, "input_length": 512, "output_length": 2, "hash_ids": [1]}],
    )
    out = tmp_path / "out.json"
    run(trace, profile_path, "--policy", "turns", "--json", str(out))
    summary = json.loads(out.read_text())["summary"]
    prefill = PrefillShape.of([(512, 0)])
    assert summary["ttft_p50_ms"] == pytest.approx(1e3 * prefill_s(prefill, 8), rel=0.05)
    assert summary["tbt_p50_ms"] == pytest.approx(1e3 * decode_s(DecodeShape(1, 513), 8), rel=0.05)
    assert json.loads(out.read_text())["options"]["slo_tbt_ms"] is None  # JSON has no infinity


def test_a_run_is_repeatable_and_options_change_it(trace_path, profile_path, tmp_path):
    def summary(*options: str) -> dict:
        out = tmp_path / "out.json"
        rate = ("--rate", "20", "--seconds", "5", "--policy", "turns")
        run(trace_path, profile_path, *rate, *SLO, *options, "--json", str(out))
        return json.loads(out.read_text())["summary"]

    plain = summary()
    assert plain == summary()
    assert summary("--seed", "1") != plain
    assert summary("--noise", "0.1") != plain
    assert summary("--launch-us", "5000")["ttft_p50_ms"] > plain["ttft_p50_ms"]
    assert summary("--gpus", "4")["attainment"] > plain["attainment"]
    assert summary("--kv-tokens", "1000")["refused"] > 0
    assert summary("--max-running", "1")["ttft_p50_ms"] > plain["ttft_p50_ms"]


def test_overload_can_be_shed(trace_path, profile_path, tmp_path):
    def summary(overload: str) -> dict:
        out = tmp_path / "out.json"
        options = ("--rate", "200", "--seconds", "2", "--slo-overload", overload)
        run(trace_path, profile_path, *options, *SLO, "--json", str(out))
        return json.loads(out.read_text())["summary"]

    assert summary("queue")["shed"] == 0
    shed = summary("shed")
    assert shed["shed"] > 0
    assert shed["finished"] + shed["shed"] == shed["offered"]


def test_the_goodput_is_searched(trace_path, profile_path, tmp_path, capsys):
    out = tmp_path / "out.json"
    options = ("--find-goodput", "0.9", "--seconds", "10", "--policy", "turns")
    run(trace_path, profile_path, *options, *SLO, "--json", str(out))
    search = json.loads(out.read_text())["search"]
    tried = {probe["rate_per_s"]: probe["attainment"] for probe in search["probes"]}
    rate = search["rate_per_s"]
    assert tried[rate] >= 0.9
    assert min(attainment for higher, attainment in tried.items() if higher > rate) < 0.9
    assert json.loads(out.read_text())["summary"]["attainment"] == tried[rate]
    assert f"goodput at 90%: {rate:.3f} requests/s" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (("--policy", "best"), "expected one of adaptive"),
        (("--policy", "static:7/1"), "no partition 7/1; there are 6/2, 4/4"),
        (("--rate", "2"), "--rate needs --seconds"),
        (("--rate", "-1"), "argument --rate: -1 is not positive"),
        (("--find-goodput", "0.9"), "--find-goodput needs --seconds"),
        (("--find-goodput", "1.5"), "argument --find-goodput: 1.5 is not above 0"),
        (("--rate", "1", "--seconds", "1", "--speed", "2"), "leave it or --rate away"),
        (("--gpus", "0"), "argument --gpus: 0 is less than 1"),
        (("--noise", "inf"), "argument --noise: inf is not a finite number"),
        (("--seed", "-2"), "argument --seed: -2 is negative"),
        (("--max-input-len", "5"), "no requests (of at most 5 prompt tokens)"),
        (("--profile", "/nowhere.json"), "profile /nowhere.json cannot be read"),
        (("--trace", "/nowhere.jsonl"), "trace /nowhere.jsonl cannot be read"),
    ],
)
def test_what_cannot_be_used_is_named(options, complaint, trace_path, profile_path, capsys):
    with pytest.raises(SystemExit) as exit_info:
        run(trace_path, profile_path, *options)
    assert exit_info.value.code == 2
    assert complaint in capsys.readouterr().err


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ("{", "truncated"),
        ('{"input_length": 0, "output_length": 1}', "`int` >= 1"),
        ('{"input_length": 600, "output_length": 1, "hash_ids": [1]}', "needs 2 hash_ids"),
        ('{"input_length": 600, "output_length": 1, "hash_ids": [1, -1]}', "hash_ids"),
        ('{"input_length": 600}', "output_length"),
    ],
)
def test_a_bad_row_is_named_with_its_line(row, complaint, tmp_path):
    path = tmp_path / "trace.jsonl"
    path.write_text('{"input_length": 1, "output_length": 1}\n\n' + row + "\n")
    with pytest.raises(TraceError, match=r"trace\.jsonl:3: ") as error:
        read_trace(str(path))
    assert complaint in str(error.value)


def test_a_trace_is_read(tmp_path):
    path = write_trace(
        tmp_path / "trace.jsonl",
        [
            {"timestamp": 9000, "input_length": 600, "output_length": 0, "hash_ids": [4, 5]},
            {"timestamp": 1500, "input_length": 1024, "output_length": 7, "hash_ids": [6, 7]},
            {"timestamp": 500, "input_length": 1025, "output_length": 7},
            {"timestamp": 100, "input_length": 2000, "output_length": 7},
        ],
    )
    first, second, third = read_trace(str(path), max_input_tokens=1999)
    assert (first.timestamp_s, first.blocks) == (0.5, ())
    assert (second.timestamp_s, second.blocks, second.output_tokens) == (1.5, (6, 7), 7)
    assert (third.blocks, third.output_tokens) == ((4,), 1)  # a partial block is not shared


def test_a_trace_without_times_needs_a_rate(tmp_path, profile_path, capsys):
    trace = write_trace(tmp_path / "t.jsonl", [{"input_length": 5, "output_length": 2}] * 3)
    with pytest.raises(SystemExit):
        run(trace, profile_path)
    assert "rows without a timestamp" in capsys.readouterr().err
    assert run(trace, profile_path, "--rate", "5", "--seconds", "2") == 0


def test_a_machine_is_made_of_a_profile(profile_path):
    machine = load_machine(profile_path)
    assert machine.num_layers == 4
    assert machine.table.total_sms == TOTAL_SMS
    assert machine.table.splits == (Partition(1, 6, 2), Partition(2, 4, 4))
    shape = DecodeShape(8, 8192)
    whole = machine.model.decode(shape, machine.table.whole, None)
    assert whole.expected_s == pytest.approx(decode_s(shape, TOTAL_SMS), rel=0.05)
    assert load_machine(profile_path, num_layers=32).num_layers == 32


def test_a_profile_that_does_not_say_how_many_layers_needs_a_flag(tmp_path):
    path = tmp_path / "profile.json"
    make_profile("something").save(path)
    with pytest.raises(ProfileError, match="--num-layers"):
        load_machine(path)
    path.write_text("{}")
    with pytest.raises(ProfileError, match="is damaged or foreign"):
        load_machine(path)


def test_the_module_runs_without_torch(trace_path, profile_path):
    program = (
        "import sys, runpy; sys.argv = ['simulate', *sys.argv[1:]]; "
        "from drift_scheduler.simulate import main; code = main(); "
        "assert 'torch' not in sys.modules and 'sglang' not in sys.modules; sys.exit(code)"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", program, "--trace", trace_path, "--profile", profile_path],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert "goodput" in done.stdout
