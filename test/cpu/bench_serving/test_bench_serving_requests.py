"""What options make of the requests, against the server of conftest."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Bench = Callable[..., tuple[int, dict[str, Any]]]

RANDOM = (
    *("--dataset-name", "random-ids", "--vocab-size", "99", "--random-range-ratio", "1"),
    *("--num-prompts", "4", "--random-input-len", "11", "--random-output-len", "5"),
)


def lines(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_logprobs_are_asked_for_under_their_own_names(bench: Bench, server: Any) -> None:
    flags = ("--return-logprob", "--top-logprobs-num", "2", "--logprob-start-len", "3")
    code, _ = bench(*RANDOM, *flags, "--token-ids-logprob", "4", "5")
    assert code == 0
    body = server.bodies[-1][1]
    asked = ("return_logprob", "top_logprobs_num", "logprob_start_len", "token_ids_logprob")
    assert [body[name] for name in asked] == [True, 2, 3, [4, 5]]


def test_profilers_run_during_the_measurement_only(bench: Bench, server: Any) -> None:
    flags = ("--profile", "--profile-output-dir", "/d", "--profile-prefix", "p")
    code, _ = bench(*RANDOM, *flags, "--profile-by-stage", "--profile-stages", "decode")
    assert code == 0
    start, stop = server.profile_calls
    body = {
        "activities": ["CPU", "GPU"],
        "profile_by_stage": True,
        "profile_stages": ["decode"],
        "output_dir": "/d",
        "profile_prefix": "p",
    }
    assert start == ("/start_profile", body, 1)  # after the warm-up request
    assert stop == ("/stop_profile", {}, 5)


def test_profilers_given_steps_stop_by_themselves(bench: Bench, server: Any) -> None:
    bench(*RANDOM, "--profile", "--profile-num-steps", "3", "--profile-start-step", "2")
    [(path, body, _)] = server.profile_calls
    assert (path, body["num_steps"], body["start_step"]) == ("/start_profile", 3, 2)


def test_a_profiler_that_does_not_start_is_an_error(
    bench: Bench, server: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    server.profile_status = 404
    assert bench(*RANDOM, "--profile") == (2, {})
    assert "--profile: http" in capsys.readouterr().err


def test_requests_are_printed_and_throughput_is_drawn(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    code, result = bench(*RANDOM, "--print-requests", "--plot-throughput")
    assert code == 0
    out = capsys.readouterr().out
    printed = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    assert sorted(row["conversation"] for row in printed) == [0, 1, 2, 3]
    assert {row["text"] for row in printed} == {"w0 w1 w2 w3 w4 "}
    chart = out[out.index("tok/s  in flight") :].splitlines()[1].split()
    assert (chart[0], float(chart[1])) == ("0", result["total_output_tokens"])
    assert set(chart[3]) == {"#"}


def test_openai_rows_are_sent_as_they_are(bench: Bench, server: Any, tmp_path: Path) -> None:
    rows = [
        {"messages": [{"role": "user", "content": f"question {i}"}], "max_tokens": 3, "top_p": 0.5}
        for i in range(3)
    ]
    path = lines(tmp_path / "rows.jsonl", [*rows, {**rows[0], "tools": [{"type": "function"}]}])
    code, result = bench(
        *("--backend", "sglang-oai-chat", "--dataset-name", "openai", "--dataset-path", path),
        *("--dataset-offset", "1", "--max-concurrency", "1", "--warmup-requests", "0"),
        *("--extra-request-body", '{"top_k": 3}'),
    )
    assert (code, result["completed"], result["total_output_tokens"]) == (0, 4, 12)
    bodies = [body for _, body in server.bodies]
    assert [body["messages"][0]["content"][-1] for body in bodies] == ["1", "2", "0", "0"]
    assert all((body["top_p"], body["top_k"], body["max_tokens"]) == (0.5, 3, 3) for body in bodies)
    assert [body.get("tools") for body in bodies].count(None) == 3


def test_agentic_traces_go_on_with_the_servers_answers(
    bench: Bench, server: Any, tmp_path: Path
) -> None:
    def turn(*texts: str) -> dict[str, Any]:
        return {"messages": [{"role": "user", "content": text} for text in texts]}

    conversations = [[turn("a", "b"), turn("c"), turn("d")], [turn("e")]]
    path = tmp_path / "trace.json"
    path.write_text(json.dumps({"metadata": {}, "conversations": conversations}))
    code, result = bench(
        *("--backend", "lmdeploy-chat", "--dataset-name", "agentic-trace"),
        *("--dataset-path", str(path), "--agentic-max-turns", "2", "--sharegpt-output-len", "2"),
        *("--max-concurrency", "1", "--warmup-requests", "0"),
    )
    assert (code, result["completed"]) == (0, 3)
    said = [[m["content"] for m in body["messages"]] for _, body in server.bodies]
    assert said == [["a", "b"], ["a", "b", "w0 w1 ", "c"], ["e"]]


def test_embeddings_have_latencies_and_no_tokens(bench: Bench, server: Any, tmp_path: Path) -> None:
    path = lines(tmp_path / "rows.jsonl", [{"prompt": "one two three", "output_len": 4}] * 3)
    code, result = bench(
        *("--backend", "sglang-embedding", "--dataset-name", "custom", "--dataset-path", path),
        *("--prompt-suffix", " four", "--goodput", "e2el:60000"),
    )
    assert (code, result["completed"], result["total_output_tokens"]) == (0, 3, 0)
    assert result["total_input_tokens"] == 12
    assert result["slo_attainment"] == 1.0
    assert server.bodies[-1] == (
        "/v1/embeddings",
        {"model": "fake-model", "input": "one two three four"},
    )


def test_rounds_of_a_trace_are_turns(bench: Bench, server: Any, tmp_path: Path) -> None:
    folder = tmp_path / "traces"
    folder.mkdir()
    row = {"timestamp": 0, "input_length": 600, "output_length": 2, "hash_ids": [1, 2]}
    lines(folder / "toolagent_trace.jsonl", [row, {**row, "hash_ids": [1, 3]}])
    code, result = bench(
        *("--dataset-name", "mooncake", "--dataset-path", str(folder), "--vocab-size", "900"),
        *("--mooncake-workload", "toolagent", "--mooncake-num-rounds", "3", "--output-details"),
        *("--warmup-requests", "0", "--max-concurrency", "1"),
    )
    assert code == 0
    assert result["turns"] == [0, 1, 2, 0, 1, 2]
    assert result["input_lens"] == [600, 1114, 1628] * 2
    assert result["cached_tokens"] == [0, 602, 1116, 512, 602, 1116]


def test_groups_name_themselves_to_routers(bench: Bench, server: Any) -> None:
    code, _ = bench(
        *("--dataset-name", "generated-shared-prefix", "--vocab-size", "90"),
        *("--gsp-num-groups", "2", "--gsp-prompts-per-group", "3", "--gsp-system-prompt-len", "9"),
        *("--gsp-question-len", "4", "--gsp-output-len", "2", "--warmup-requests", "0"),
        *("--gsp-send-routing-key", "--gsp-ordered", "--max-concurrency", "1"),
    )
    assert code == 0
    keys = [headers["X-SMG-Routing-Key"] for headers in server.headers]
    assert keys == ["42-0"] * 3 + ["42-1"] * 3
    systems = {tuple(body["input_ids"][:9]): None for _, body in server.bodies}
    assert len(systems) == 2
