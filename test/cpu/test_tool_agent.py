"""The synthetic tool-and-agent trace: what it promises of its tokens, and that it is replayable."""

from __future__ import annotations

import itertools

import pytest

from benchmark import tool_agent
from benchmark.tool_agent import (
    AGENTS,
    MAX_CONTEXT,
    SHORTEST_USEFUL_LIMIT,
    SYSTEM_BLOCKS,
    summarise,
    trace,
    trace_of,
)
from sglang.bench.datasets.mooncake import BLOCK_TOKENS, TraceRow, read_trace


@pytest.fixture(scope="module")
def rows():
    return trace(300, rate=2.0, seed=0)


def sessions_of(rows):
    """Rows by the first block that is a session's own."""
    found = {}
    for row in rows:
        own = next(block for block in row.hash_ids if block >= AGENTS * tool_agent._SESSION_IDS)
        found.setdefault(own, []).append(row)
    return list(found.values())


def test_it_is_deterministic_and_depends_on_the_seed(rows):
    assert trace(300, rate=2.0, seed=0) == rows
    assert trace(300, rate=2.0, seed=1) != rows


def test_lengths_are_within_the_documented_bounds(rows):
    assert all(SYSTEM_BLOCKS[0] * BLOCK_TOKENS < row.input_tokens <= MAX_CONTEXT for row in rows)
    assert all(1 <= row.output_tokens <= 500 for row in rows)
    found = summarise(rows)
    assert 60 <= found.output_median <= 100
    assert 8000 <= found.input_mean <= 13000
    assert 0.85 <= found.reused_mean / found.input_mean < 1


def test_it_is_steady_at_about_the_rate_asked_for(rows):
    times_ms = [row.timestamp_ms for row in rows]
    assert times_ms == sorted(times_ms)
    seconds = times_ms[-1] / 1e3
    assert len(rows) / seconds == pytest.approx(2.0, rel=0.25)
    first_half = sum(time_ms < times_ms[-1] / 2 for time_ms in times_ms)
    assert first_half / len(rows) == pytest.approx(0.5, abs=0.12)


def test_a_turn_continues_the_prompt_before_it(rows):
    sessions = sessions_of(rows)
    assert sum(len(session) > 3 for session in sessions) > 20
    for session in sessions:
        for before, after in itertools.pairwise(session):
            assert after.hash_ids[: len(before.hash_ids)] == before.hash_ids
            added = after.input_tokens - before.input_tokens - before.output_tokens
            assert 100 <= added <= 800
            assert after.timestamp_ms > before.timestamp_ms


def test_sessions_share_system_prompts_and_nothing_else(rows):
    prefixes = {}
    for session in sessions_of(rows):
        last = session[-1].hash_ids
        system = tuple(b for b in last if b < AGENTS * tool_agent._SESSION_IDS)
        assert last[: len(system)] == system
        assert SYSTEM_BLOCKS[0] <= len(system) <= SYSTEM_BLOCKS[1]
        prefixes[system] = prefixes.get(system, 0) + 1
    assert 2 <= len(prefixes) <= AGENTS
    most_common = max(prefixes, key=prefixes.get)
    assert len(most_common) == SYSTEM_BLOCKS[0]


@pytest.mark.parametrize("name", ["trace.jsonl", "trace.jsonl.gz"])
def test_it_is_read_back_by_the_benchmark(rows, name, tmp_path):
    path = tmp_path / name
    tool_agent.write(rows, path)
    written = path.read_bytes()
    back = read_trace(str(path))
    assert [(r.input_tokens, r.output_tokens, r.hash_ids) for r in back] == [
        (r.input_tokens, r.output_tokens, r.hash_ids) for r in rows
    ]
    tool_agent.write(rows, path)
    assert path.read_bytes() == written


def test_as_many_requests_as_asked_for():
    assert len(trace_of(500, rate=5.0, seed=1)) == 500
    assert len(trace_of(1, rate=0.1, seed=1)) == 1
    short = trace_of(50, rate=1.0, seed=1, max_input_tokens=SHORTEST_USEFUL_LIMIT)
    assert len(short) == 50
    assert max(row.input_tokens for row in short) <= SHORTEST_USEFUL_LIMIT


def test_reuse_is_exact_to_the_token():
    first = TraceRow(0.0, 700, 5, (1, 2))
    longer = TraceRow(1.0, 900, 5, (1, 2))
    other = TraceRow(2.0, 600, 5, (1, 3))
    assert summarise([first]).reused_mean == 0
    assert summarise([first, longer]).reused_mean == 700 / 2
    assert summarise([first, longer, other]).reused_mean == pytest.approx((700 + 512) / 3)


def test_the_command_writes_and_tells(tmp_path, capsys):
    out = tmp_path / "t.jsonl.gz"
    assert tool_agent.main(["--out", str(out), "--sessions", "200", "--rate", "2"]) == 0
    assert "reused mean" in capsys.readouterr().out
    assert read_trace(str(out))
    with pytest.raises(SystemExit):
        tool_agent.main(["--out", str(out), "--sessions", "1", "--rate", "100"])
    assert "ask for more" in capsys.readouterr().err
