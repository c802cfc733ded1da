"""The workloads: what is shared between prompts, how long they are, when they arrive."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sglang.bench.arrivals import poisson_arrivals_s, trace_arrivals_s
from sglang.bench.cli import parse_options
from sglang.bench.datasets import Loaded, load_conversations
from sglang.bench.datasets.mooncake import BLOCK_TOKENS
from sglang.bench.errors import BenchError
from sglang.bench.prompts import PromptMaker, ordinary_ids_of, vocab_size_of_config
from sglang.bench.workload import Conversation, TokenIds

VOCAB = 5000


class WordTokenizer:
    """Token n is the word "n"; ids 0 and 1 are special, 7 is an added token."""

    def __init__(self) -> None:
        self.all_special_ids = [0, 1]
        self.bos_token: str | None = "<bos>"

    def __len__(self) -> int:
        return 50

    def get_added_vocab(self) -> dict[str, int]:
        return {"<added>": 7}

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return [0] * add_special_tokens + [int(w) if w.isdigit() else 2 for w in text.split()]

    def decode(self, token_ids: Sequence[int]) -> str:
        return "".join(f"{token} " for token in token_ids)

    def apply_chat_template(
        self, conversation: list[dict[str, str]], *, tokenize: bool, add_generation_prompt: bool
    ) -> str:
        assert not tokenize
        assert add_generation_prompt
        return f"<bos>user: {conversation[0]['content']} answer:"


def load(argv: list[str]) -> Loaded:
    ids = np.arange(VOCAB, dtype=np.int32)
    return load_conversations(parse_options(argv), PromptMaker(ids, None, send_ids=True))


def load_text(argv: list[str]) -> list[Conversation]:
    tokenizer = WordTokenizer()
    prompts = PromptMaker(ordinary_ids_of(tokenizer), tokenizer, send_ids=False)
    return load_conversations(parse_options(argv), prompts).conversations


def ids_of(conversation: Conversation) -> TokenIds:
    prompt = conversation.turns[0].prompt
    assert isinstance(prompt, np.ndarray)
    return prompt


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return str(path)


def trace_row(timestamp: float | None, tokens: int, hash_ids: list[int] | None) -> dict[str, Any]:
    return {
        "timestamp": timestamp,
        "input_length": tokens,
        "output_length": 5,
        "hash_ids": hash_ids,
    }


def trace(tmp_path: Path, rows: list[dict[str, Any]], *flags: str) -> Loaded:
    path = write_rows(tmp_path / "trace.jsonl.gz", rows)
    return load(["--dataset-name", "mooncake", "--dataset-path", path, *flags])


def test_equal_hash_ids_are_equal_tokens_and_nothing_more(tmp_path: Path) -> None:
    rows = [
        trace_row(0, 1100, [0, 1, 2]),
        trace_row(0, 1536, [0, 1, 9]),
        trace_row(1, 600, [0, 5]),
        trace_row(2, 512, [6]),
    ]
    a, b, c, d = (ids_of(conversation) for conversation in trace(tmp_path, rows).conversations)
    assert [len(ids) for ids in (a, b, c, d)] == [1100, 1536, 600, 512]
    shared = 2 * BLOCK_TOKENS
    assert np.array_equal(a[:shared], b[:shared])
    assert not np.array_equal(a[shared:], b[shared : len(a)])
    assert np.array_equal(a[:BLOCK_TOKENS], c[:BLOCK_TOKENS])
    assert a[BLOCK_TOKENS] != c[BLOCK_TOKENS]
    assert a[0] != d[0]
    assert min(ids.min() for ids in (a, b, c, d)) >= 0
    assert max(ids.max() for ids in (a, b, c, d)) < VOCAB
    assert len(np.unique(b)) > 1000  # spread over the vocabulary


def test_trace_prompts_depend_on_the_seed_alone(tmp_path: Path) -> None:
    rows = [trace_row(0, 700, [3, 4])]
    first, again = (ids_of(trace(tmp_path, rows).conversations[0]) for _ in range(2))
    other = ids_of(trace(tmp_path, rows, "--seed", "1").conversations[0])
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_rows_without_hash_ids_share_nothing(tmp_path: Path) -> None:
    loaded = trace(tmp_path, [trace_row(0, 600, None), trace_row(0, 600, None)])
    a, b = (ids_of(conversation) for conversation in loaded.conversations)
    assert (a == b).mean() < 0.05


def test_trace_as_text_shares_the_same_prefix(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "t.jsonl", [trace_row(0, 600, [0, 1]), trace_row(0, 700, [0, 2])])
    argv = ["--backend", "sglang-oai", "--dataset-name", "mooncake", "--dataset-path", path]
    a, b = (conversation.turns[0].prompt for conversation in load_text(argv))
    assert isinstance(a, str)
    assert isinstance(b, str)
    words_a, words_b = a.split(), b.split()
    assert (len(words_a), len(words_b)) == (600, 700)
    assert words_a[:BLOCK_TOKENS] == words_b[:BLOCK_TOKENS]
    assert words_a[BLOCK_TOKENS:] != words_b[BLOCK_TOKENS:600]
    assert not {"0", "1", "7"} & set(words_a + words_b)  # no special and no added token


def test_trace_limits_are_counted(tmp_path: Path) -> None:
    rows = [
        trace_row(3000, 10, [0]),
        trace_row(3500, 900, [1, 2]),
        trace_row(4000, 11, [3]),
        trace_row(4500, 12, [4]),
        trace_row(9000, 13, [5]),
    ]
    loaded = trace(
        tmp_path,
        rows,
        *("--mooncake-max-input-len", "100", "--mooncake-duration-s", "2"),
        *("--num-prompts", "2", "--use-trace-timestamps", "--mooncake-slowdown-factor", "3"),
    )
    assert [len(ids_of(c)) for c in loaded.conversations] == [10, 11]
    assert loaded.note == (
        "mooncake: 2 of 5 rows; left out: 1 after --mooncake-duration-s, "
        "1 above --mooncake-max-input-len, 1 beyond --num-prompts 2"
    )
    assert trace_arrivals_s(loaded.conversations, 3.0) == [0.0, 3.0]


def test_whole_conversations_are_kept_in_trace_order(tmp_path: Path) -> None:
    lengths = {"a1": 600, "b1": 700, "a2": 1200, "c1": 800, "a3": 1700, "c2": 1300, "d1": 900}
    blocks = {
        "a1": [0, 1],
        "b1": [0, 2],  # shares the first block only: a conversation of its own
        "a2": [0, 1, 3],
        "c1": [0, 4],
        "a3": [0, 1, 3, 5],
        "c2": [0, 4, 6],
        "d1": [0, 7],
    }
    rows = [trace_row(i, lengths[name], blocks[name]) for i, name in enumerate(blocks)]

    def kept(*flags: str) -> list[int]:
        loaded = trace(tmp_path, rows, *flags)
        return [turn.prompt_tokens for c in loaded.conversations for turn in c.turns]

    assert kept("--mooncake-min-turns=2") == [lengths[n] for n in ("a1", "a2", "c1", "a3", "c2")]
    assert kept("--mooncake-min-turns=3") == [lengths[n] for n in ("a1", "a2", "a3")]
    # Three rows of room: all of a, none of c, rather than a part of each.
    short = kept("--mooncake-min-turns=2", "--num-prompts=4")
    assert short == [lengths[n] for n in ("a1", "a2", "a3")]
    with pytest.raises(BenchError, match="no row of the trace is left"):
        kept("--mooncake-min-turns=4")


def test_batches_are_spread_up_to_the_next_one(tmp_path: Path) -> None:
    rows = [trace_row(t, 10, [i]) for i, t in enumerate([0, 0, 0, 3000, 3000])]
    loaded = trace(tmp_path, rows, "--use-trace-timestamps", "--mooncake-spread-batches")
    assert [c.trace_s for c in loaded.conversations] == [0.0, 1.0, 2.0, 3.0, 4.5]
    assert loaded.note is not None
    assert "spread" in loaded.note


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        (trace_row(0, 513, [1]), "needs 2 hash_ids"),
        (trace_row(0, 5, [1, 2]), "needs 1 hash_ids"),
        (trace_row(0, 0, []), "input_length must be an integer of at least 1"),
        ({"timestamp": 0, "input_length": 5, "hash_ids": [1]}, "output_length"),
        (trace_row(0, 5, ["a"]), "hash_ids must be a list of integers"),  # type: ignore[list-item]
    ],
)
def test_bad_trace_rows_name_file_and_line(
    row: dict[str, Any], problem: str, tmp_path: Path
) -> None:
    with pytest.raises(BenchError, match=r"trace\.jsonl\.gz:2: .*" + problem):
        trace(tmp_path, [trace_row(0, 5, [1]), row])


def test_timestamps_are_needed_only_to_replay_them(tmp_path: Path) -> None:
    rows = [trace_row(None, 5, [1])]
    assert len(trace(tmp_path, rows).conversations) == 1
    with pytest.raises(BenchError, match="--use-trace-timestamps"):
        trace(tmp_path, rows, "--use-trace-timestamps")
    with pytest.raises(BenchError, match="no row of the trace is left"):
        trace(tmp_path, rows, "--mooncake-max-input-len", "1")


def test_random_ids_lengths() -> None:
    argv = ["--dataset-name", "random-ids", "--num-prompts", "200"]
    argv += ["--random-input-len", "40", "--random-output-len", "8", "--random-range-ratio", "0.5"]
    turns = [conversation.turns[0] for conversation in load(argv).conversations]
    assert len(turns) == 200
    assert {min(t.prompt_tokens or 0 for t in turns), max(t.prompt_tokens or 0 for t in turns)} == {
        20,
        40,
    }
    assert {t.max_tokens for t in turns} == {4, 5, 6, 7, 8}
    assert all(len(t.prompt) == t.prompt_tokens for t in turns)


GSP = ["--dataset-name", "generated-shared-prefix", "--gsp-num-groups", "3"]
GSP += ["--gsp-prompts-per-group", "4", "--gsp-system-prompt-len", "30", "--gsp-question-len", "5"]


def test_shared_prefix_groups_and_turns() -> None:
    conversations = load([*GSP, "--gsp-ordered", "--gsp-num-turns", "2"]).conversations
    assert len(conversations) == 12
    systems = {ids_of(conversation)[:30].tobytes() for conversation in conversations}
    questions = {ids_of(conversation)[30:].tobytes() for conversation in conversations}
    assert len(systems) == 3
    assert len(questions) == 12
    first_group = {ids_of(conversation)[:30].tobytes() for conversation in conversations[:4]}
    assert len(first_group) == 1
    assert {len(conversation.turns) for conversation in conversations} == {2}
    assert {len(conversation.turns[0].prompt) for conversation in conversations} == {35}
    assert {len(conversation.turns[1].prompt) for conversation in conversations} == {5}


def test_shared_prefix_is_shuffled_by_seed_and_cut() -> None:
    ordered, shuffled, again = (
        [ids_of(c).tobytes() for c in load([*GSP, *flags]).conversations]
        for flags in (["--gsp-ordered"], [], [])
    )
    assert shuffled == again
    assert shuffled != ordered
    assert sorted(shuffled) == sorted(ordered)
    assert len(load([*GSP, "--num-prompts", "5"]).conversations) == 5


def test_zipf_groups_are_uneven() -> None:
    flags = ["--gsp-group-distribution", "zipf", "--gsp-zipf-alpha", "3"]
    conversations = load([*GSP, "--gsp-prompts-per-group", "40", *flags]).conversations
    systems = [ids_of(conversation)[:30].tobytes() for conversation in conversations]
    largest = max(systems.count(system) for system in set(systems))
    assert len(systems) == 120
    assert largest > 80  # 1 / (1 + 1/8 + 1/27) = 86 % expected


def test_mt_bench_keeps_both_turns(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "q.jsonl.gz", [{"question_id": 81, "turns": ["a b", "c"]}])
    argv = ["--backend", "sglang-oai-chat", "--dataset-name", "mt-bench", "--dataset-path", path]
    (conversation,) = load_text([*argv, "--mt-bench-output-len", "9"])
    assert [(turn.prompt, turn.max_tokens) for turn in conversation.turns] == [("a b", 9), ("c", 9)]


def test_sharegpt_takes_output_lengths_from_answers(tmp_path: Path) -> None:
    rows = [
        {"conversations": [{"value": "one two three"}, {"value": "a b c d"}, {"value": "x"}]},
        {"conversations": [{"value": "alone alone"}]},
        {"conversations": [{"value": "one two"}, {"value": "short"}]},
        {"conversations": [{"value": "one two"}, {"value": "w " * 90}]},
    ]
    path = tmp_path / "sharegpt.json"
    path.write_text(json.dumps(rows))
    argv = ["--dataset-name", "sharegpt", "--dataset-path", str(path)]
    (conversation,) = load_text([*argv, "--sharegpt-context-len", "50"])
    (turn,) = conversation.turns
    assert (turn.prompt, turn.prompt_tokens, turn.max_tokens) == ("one two three", 3, 4)
    assert {c.turns[0].max_tokens for c in load_text([*argv, "--sharegpt-output-len", "6"])} == {6}


def test_custom_rows_of_both_shapes(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "p q"}, {"role": "assistant", "content": "x y z"}]
    path = write_rows(
        tmp_path / "c.jsonl",
        [{"conversations": messages}, {"prompt": "r s t", "output_len": 17}],
    )
    argv = ["--dataset-name", "custom", "--dataset-path", path]
    turns = {c.turns[0].prompt: c.turns[0].max_tokens for c in load_text(argv)}
    assert turns == {"p q": 3, "r s t": 17}
    templated = {c.turns[0].prompt for c in load_text([*argv, "--apply-chat-template"])}
    assert templated == {"user: p q answer:", "user: r s t answer:"}


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("{", r"c\.jsonl:1: not JSON"),
        ("[]", r"c\.jsonl:1: not an object"),
        ('{"conversations": []}', r"c\.jsonl:1: needs a list"),
        ('{"prompt": "a b", "output_len": 0}', "output_len"),
        ('{"prompt": "a b"}', "--sharegpt-output-len"),
        ("", "no prompt of the file can be used"),
    ],
)
def test_bad_custom_files(content: str, problem: str, tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    path.write_text(content)
    with pytest.raises(BenchError, match=problem):
        load_text(["--dataset-name", "custom", "--dataset-path", str(path)])


def test_missing_file_names_the_flag() -> None:
    with pytest.raises(BenchError, match="--dataset-path /nowhere"):
        load_text(["--dataset-name", "custom", "--dataset-path", "/nowhere/x.jsonl"])


def test_poisson_arrivals_are_seeded_and_have_the_rate() -> None:
    arrivals_s = poisson_arrivals_s(4001, 20.0, seed=3)
    assert arrivals_s == poisson_arrivals_s(4001, 20.0, seed=3)
    assert arrivals_s != poisson_arrivals_s(4001, 20.0, seed=4)
    gaps_s = np.diff(arrivals_s)
    assert arrivals_s[0] == 0.0
    assert gaps_s.min() > 0
    assert gaps_s.mean() == pytest.approx(0.05, rel=0.05)
    assert gaps_s.std() == pytest.approx(0.05, rel=0.08)  # exponential: deviation equals mean
    assert poisson_arrivals_s(3, float("inf"), seed=0) == [0.0, 0.0, 0.0]


def test_vocab_size_from_a_model_folder(tmp_path: Path) -> None:
    assert vocab_size_of_config(str(tmp_path)) is None
    (tmp_path / "config.json").write_text('{"text_config": {"vocab_size": 77}}')
    assert vocab_size_of_config(str(tmp_path)) == 77


def test_random_texts_are_cut_or_repeated_to_length(tmp_path: Path) -> None:
    texts = ["11 12 13", "21 22 23 24 25 26 27 28"]
    rows = [{"conversations": [{"value": text}, {"value": "31"}]} for text in texts]
    path = tmp_path / "sharegpt.json"
    path.write_text(json.dumps(rows))
    found = load_text(
        [
            *("--dataset-name", "random", "--dataset-path", str(path), "--num-prompts", "4"),
            *("--random-input-len", "5", "--random-output-len", "6", "--random-range-ratio", "1"),
        ]
    )
    turns = [conversation.turns[0] for conversation in found]
    assert [(turn.prompt_tokens, turn.max_tokens) for turn in turns] == [(5, 6)] * 4
    assert {turn.prompt for turn in turns} == {"11 12 13 11 12 ", "21 22 23 24 25 "}


@pytest.mark.parametrize("as_list", [False, True])
def test_longbench_questions_come_behind_their_text(tmp_path: Path, as_list: bool) -> None:
    row = {"context": "11 12", "question": "why", **{f"choice_{c}": c.lower() for c in "ABCD"}}
    path = tmp_path / "longbench"
    path.write_text(json.dumps([row] if as_list else row))
    [conversation] = load_text(["--dataset-name", "longbench_v2", "--dataset-path", str(path)])
    [turn] = conversation.turns
    assert turn.prompt == "11 12\n\nQuestion: why\nA. a\nB. b\nC. c\nD. d\nAnswer:"
    assert turn.max_tokens == 10
    path.write_text(json.dumps({**row, "choice_C": None}))
    with pytest.raises(BenchError, match="choice_C"):
        load_text(["--dataset-name", "longbench_v2", "--dataset-path", str(path)])


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("openai", '{"messages": []}', "messages"),
        ("openai", '{"messages": [{"content": "x"}]}', "role"),
        ("openai", '{"messages": [{"role": "user"}], "max_tokens": 0}', "max_tokens"),
        ("agentic-trace", "[]", "conversations"),
        ("agentic-trace", '{"conversations": [5]}', "list of turns"),
    ],
)
def test_rows_at_fault_are_named(tmp_path: Path, name: str, content: str, problem: str) -> None:
    path = tmp_path / "rows"
    path.write_text(content)
    flags = ["--dataset-name", name, "--dataset-path", str(path), "--backend", "sglang-oai-chat"]
    with pytest.raises(BenchError, match=problem):
        load_text(flags)
