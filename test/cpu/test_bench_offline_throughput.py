"""bench_offline_throughput: the engine in this process serves a whole data set."""

from __future__ import annotations

import json

import pytest

from sglang import bench_offline_throughput
from sglang.srt.benchmarks.environment import recorded_flags
from sglang.srt.benchmarks.offline_throughput.options import parse_options
from sglang.srt.benchmarks.offline_throughput.session import report, run
from sglang.srt.errors import ConfigError


@pytest.fixture
def flags_of(tiny_model_dir):
    """flags_of("--num-prompts 3 ..."): a command line for the tiny model."""

    def make(flags: str) -> list[str]:
        folder = str(tiny_model_dir("llama"))
        words = f"--device cpu --max-total-tokens 600 --disable-tqdm --dataset-name {flags}"
        return ["--model-path", folder, *words.split()]

    return make


RANDOM = "random-ids --num-prompts 6 --random-input-len 40 --random-output-len 8"


def test_all_prompts_are_served(flags_of, tmp_path, capsys):
    file = tmp_path / "new" / "out.jsonl"
    flags = flags_of(f"{RANDOM} --random-range-ratio 1 --result-filename {file}")
    assert bench_offline_throughput.main(flags) == 0
    (line,) = file.read_text().splitlines()
    result = json.loads(line)
    assert result["backend"] == "engine"
    assert result["successful_requests"] == 6
    assert result["failed_requests"] == 0
    assert result["total_input_tokens"] == 6 * 40
    assert result["total_output_tokens"] == 6 * 8
    latency_s = result["total_latency"]
    assert result["request_throughput"] == pytest.approx(6 / latency_s)
    assert result["input_throughput"] == pytest.approx(240 / latency_s)
    assert result["output_throughput"] == pytest.approx(48 / latency_s)
    assert result["total_throughput"] == pytest.approx(288 / latency_s)
    assert 0 < result["prefill_busy_s"] <= latency_s
    assert 0 < result["decode_busy_s"] <= latency_s
    assert result["environment"]["flags"] == recorded_flags(flags)
    assert "Total token throughput (tok/s):" in capsys.readouterr().out


def test_the_warm_up_leaves_nothing_in_the_cache(flags_of):
    assert run(parse_options(flags_of(RANDOM)))["cached_tokens"] == 0


def test_shared_prefixes_are_found(flags_of):
    shared = (
        "generated-shared-prefix --gsp-num-groups 1 --gsp-prompts-per-group 4 --skip-warmup "
        "--gsp-system-prompt-len 100 --gsp-question-len 5 --gsp-output-len 4 --gsp-ordered "
        "--prefill-max-requests 1"
    )
    result = run(parse_options(flags_of(shared)))
    assert result["successful_requests"] == 4
    assert result["cached_tokens"] == 3 * 100


def test_prompts_beyond_the_pool_are_counted_as_failed(flags_of, capsys):
    long = "random-ids --num-prompts 2 --random-input-len 700 --random-range-ratio 1"
    assert bench_offline_throughput.main(flags_of(long)) == 1
    assert "2 requests were not served. The first:" in capsys.readouterr().out


def test_conversations_of_several_turns_are_refused(flags_of, capsys):
    turns = "generated-shared-prefix --gsp-num-turns 2 --gsp-num-groups 1"
    assert bench_offline_throughput.main(flags_of(turns)) == 2
    assert "several turns" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        ("--host x", "--host has no effect"),
        ("--max-concurrency 3", "unknown flag: --max-concurrency"),
        ("--extra-request-body {}", "not supported.*--extra-request-body"),
        ("--backend runtime", "--backend"),
    ],
)
def test_refusals_name_the_flag(flags, complaint):
    with pytest.raises(ConfigError, match=complaint):
        parse_options(["--model-path", "m", *flags.split()])


def test_data_set_flags_are_checked_by_bench_serving(capsys):
    with pytest.raises(SystemExit) as stopped:
        parse_options(["--model-path", "m", "--dataset-name", "random-ids", "--gsp-num-turns", "2"])
    assert stopped.value.code == 2
    assert "--gsp-num-turns" in capsys.readouterr().err


def test_the_report_shows_what_the_result_holds(flags_of):
    result = run(parse_options(flags_of(RANDOM)))
    printed = report(result)
    assert f"{result['total_input_tokens']}" in printed
    assert f"{result['output_throughput']:.2f}" in printed
