"""What the command line accepts, refuses and means."""

from __future__ import annotations

import math

import pytest

from sglang.bench.cli import parse_options
from sglang.bench.goodput import Objectives
from sglang.bench.unsupported import UNSUPPORTED_FLAGS

RANDOM = ["--dataset-name", "random-ids"]
TRACE = ["--dataset-name", "mooncake", "--dataset-path", "trace.jsonl"]


def refusal(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as exit_info:
        parse_options(argv)
    assert exit_info.value.code == 2
    return capsys.readouterr().err


def test_defaults() -> None:
    options = parse_options(RANDOM)
    assert options.backend == "sglang"
    assert options.base_url == "http://0.0.0.0:30000"
    assert math.isinf(options.request_rate)
    assert (options.random.input_len, options.random.range_ratio) == (1024, 0.0)
    assert (options.seed, options.warmup_requests, options.stream) == (42, 1, True)
    assert options.ignore_eos
    assert options.objectives is None


def test_older_names_of_lengths() -> None:
    options = parse_options([*RANDOM, "--random-input", "7", "--random-output", "9"])
    assert (options.random.input_len, options.random.output_len) == (7, 9)


def test_vllm_aliases_speak_openai_on_their_own_port() -> None:
    options = parse_options([*RANDOM, "--backend", "vllm-chat", "--host", "h"])
    assert options.speaks_chat
    assert options.base_url == "http://h:8000"


def test_goodput_headers_and_extra_body() -> None:
    flags = ["--goodput", "ttft:500", "tpot:50", "e2el:1e4", "itl_p99:60", "ttft_per_token:1"]
    flags += ["--header", "Authorization=Bearer a=b", "X-Team: c"]
    flags += ["--extra-request-body", '{"priority": 1}', "--base-url", "http://h:1/prefix/"]
    options = parse_options([*RANDOM, *flags])
    assert options.objectives == Objectives(500, 50, 10000, 60, 1)
    assert options.headers == {"Authorization": "Bearer a=b", "X-Team": "c"}
    assert options.extra_body == {"priority": 1}
    assert options.base_url == "http://h:1/prefix"


@pytest.mark.parametrize("flag", sorted(UNSUPPORTED_FLAGS))
def test_known_but_unsupported_flags_are_errors(
    flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert f"{flag} is not available here" in refusal([*RANDOM, flag], capsys)


@pytest.mark.parametrize(
    ("argv", "problem"),
    [
        ([], "sharegpt needs --dataset-path"),
        (["--dataset-name", "random"], "random needs --dataset-path"),
        (["--dataset-name", "mmmu"], "mmmu is not available here: image"),
        (["--dataset-name", "sharegtp"], "random-ids"),
        (["--dataset-name", "mooncake"], "needs --dataset-path"),
        ([*RANDOM, "--dataset-path", "x"], "reads no file"),
        ([*RANDOM, "--backend", "trt"], "--backend trt is not available here"),
        ([*RANDOM, "--backend", "tgi"], "sglang-oai-chat"),
        ([*RANDOM, "--top-logprobs-num", "2"], "--top-logprobs-num needs --return-logprob"),
        ([*RANDOM, "--return-logprob", "--backend", "vllm"], "--return-logprob needs"),
        ([*RANDOM, "--profile-num-steps", "2"], "--profile-num-steps needs --profile"),
        ([*RANDOM, "--profile", "--pd-separated"], "--profile-prefill-url"),
        ([*RANDOM, "--profile", "--profile-decode-url", "http://d"], "--pd-separated"),
        (
            [*RANDOM, "--profile", "--profile-steps", "1", "--profile-num-steps", "2"],
            "--profile-steps differs",
        ),
        ([*RANDOM, "--backend", "sglang-embedding", "--goodput", "ttft:5"], "only e2el"),
        ([*RANDOM, "--prompt-suffix", "x"], "applies only to"),
        ([*TRACE, "--dataset-offset", "2"], "applies only to"),
        (["--dataset-name", "openai", "--dataset-path", "q.jsonl"], "chat --backend"),
        ([*RANDOM, "--num-prompts", "0"], "at least 1"),
        ([*RANDOM, "--request-rate", "0"], "above 0"),
        ([*RANDOM, "--request-rate", "nan"], "above 0"),
        ([*RANDOM, "--random-range-ratio", "1.5"], "at most 1"),
        ([*RANDOM, "--top-p", "0"], "above 0"),
        ([*RANDOM, "--goodput", "tbt:5"], "ttft, tpot, e2el, itl_p99, ttft_per_token"),
        ([*RANDOM, "--goodput", "ttft:0"], "above 0"),
        ([*RANDOM, "--goodput", "ttft:1", "ttft:2"], "given twice"),
        ([*RANDOM, "--goodput", "ttft:1", "--disable-stream"], "--disable-stream"),
        ([*RANDOM, "--header", "nothing"], "NAME=VALUE"),
        ([*RANDOM, "--extra-request-body", "[]"], "JSON object"),
        ([*RANDOM, "--extra-request-body", "{"], "not JSON"),
        ([*RANDOM, "--gsp-num-turns", "2"], "--gsp-num-turns applies only to"),
        ([*RANDOM, "--use-trace-timestamps"], "applies only to --dataset-name mooncake"),
        ([*RANDOM, "--backend", "sglang-oai", "--tokenize-prompt"], "--tokenize-prompt"),
        ([*RANDOM, "--backend", "sglang-oai", "--vocab-size", "9"], "--vocab-size"),
        ([*TRACE, "--use-trace-timestamps", "--request-rate", "2"], "exclude each other"),
        ([*TRACE, "--mooncake-slowdown-factor", "2"], "--use-trace-timestamps"),
        (["--dataset-name", "mt-bench", "--dataset-path", "q.jsonl"], "chat --backend"),
        (
            ["--dataset-name", "generated-shared-prefix", "--gsp-zipf-alpha", "1"],
            "go together",
        ),
        (["--dataset-name", "custom", "--dataset-path", "x", "--vocab-size", "9"], "--vocab-size"),
        ([*RANDOM, "--num-prompt", "1"], "unrecognized arguments"),
    ],
)
def test_bad_options_name_the_flag(
    argv: list[str], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert problem in refusal(argv, capsys)


def test_all_prompts_unless_a_number_is_given() -> None:
    groups = ["--dataset-name", "generated-shared-prefix"]
    assert parse_options(groups).num_prompts is None
    assert parse_options([*groups, "--num-prompts", "1000"]).num_prompts == 1000
    assert parse_options(RANDOM).num_prompts == 1000


def test_the_key_of_openai_clients_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    assert parse_options(RANDOM).headers == {"Authorization": "Bearer k"}
    given = ["--header", "authorization=Bearer mine"]
    assert parse_options([*RANDOM, *given]).headers == {"authorization": "Bearer mine"}


def test_where_profilers_are_and_what_they_are_told() -> None:
    flags = ["--profile", "--profile-steps", "7", "--profile-activities", "GPU", "MEM"]
    profile = parse_options([*RANDOM, "--base-url", "http://h:1", *flags]).profile
    assert profile is not None
    assert profile.urls == ("http://h:1",)
    assert profile.body == {"activities": ["GPU", "MEM"], "num_steps": 7}
    assert profile.stops_itself
    apart = ["--pd-separated", "--profile-prefill-url", "http://p/", "http://q"]
    profile = parse_options([*RANDOM, "--profile", *apart]).profile
    assert profile is not None
    assert (profile.urls, profile.stops_itself) == (("http://p", "http://q"), False)
