"""A real trace on a model of Llama-3.1-8B's shape: multi-turn reuse and both lanes at work."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmark.serve_trace import TraceLoad, append, run, summary

MODEL = Path(__file__).parents[2] / "benchmark" / "models" / "llama-3.1-8b"
MAX_INPUT_LEN = 32768


@pytest.mark.timeout(540)
def test_mooncake_conversation_at_one_request_a_second(mooncake_trace, results_dir):
    # Turns of a conversation lie minutes apart in the trace: the first minute's rows share no more
    # than a system prompt. Whole conversations show reuse from turn to turn.
    load = TraceLoad(
        mooncake_trace, rate=1.0, seconds=60.0, max_input_len=MAX_INPUT_LEN, min_turns=2
    )
    (row,) = run(MODEL, [load], ["--enable-pd-multiplex"])
    append(row, results_dir / "serving_h100.jsonl")
    print("\n" + summary(row))
    assert row["failed"] == 0
    assert row["completed"] >= 55  # the conversations that fit in 60 requests
    assert row["both_busy_s"] > 0
    cache = row["cache_report"]
    system_prompt_tokens = 512 * row["completed"]
    assert cache["total_cached_tokens"] > 5 * system_prompt_tokens
    split_launches = sum(count for name, count in row["launches"].items() if name != "whole")
    assert split_launches > 0
