"""Whole benchmarks against the server of conftest."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sglang.bench.runner import NOT_ASKED

LIMIT_S = 30

Bench = Callable[..., tuple[int, dict[str, Any]]]

RANDOM: tuple[str, ...] = (
    "--dataset-name",
    "random-ids",
    "--vocab-size",
    "99",
    "--random-range-ratio",
    "1",
)
RANDOM += ("--num-prompts", "6", "--random-input-len", "11", "--random-output-len", "5")

SURFACE = Path(__file__).parents[3] / "docs" / "data" / "upstream_surface.json"
RESULT = json.loads(SURFACE.read_text())["bench_result"]
KEYS = set(RESULT["always"])
OWN_KEYS = {"seed", "failed", "interrupted", "client_max_start_lag_ms"}
GOODPUT_KEYS = set(RESULT["goodput"])
DETAIL_KEYS = set(RESULT["details"])


def test_result_has_the_public_keys(bench: Bench) -> None:
    code, result = bench(*RANDOM, "--tag", "t", "--request-rate", "2000")
    assert code == 0
    assert set(result) == KEYS | OWN_KEYS
    assert (result["tag"], result["request_rate"], result["completed"]) == ("t", 2000.0, 6)
    assert (result["total_input_tokens"], result["total_output_tokens"]) == (66, 30)
    assert result["accept_length"] == 2.5
    assert result["server_info"]["version"] == "fake"
    assert 0 < result["median_ttft_ms"] <= result["p99_ttft_ms"]
    assert result["mean_e2e_latency_ms"] >= result["mean_ttft_ms"]


def test_options_add_their_keys(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    _, result = bench(
        *RANDOM, "--output-details", "--cache-report", "--goodput", "ttft:60000", "e2el:0.000001"
    )
    details = {"conversations", "turns", "due_times", "start_times", "latencies"}
    details |= {"cached_tokens", "itl_p99s_ms"} | DETAIL_KEYS
    assert set(result) == KEYS | OWN_KEYS | GOODPUT_KEYS | details | {"cache_report"}
    assert all(len(result[name]) == 6 for name in details)
    assert result["output_lens"] == [5] * 6
    assert [len(itls) <= 4 for itls in result["itls"]] == [True] * 6
    assert result["generated_texts"] == ["w0 w1 w2 w3 w4 "] * 6
    assert all(start_s >= 0 for start_s in result["start_times"])
    assert result["slo_attainment_by_metric"] == {"ttft": 1.0, "e2el": 0.0}
    assert (result["slo_attainment"], result["request_goodput"]) == (0.0, 0.0)
    assert result["request_rate"] == "inf"
    report = capsys.readouterr().out
    for label in (
        *("Serving Benchmark Result", "Successful requests:", "Benchmark duration (s):"),
        *("Total input tokens:", "Total generated tokens:", "Request throughput (req/s):"),
        *("Output token throughput (tok/s):", "Mean E2E Latency (ms):", "Mean TTFT (ms):"),
        *("Median TTFT (ms):", "P99 TTFT (ms):", "P99 TPOT (ms):", "P99 ITL (ms):"),
        *("Max ITL (ms):", "Request goodput (req/s):", "Cached tokens:"),
    ):
        assert label in report


def test_native_request_body(bench: Bench, server: Any) -> None:
    extra = '{"priority": 1, "sampling_params": {"top_k": 3}}'
    code, _ = bench(*RANDOM, "--extra-request-body", extra, "--header", "X-A=b", "--top-p", "0.5")
    assert code == 0
    path, body = server.bodies[-1]
    assert path == "/generate"
    assert len(body.pop("input_ids")) == 11
    assert body == {
        "sampling_params": {
            **{"temperature": 0.0, "top_p": 0.5, "ignore_eos": True},
            **{"max_new_tokens": 5, "top_k": 3},
        },
        "stream": True,
        "priority": 1,
    }
    assert server.headers[-1]["X-A"] == "b"


def test_warm_up_comes_before_the_flush(bench: Bench, server: Any) -> None:
    bench(*RANDOM, "--warmup-requests", "2", "--flush-cache", "--random-output-len", "40")
    assert server.flushes == [2]
    lengths = [body["sampling_params"]["max_new_tokens"] for _, body in server.bodies]
    assert lengths == [32] * 2 + [40] * 6


def test_max_concurrency_bounds_what_is_in_flight(bench: Bench, server: Any) -> None:
    """No token comes before as many requests are there as may be."""
    awaited = 2

    async def until_all_are_there() -> None:
        async with asyncio.timeout(LIMIT_S):
            while server.max_in_flight < awaited:
                await asyncio.sleep(0)

    server.before_token = until_all_are_there
    load = (*RANDOM, "--num-prompts", "20", "--warmup-requests", "0")
    _, result = bench(*load, "--max-concurrency", "2")
    assert result["completed"] == 20
    assert server.max_in_flight == 2
    awaited = 20
    _, result = bench(*load)
    assert result["completed"] == 20
    assert server.max_in_flight == 20


def test_without_streaming_the_first_token_is_the_last(bench: Bench, server: Any) -> None:
    _, result = bench(*RANDOM, "--disable-stream", "--disable-ignore-eos")
    assert result["total_output_tokens"] == 30
    assert result["mean_ttft_ms"] == result["mean_e2e_latency_ms"] > 0
    assert server.bodies[-1][1]["stream"] is False
    assert server.bodies[-1][1]["sampling_params"]["ignore_eos"] is False


GSP: tuple[str, ...] = (
    "--dataset-name",
    "generated-shared-prefix",
    "--vocab-size",
    "90",
    "--gsp-num-groups",
    "2",
)
GSP += ("--gsp-prompts-per-group", "2", "--gsp-system-prompt-len", "30")
GSP += ("--gsp-question-len", "6", "--gsp-output-len", "4", "--gsp-num-turns", "3")


def test_native_turns_grow_by_the_tokens_answered(bench: Bench, server: Any) -> None:
    code, result = bench(*GSP, "--output-details", "--cache-report", "--warmup-requests", "0")
    assert code == 0
    assert result["completed"] == 12
    by_length: dict[int, list[list[int]]] = {}
    for _, body in server.bodies:
        by_length.setdefault(len(body["input_ids"]), []).append(body["input_ids"])
    assert {length: len(prompts) for length, prompts in by_length.items()} == {36: 4, 46: 4, 56: 4}
    for prompt in by_length[56]:
        assert prompt[36:40] == prompt[46:50] == [100, 101, 102, 103]
        assert prompt[:46] in by_length[46]
    cached = list(zip(result["turns"], result["cached_tokens"], strict=True))
    assert {c for turn, c in cached if turn == 1} == {40}  # first prompt and first answer
    assert {c for turn, c in cached if turn == 2} == {50}
    report = result["cache_report"]
    assert [turn["prompt_tokens"] for turn in report["by_turn"]] == [144, 184, 224]
    assert report["total_cached_tokens"] == sum(c for _, c in cached)


def write_questions(tmp_path: Path) -> str:
    path = tmp_path / "questions.jsonl"
    rows = [{"turns": [f"first question {i}", f"second {i}"]} for i in range(3)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("reports_cache", [True, False])
def test_chat_turns_carry_the_conversation(
    bench: Bench,
    server: Any,
    tmp_path: Path,
    reports_cache: bool,
    capsys: pytest.CaptureFixture[str],
) -> None:
    server.reports_cache = reports_cache
    flags: tuple[str, ...] = (
        "--backend",
        "sglang-oai-chat",
        "--dataset-name",
        "mt-bench",
        "--cache-report",
    )
    flags += ("--dataset-path", write_questions(tmp_path), "--mt-bench-output-len", "3")
    code, result = bench(*flags, "--output-details", "--warmup-requests", "0")
    assert code == 0
    assert (result["completed"], result["turns"]) == (6, [0, 1] * 3)
    second_turns = [body for _, body in server.bodies if len(body["messages"]) == 3]
    assert len(second_turns) == 3
    body = next(b for b in second_turns if b["messages"][0]["content"] == "first question 1")
    assert body["messages"] == [
        {"role": "user", "content": "first question 1"},
        {"role": "assistant", "content": "w0 w1 w2 "},
        {"role": "user", "content": "second 1"},
    ]
    assert (body["model"], body["max_tokens"], body["stream"]) == ("fake-model", 3, True)
    assert body["stream_options"]["include_usage"] is True
    assert result["input_lens"] == [3, 8] * 3
    report = capsys.readouterr().out
    if reports_cache:
        assert result["cached_tokens"][1::2] == [6, 6, 6]
        assert "turn 2: 18 of 24 (75.0 %), 3 requests" in report
    else:
        assert result["cache_report"] is None
        assert "--enable-cache-report" in report


def test_completions_send_text(bench: Bench, server: Any, tmp_path: Path) -> None:
    path = tmp_path / "custom.jsonl"
    path.write_text('{"prompt": "one two three", "output_len": 4}\n')
    flags = ("--dataset-name", "custom", "--dataset-path", str(path), "--served-model-name", "m")
    code, result = bench("--backend", "sglang-oai", *flags)
    assert code == 0
    assert (result["total_input_tokens"], result["total_output_tokens"]) == (3, 4)
    body = server.bodies[-1][1]
    assert (body["prompt"], body["model"], body["ignore_eos"]) == ("one two three", "m", True)
    assert result["total_output_tokens_retokenized"] is None  # no tokenizer to be had


def test_a_real_tokenizer_makes_text_and_counts_answers(
    bench: Bench, server: Any, tmp_path: Path
) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path / "tokenizer"
    folder.mkdir()
    vocab = {word: i for i, word in enumerate(["<unk>", *(f"w{i}" for i in range(60))])}
    words = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>"})
    )
    server.model_info = {"tokenizer_path": str(folder)}
    flags: tuple[str, ...] = (
        "--dataset-name",
        "random-ids",
        "--num-prompts",
        "3",
        "--random-range-ratio",
        "1",
    )
    flags += ("--random-input-len", "9", "--random-output-len", "4")
    _, by_text = bench(*flags)
    assert "<unk>" not in server.bodies[-1][1]["text"]
    assert by_text["total_input_tokens"] == 27
    assert by_text["total_output_tokens_retokenized"] == 12
    bench(*flags, "--tokenize-prompt")
    assert all(0 < token < 61 for token in server.bodies[-1][1]["input_ids"])


def test_trace_replay_sends_the_shared_prefix(bench: Bench, server: Any, tmp_path: Path) -> None:
    rows = [
        {"timestamp": 0, "input_length": 600, "output_length": 2, "hash_ids": [1, 2]},
        {"timestamp": 40, "input_length": 700, "output_length": 2, "hash_ids": [1, 3]},
    ]
    path = tmp_path / "trace.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, result = bench(
        *("--dataset-name", "mooncake", "--dataset-path", str(path), "--use-trace-timestamps"),
        *("--vocab-size", "900", "--output-details", "--warmup-requests", "0"),
        *("--max-concurrency", "1"),  # however late the first answer, the second prompt is after it
    )
    assert code == 0
    assert result["request_rate"] == "trace"
    assert result["due_times"] == [0.0, 0.04]
    assert result["start_times"][1] >= 0.04
    assert (result["input_lens"], result["cached_tokens"]) == ([600, 700], [0, 512])


def test_failures_are_counted_and_shown(
    bench: Bench, server: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    server.status = lambda number: 503 if number % 2 == 0 else 200
    code, result = bench(*RANDOM, "--output-details", "--max-concurrency", "1")
    assert code == 0
    assert (result["completed"], result["failed"]) == (3, 3)
    assert result["errors"][0].startswith("HTTP 503: ")
    captured = capsys.readouterr()
    assert "Failed requests:" in captured.out
    assert "3 x HTTP 503" in captured.err
    assert "no room" in captured.err


def test_exit_code_when_nothing_completed(bench: Bench, server: Any) -> None:
    server.status = lambda number: 500
    code, result = bench(*RANDOM, "--warmup-requests", "0")
    assert (code, result["completed"], result["failed"]) == (1, 0, 6)
    assert result["mean_ttft_ms"] == 0.0


def test_later_turns_fail_with_the_one_before(bench: Bench, server: Any) -> None:
    server.status = lambda number: 500 if number == 1 else 200
    _, result = bench(*GSP, "--warmup-requests", "0", "--output-details", "--max-concurrency", "1")
    assert (result["completed"], result["failed"]) == (9, 3)
    assert result["errors"][1:3] == [NOT_ASKED, NOT_ASKED]


def test_failed_warm_up_and_missing_server_are_errors(
    bench: Bench, server: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    server.status = lambda number: 400
    assert bench(*RANDOM) == (2, {})
    assert "warm-up request failed: HTTP 400" in capsys.readouterr().err
    assert bench(*RANDOM, "--base-url", "http://127.0.0.1:1", "--ready-check-timeout-sec", "0") == (
        2,
        {},
    )
    assert "--ready-check-timeout-sec" in capsys.readouterr().err


def test_missing_vocabulary_is_an_error(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench("--dataset-name", "random-ids") == (2, {})
    assert "--vocab-size" in capsys.readouterr().err


def test_empty_file_is_an_error(
    bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "empty.jsonl"
    path.touch()
    flags = ("--backend", "sglang-oai-chat", "--dataset-name", "mt-bench")
    assert bench(*flags, "--dataset-path", str(path)) == (2, {})
    assert "holds no prompts" in capsys.readouterr().err


def test_interrupt_reports_what_was_measured(
    bench: Bench, server: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    tokens_sent = 0

    async def interrupt_in_the_second_request() -> None:
        nonlocal tokens_sent
        tokens_sent += 1
        if tokens_sent == 8:  # the first answer has five tokens
            os.kill(os.getpid(), signal.SIGINT)
            await asyncio.sleep(LIMIT_S)  # ended by the client's disconnection

    server.before_token = interrupt_in_the_second_request
    code, result = bench(*RANDOM, "--warmup-requests", "0", "--max-concurrency", "1")
    assert (code, result["interrupted"]) == (130, True)
    assert (result["completed"], result["failed"]) == (1, 0)
    assert "Interrupted" in capsys.readouterr().out


def test_results_are_appended(bench: Bench, tmp_path: Path) -> None:
    bench(*RANDOM)
    bench(*RANDOM)
    assert len((tmp_path / "result.jsonl").read_text().splitlines()) == 2


def test_importing_the_tool_loads_neither_torch_nor_the_runtime() -> None:
    code = (
        "import sys, sglang.bench_serving, sglang.bench.session\n"
        "assert not [m for m in sys.modules if m in ('torch', 'transformers')], 'heavy'\n"
        "assert not [m for m in sys.modules if m.startswith('sglang.srt')], 'runtime'\n"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code], check=True, env=env, timeout=60)
