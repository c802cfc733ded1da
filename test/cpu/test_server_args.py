"""Flags: parsing, aliases, configuration files, checks, and what is said about wrong ones."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sglang
from drift_scheduler.slo import Slo
from sglang.launch_server import main
from sglang.srt.errors import ConfigError
from sglang.srt.flags import json_object, token_count
from sglang.srt.multiplex_policy import MultiplexPolicy
from sglang.srt.pdmux_config import Division, PdmuxConfig
from sglang.srt.server_args import FLAGS, ServerArgs, make_parser, resolve_device
from sglang.srt.service_levels import ServiceLevel
from sglang.srt.upstream_flags import UNSUPPORTED_FLAGS

ROOT = Path(__file__).parents[2]


def parse(*argv):
    return ServerArgs.from_cli(["--model-path", "m", *argv])


@pytest.fixture
def yaml_file(tmp_path):
    """Writes a YAML file and returns its path as text."""

    def write(content):
        path = tmp_path / "settings.yaml"
        path.write_text(content, encoding="utf-8")
        return str(path)

    return write


def test_defaults_are_those_of_sglang():
    args = parse()
    assert (args.host, args.port) == ("127.0.0.1", 30000)
    assert (args.max_prefill_tokens, args.schedule_policy) == (16384, "fcfs")
    assert (args.watchdog_timeout, args.decode_log_interval) == (300.0, 40)
    assert (args.page_size, args.device, args.enable_pdmux) == (1, "auto", False)
    assert args.policy() == MultiplexPolicy("turns")


def test_names_fall_back_to_the_model():
    assert (parse().tokenizer, parse().model_name) == ("m", "m")
    named = parse("--tokenizer-path", "t", "--served-model-name", "n")
    assert (named.tokenizer, named.model_name) == ("t", "n")


@pytest.mark.parametrize(
    ("argv", "field", "value"),
    [
        (["--tp", "1"], "tp_size", 1),
        (["--data-parallel-size", "1"], "dp_size", 1),
        (["--chunked", "4K"], "chunked_prefill_size", 4096),
        (["--chunked-prefill-size", "-1"], "chunked_prefill_size", -1),
        (["--max-total-tokens=1M"], "max_total_tokens", 1024**2),
        (["--context-length", "32k"], "context_length", 32000),
        (["--enable-pd-multiplex"], "enable_pdmux", True),
        (["--enable-pdmux", "--sm-group-num", "5"], "sm_group_num", 5),
        (["--stream-output"], "incremental_streaming_output", True),
        (["--log-requests-level", "3"], "log_requests_level", 3),
        (["--log-level-http", "warning"], "log_level_http", "warning"),
        (["--json-model-override-args", '{"a": [1]}'], "json_model_override_args", {"a": [1]}),
        (["--mem-fraction-static", "0.8"], "mem_fraction_static", 0.8),
        (["--disable-overlap-schedule"], "disable_overlap_schedule", True),
        (["--enable-mixed-chunk"], "enable_mixed_chunk", True),
        (["--slo-tbt-ms", "12.5"], "slo_tbt_ms", 12.5),
        (["--enable-pdmux", "--slo-overload", "shed"], "slo_overload", "shed"),
        (["--enable-metrics"], "enable_metrics", True),
        (["--enable-pdmux", "--drift-profile", "p.json"], "drift_profile", "p.json"),
    ],
)
def test_values_reach_their_field(argv, field, value):
    assert getattr(parse(*argv), field) == value


def test_model_is_an_alias_and_the_last_spelling_wins():
    assert ServerArgs.from_cli(["--model", "a", "--model-path", "b"]).model_path == "b"


def test_upstream_start_command_of_pdmux_is_accepted():
    args = parse("--enable-pdmux", "--disable-overlap-schedule", "--chunked-prefill-size", "-1")
    assert args.enable_pdmux
    assert args.chunked_prefill_size == -1


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--max", "3"], r"ambiguous option: --max could match .*--max-total-tokens"),
        (["--quantization", "fp8"], r"known in SGLang but not supported .* yet: --quantization$"),
        (["--cuda-graph-bs=8"], r"known in SGLang but not supported .*: --cuda-graph-bs$"),
        (["--chunked-prefil-sice", "8"], r"unknown flag: .* mean --chunked-prefill-size\?"),
        (["--quux"], r"^unknown flag: --quux$"),
        (["-q"], r"^unknown flag: -q$"),
        (["other-model"], r"^unexpected argument: other-model$"),
        (["--port", "many"], r"^--port: expected an integer, got 'many'$"),
        (["--watchdog-timeout", "x"], r"^--watchdog-timeout: expected a number"),
        (["--max-total-tokens", "1.5"], r"^--max-total-tokens: expected a whole count"),
        (["--dtype", "int3"], r"^--dtype: expected one of auto, half"),
        (["--slo-ttft-ms", "soon"], r"^--slo-ttft-ms: expected a number, got 'soon'$"),
        (["--slo-overload", "drop"], r"^--slo-overload: expected one of queue, shed"),
        (["--attention-backend", "fa3"], r"^--attention-backend: expected one of auto, flashinfer"),
        (["--json-model-override-args", "[]"], r"expected a JSON object"),
        (["--json-model-override-args", "{"], r"expected a JSON object"),
        (["--port"], r"^--port: expected one argument$"),
    ],
)
def test_what_cannot_be_parsed_is_named(argv, message):
    with pytest.raises(ConfigError, match=message):
        parse(*argv)


@pytest.mark.parametrize(
    ("argv", "flag"),
    [
        (["--port", "0"], "--port"),
        (["--port", "65536"], "--port"),
        (["--mem-fraction-static", "1"], "--mem-fraction-static"),
        (["--mem-fraction-static", "0"], "--mem-fraction-static"),
        (["--mem-fraction-static", "nan"], "--mem-fraction-static"),
        (["--page-size", "0"], "--page-size"),
        (["--context-length", "0"], "--context-length"),
        (["--stream-interval", "0"], "--stream-interval"),
        (["--max-running-requests", "0"], "--max-running-requests"),
        (["--max-queued-requests", "-1"], "--max-queued-requests"),
        (["--max-prefill-tokens", "0"], "--max-prefill-tokens"),
        (["--chunked-prefill-size", "0"], "--chunked-prefill-size"),
        (["--chunked-prefill-size", "-2"], "--chunked-prefill-size"),
        (["--chunked-prefill-size", "40", "--page-size", "16"], "--chunked-prefill-size"),
        (["--schedule-conservativeness", "0"], "--schedule-conservativeness"),
        (["--watchdog-timeout", "0"], "--watchdog-timeout"),
        (["--base-gpu-id", "-1"], "--base-gpu-id"),
        (["--tp-size", "2"], "--tp-size 2 is not supported yet"),
        (["--dp", "2"], "--dp-size 2 is not supported yet"),
        (["--pp-size", "0"], "--pp-size"),
        (["--sm-group-num", "8"], "--sm-group-num has no effect without --enable-pdmux"),
        (["--pdmux-config-path", "x"], "--pdmux-config-path has no effect"),
        (["--enable-pdmux", "--sm-group-num", "2"], "--sm-group-num: sm_group_num must be at"),
        (["--pd-multiplex-policy", "table"], "--pd-multiplex-policy has no effect without"),
        (
            ["--enable-mixed-chunk", "--chunked-prefill-size", "-1"],
            "--enable-mixed-chunk cuts prompts, --chunked-prefill-size -1 never does",
        ),
        (["--device", "cpu", "--attention-backend", "triton"], "--attention-backend triton needs"),
        (["--skip-tokenizer-init", "--chat-template", "x"], "--chat-template has no effect"),
        (["--skip-tokenizer-init", "--reasoning-parser", "qwen3"], "--reasoning-parser has no"),
        (
            ["--tool-call-parser", "qwen3_coder"],
            "--tool-call-parser qwen3_coder is not one of hermes, llama3, mistral, qwen, qwen25",
        ),
        (
            ["--reasoning-parser", "step3"],
            "--reasoning-parser step3 is not one of deepseek-r1, qwen3, qwen3-thinking",
        ),
        (["--slo-ttft-ms", "0"], "--slo-ttft-ms must be a number of milliseconds greater than 0"),
        (["--slo-ttft-ms-per-token", "-1"], "--slo-ttft-ms-per-token must be a number"),
        (["--slo-tbt-ms", "nan"], "--slo-tbt-ms must be a number"),
        (["--slo-tbt-ms", "inf"], "--slo-tbt-ms must be within 1e-06 and 1e.12 milliseconds"),
        (["--drift-profile", "p.json"], "--drift-profile has no effect without --enable-pdmux"),
        (
            ["--enable-pdmux", "--drift-profile-save"],
            "--drift-profile-save has no effect without --drift-profile",
        ),
    ],
)
def test_what_cannot_be_served_is_named(argv, flag):
    with pytest.raises(ConfigError, match=f"^{flag}"):
        parse(*argv)


def test_a_model_is_required():
    with pytest.raises(ConfigError, match="--model-path is required"):
        ServerArgs.from_cli([])


def test_boundaries_are_served():
    parse("--max-queued-requests", "0", "--port", "65535", "--mem-fraction-static", "0.99")
    parse("--chunked-prefill-size", "48", "--page-size", "16")


@pytest.mark.parametrize(
    ("fields", "flag"),
    [
        ({"port": "30000"}, "--port"),
        ({"enable_pdmux": 1}, "--enable-pdmux"),
        ({"dtype": "int3"}, "--dtype"),
        ({"json_model_override_args": "{}"}, "--json-model-override-args"),
    ],
)
def test_args_made_in_python_are_checked_too(fields, flag):
    with pytest.raises(ConfigError, match=f"^{flag} has a wrong value"):
        ServerArgs(model_path="m", **fields).check()


def test_args_are_frozen_and_share_no_mutable_default():
    args = ServerArgs(model_path="m")
    with pytest.raises(dataclasses.FrozenInstanceError):
        args.port = 1
    assert args.json_model_override_args is not ServerArgs().json_model_override_args


def test_config_file_sets_what_the_command_line_leaves_open(yaml_file):
    path = yaml_file(
        "model_path: from-file\nport: 1234\nmax-total-tokens: 8K\nenable-pdmux: true\n"
        "disable_radix_cache: false\nrandom_seed: null\njson_model_override_args: {a: 1}\n"
    )
    args = ServerArgs.from_cli(["--config", path, "--port", "4321"])
    assert (args.model_path, args.port, args.max_total_tokens) == ("from-file", 4321, 8192)
    assert (args.enable_pdmux, args.disable_radix_cache, args.random_seed) == (True, False, None)
    assert args.json_model_override_args == {"a": 1}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("prot: 1", r"settings.yaml: unknown flag: --prot \(did you mean --port\?\)"),
        ("quantization: fp8", "settings.yaml: known in SGLang but not supported"),
        ("config: x", "settings.yaml: unknown flag: --config"),
        ("port: x", "settings.yaml: port: expected an integer"),
        ("port: [1]", "settings.yaml: port: expected a single value"),
        ("port: true", "settings.yaml: port: expected a value"),
        ("enable_pdmux: 1", "settings.yaml: enable_pdmux: expected true or false"),
        ("port: 1\n--port: 2", "settings.yaml: unknown flag"),
        ("tp-size: 1\ntensor_parallel_size: 1", "tensor_parallel_size: given twice"),
        ("- port", "settings.yaml: expected a mapping"),
        ("slo_classes: 5", "settings.yaml: slo_classes: expected a mapping of class names"),
        ("slo_classes: {1: {tbt_ms: 5}}", "slo_classes: 1: the name of a class must be text"),
        ("slo_classes: {default: {tbt_ms: 5}}", "slo_classes: default: this name is taken"),
        ("slo_classes: {chat: 5}", "slo_classes: chat: expected a mapping of limits, got 5"),
        ("slo_classes: {chat: {tbt: 5}}", "settings.yaml: slo_classes: chat: tbt is not a known"),
        ("slo_classes: {chat: {tbt_ms: 0}}", "slo_classes: chat: tbt_ms must be a number"),
        ("slo_classes: {chat: {tbt_ms: true}}", "slo_classes: chat: tbt_ms must be a number"),
        ("slo_classes: {chat: {tbt_ms: fast}}", "slo_classes: chat: tbt_ms must be a number"),
        ("slo_classes: {}\nslo-classes: {}", "slo-classes: given twice, see --slo-classes"),
        ("a: [", "settings.yaml is not valid YAML"),
    ],
)
def test_config_file_errors_name_file_and_key(yaml_file, content, message):
    with pytest.raises(ConfigError, match=message):
        parse("--config", yaml_file(content))


def test_service_classes_of_the_config_file(yaml_file):
    path = yaml_file(
        "slo_tbt_ms: 50\nslo_classes: {chat: {ttft_ms: 400, tbt_ms: null}, batch: {tbt_ms: 1000}}"
    )
    args = parse("--config", path, "--slo-ttft-ms", "800")
    assert args.slo_classes == {"chat": {"ttft_ms": 400.0}, "batch": {"tbt_ms": 1000.0}}
    assert args.service_levels().default.slo == Slo(ttft_s=0.8, tbt_s=0.05)
    levels = args.service_levels()
    assert levels.resolve("chat") == ServiceLevel(Slo(ttft_s=0.4, tbt_s=0.05), "chat")
    assert levels.resolve("batch") == ServiceLevel(Slo(ttft_s=0.8, tbt_s=1.0), "batch")
    assert parse("--config", yaml_file("slo_classes: null")).slo_classes == {}


def test_service_classes_made_in_python_are_checked_too():
    with pytest.raises(ConfigError, match=r"^slo_classes: chat: tbt_ms must be a number"):
        ServerArgs(model_path="m", slo_classes={"chat": {"tbt_ms": -1.0}}).check()


def test_without_flags_nothing_is_asked_of_time():
    assert parse().service_levels().default.slo == Slo()


def test_a_limit_for_each_token_holds_without_one_for_the_prompt():
    slo = parse("--slo-ttft-ms-per-token", "2").service_levels().default.slo
    assert [slo.ttft_limit_s(tokens) for tokens in (1, 1000)] == [0.002, 2.0]
    both = (
        parse("--slo-ttft-ms-per-token", "2", "--slo-ttft-ms", "500").service_levels().default.slo
    )
    assert [both.ttft_limit_s(tokens) for tokens in (1, 1000)] == [0.5, 2.0]


def test_empty_config_file_changes_nothing(yaml_file):
    assert parse("--config", yaml_file("")) == parse()


def test_missing_config_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot read .*absent.yaml: No such file"):
        parse("--config", str(tmp_path / "absent.yaml"))


@pytest.mark.parametrize(
    ("text", "count"),
    [("4096", 4096), ("1k", 1000), ("1K", 1024), ("2M", 2 * 1024**2), ("1.5k", 1500), ("-1", -1)],
)
def test_token_counts(text, count):
    assert token_count(text) == count


@pytest.mark.parametrize("text", ["", "K", "4KB", "1.5", "1e3", "0x10", "4 4"])
def test_what_is_no_token_count(text):
    with pytest.raises(ValueError, match="expected a whole count"):
        token_count(text)


def test_json_object_takes_nothing_else():
    assert json_object('{"a": null}') == {"a": None}
    with pytest.raises(ValueError, match="expected a JSON object"):
        json_object("3")


def test_help_has_every_flag_and_a_text_for_it():
    text = make_parser().format_help()
    assert "--config FILE" in text
    for spec in FLAGS:
        assert all(name in text for name in spec.names)
        assert spec.help


def test_no_unsupported_name_is_taken_for_an_abbreviation_of_ours():
    ours = {name for spec in FLAGS for name in spec.names} | {"--config", "--help", "--version"}
    assert not UNSUPPORTED_FLAGS & ours
    swallowed = [
        (theirs, name) for theirs in UNSUPPORTED_FLAGS for name in ours if name.startswith(theirs)
    ]
    assert swallowed == []


def test_flags_page_is_up_to_date():
    done = subprocess.run(
        [sys.executable, str(ROOT / "docs" / "generate_flags.py"), "--check"],
        env={"PYTHONPATH": str(ROOT / "python")},
        timeout=60,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_launch_prints_one_line_and_returns_2_for_a_bad_flag(capsys):
    assert main(["--model-path", "m", "--quux"]) == 2
    assert capsys.readouterr().err == "sglang: error: unknown flag: --quux\n"


def test_version_is_printed(capsys):
    with pytest.raises(SystemExit) as left:
        main(["--version"])
    assert left.value.code == 0
    assert capsys.readouterr().out.strip() == sglang.__version__


def test_public_names_are_resolved_on_use():
    assert sglang.ServerArgs is ServerArgs
    assert "ServerArgs" in dir(sglang)
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = sglang.Nothing


@pytest.mark.parametrize(
    ("asked", "gpus", "found"),
    [("auto", 0, "cpu"), ("auto", 1, "cuda"), ("cuda", 1, "cuda"), ("cpu", 1, "cpu")],
)
def test_device_is_settled_by_looking(monkeypatch, asked, gpus, found):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert resolve_device(parse("--device", asked)) == found


@pytest.mark.parametrize(
    ("argv", "gpus", "message"),
    [
        (["--device", "cuda"], 0, "--device cuda was asked for"),
        (["--attention-backend", "triton"], 0, "--attention-backend triton needs a GPU"),
        (["--base-gpu-id", "1"], 1, "--base-gpu-id 1: this machine has 1 GPU"),
    ],
)
def test_absent_devices_are_named(monkeypatch, argv, gpus, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    with pytest.raises(ConfigError, match=message):
        resolve_device(parse(*argv))


def test_pdmux_defaults_without_a_file():
    assert parse("--enable-pdmux").policy().pdmux == PdmuxConfig(
        sm_group_num=8, manual_divisions=(), split_forward_token_budget=65536, decode_bs_divisor=36
    )


CHUNKED = ("--enable-pdmux", "--pd-multiplex-policy", "chunked:512")


@pytest.mark.parametrize(
    ("argv", "policy"),
    [
        ((), MultiplexPolicy("turns")),
        (("--enable-mixed-chunk",), MultiplexPolicy("chunked")),
        (("--enable-pdmux",), MultiplexPolicy("adaptive", PdmuxConfig())),
        (("--enable-mixed-chunk", "--enable-pdmux"), MultiplexPolicy("chunked", PdmuxConfig())),
        ((*CHUNKED, "--enable-mixed-chunk"), MultiplexPolicy("chunked:512", PdmuxConfig())),
        (
            ("--enable-pdmux", "--pd-multiplex-policy=static:84/48", "--sm-group-num=4"),
            MultiplexPolicy("static:84/48", PdmuxConfig(sm_group_num=4)),
        ),
    ],
)
def test_policies(argv, policy):
    assert parse(*argv).policy() == policy


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ("", "expected one of adaptive, .*, got ''"),
        ("split", "expected one of adaptive, .*, got 'split'"),
        ("chunked:", "expected chunked:N with N tokens a step, got 'chunked:'"),
        ("chunked:0", "expected chunked:N"),
        ("static:84", "expected static:P/D"),
        ("table:1", "policy table takes nothing after its name"),
    ],
)
def test_unknown_policies_are_named(policy, message):
    with pytest.raises(ConfigError, match=f"^--pd-multiplex-policy {message}"):
        parse("--enable-pdmux", "--pd-multiplex-policy", policy)


def test_a_step_is_not_larger_than_a_prefill_batch():
    with pytest.raises(ConfigError, match=r"^--max-prefill-tokens 511 is less than the 512 tokens"):
        parse(*CHUNKED, "--max-prefill-tokens", "511")


@pytest.mark.parametrize(
    "argv",
    [
        (),
        ("--enable-pdmux", "--pd-multiplex-policy", "table"),
        ("--enable-pdmux", "--enable-mixed-chunk"),
    ],
)
def test_only_adaptive_sheds(argv):
    with pytest.raises(ConfigError, match=r"^--slo-overload shed needs .* adaptive"):
        parse(*argv, "--slo-overload", "shed")
    parse("--enable-pdmux", "--pd-multiplex-policy", "adaptive:no-guard", "--slo-overload=shed")


def test_mixed_chunks_contradict_other_policies():
    with pytest.raises(ConfigError, match=r"^--enable-mixed-chunk contradicts --pd-.* table"):
        parse("--enable-mixed-chunk", "--enable-pdmux", "--pd-multiplex-policy", "table")
    with pytest.raises(ConfigError, match=r"^--enable-mixed-chunk cuts prompts"):
        parse("--enable-mixed-chunk", "--chunked-prefill-size", "-1")


def test_pdmux_file(yaml_file):
    path = yaml_file(
        "sm_group_num: 4\nmanual_divisions: [[112, 20, 1], [80, 52, 16]]\ndecode_bs_divisor: 10\n"
    )
    config = (
        parse("--enable-pdmux", "--pdmux-config-path", path, "--sm-group-num", "4").policy().pdmux
    )
    assert config.manual_divisions == (Division(112, 20, 1), Division(80, 52, 16))
    assert config.manual_divisions[1].min_decode_reqs == 16
    assert (config.sm_group_num, config.decode_bs_divisor) == (4, 10)
    assert config.split_forward_token_budget == 65536


def test_pdmux_group_count_of_the_flag_holds_where_the_file_has_none(yaml_file):
    assert PdmuxConfig.load(yaml_file("decode_bs_divisor: 1"), 5).sm_group_num == 5


@pytest.mark.parametrize(
    ("content", "flag_value", "message"),
    [
        ("sm_groups: 4", None, "settings.yaml: unknown key sm_groups; known are sm_group_num"),
        ("sm_group_num: 10", 8, "--sm-group-num 8 contradicts sm_group_num: 10 in .*settings.yaml"),
        ("sm_group_num: 2", None, "settings.yaml: sm_group_num must be at least 3"),
        ("sm_group_num: '8'", None, "settings.yaml: sm_group_num: Expected `int`, got `str`"),
        ("sm_group_num: true", None, "settings.yaml: sm_group_num: Expected `int`, got `bool`"),
        ("decode_bs_divisor: 0", None, "settings.yaml: decode_bs_divisor must be at least 1"),
        ("split_forward_token_budget: 0", None, "split_forward_token_budget must be at least 1"),
        ("manual_divisions: [[1, 1, 1]]", None, "manual_divisions must have .* = 6 rows, got 1"),
        ("manual_divisions: [[1, 1, 1]]", 4, "manual_divisions must have .* = 2 rows, got 1"),
        ("manual_divisions: [[1, 1]]", 3, r"manual_divisions\[.*\]: Expected"),
        ("manual_divisions: [[1, x, 1]]", 3, r"manual_divisions\[.*\]: Expected `int`"),
        ("manual_divisions: [[0, 1, 1]]", 3, r"manual_divisions\[0\] needs at least one SM"),
        ("manual_divisions: [[1, 1, -1]]", 3, r"manual_divisions\[0\] needs"),
        ("manual_divisions: [[1, 1, 8], [1, 1, 4]]", 4, r"rising thresholds .* \[8, 4\]"),
        ("manual_divisions: [[1, 1, 8], [1, 1, 8]]", 4, r"rising thresholds .* \[8, 8\]"),
        ("- 1", None, "settings.yaml: expected a mapping"),
    ],
)
def test_pdmux_file_errors_name_file_and_key(yaml_file, content, flag_value, message):
    with pytest.raises(ConfigError, match=message):
        PdmuxConfig.load(yaml_file(content), flag_value)


def test_a_bad_pdmux_file_is_found_when_the_flags_are_read(yaml_file):
    with pytest.raises(ConfigError, match="decode_bs_divisor"):
        parse("--enable-pdmux", "--pdmux-config-path", yaml_file("decode_bs_divisor: 0"))


@pytest.mark.parametrize(
    ("argv", "flag"),
    [
        (["--constrained-json-whitespace-pattern", " ?"], "--constrained-json-whitespace-pattern"),
        (
            [
                "--constrained-json-whitespace-pattern",
                " ?",
                "--grammar-backend",
                "llguidance",
                "--constrained-json-disable-any-whitespace",
            ],
            "--constrained-json-whitespace-pattern",
        ),
        (
            ["--constrained-json-disable-any-whitespace", "--grammar-backend", "none"],
            "--constrained-json-disable-any-whitespace",
        ),
        (["--grammar-backend", "xgrammar", "--skip-tokenizer-init"], "--grammar-backend"),
    ],
)
def test_grammar_flags_that_would_be_ignored_are_refused(argv: list[str], flag: str) -> None:
    with pytest.raises(ConfigError, match=flag):
        ServerArgs.from_cli(["--model-path", "m", *argv])


def test_grammar_flags_that_agree_are_taken() -> None:
    args = ServerArgs.from_cli(
        [
            "--model-path",
            "m",
            "--grammar-backend",
            "llguidance",
            "--constrained-json-whitespace-pattern",
            "[ ]?",
        ]
    )
    assert args.grammar_backend == "llguidance"
    assert args.constrained_json_whitespace_pattern == "[ ]?"
