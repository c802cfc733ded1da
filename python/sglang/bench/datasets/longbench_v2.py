"""`longbench_v2`: questions of four choices about a long text, from a JSON or JSONL file."""

from __future__ import annotations

from collections.abc import Iterator

from sglang.bench.datasets.jsonl import read_rows_or_list, required_path
from sglang.bench.datasets.text_pairs import TextPair, to_conversations
from sglang.bench.errors import BenchError
from sglang.bench.options import BenchOptions
from sglang.bench.prompts import PromptMaker
from sglang.bench.workload import Conversation

DEFAULT_OUTPUT_LEN = 10  # a letter and a few words
_CHOICES = "ABCD"


def load(options: BenchOptions, prompts: PromptMaker) -> tuple[list[Conversation], str | None]:
    return to_conversations(_pairs(required_path(options)), options, prompts)


def _pairs(path: str) -> Iterator[TextPair]:
    for where, row in read_rows_or_list(path):
        names = ("context", "question", *(f"choice_{letter}" for letter in _CHOICES))
        missing = [name for name in names if not isinstance(row.get(name), str)]
        if missing:
            raise BenchError(f"{where}: needs a string `{missing[0]}`")
        choices = "".join(f"{letter}. {row[f'choice_{letter}']}\n" for letter in _CHOICES)
        prompt = f"{row['context']}\n\nQuestion: {row['question']}\n{choices}Answer:"
        yield TextPair(prompt, None, DEFAULT_OUTPUT_LEN)
