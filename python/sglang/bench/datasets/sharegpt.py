"""`sharegpt`: the first exchange of every conversation in a ShareGPT JSON file."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sglang.bench.datasets.jsonl import read_list, required_path
from sglang.bench.datasets.text_pairs import TextPair, to_conversations
from sglang.bench.errors import BenchError
from sglang.bench.options import BenchOptions
from sglang.bench.prompts import PromptMaker
from sglang.bench.workload import Conversation


def load(options: BenchOptions, prompts: PromptMaker) -> tuple[list[Conversation], str | None]:
    path = required_path(options)
    return to_conversations(first_exchanges(path, read_list(path)), options, prompts)


def first_exchanges(path: str, rows: list[Any]) -> Iterator[TextPair]:
    """Conversations with fewer than two messages are common in the file and are skipped."""
    for number, row in enumerate(rows):
        try:
            messages = row.get("conversations") or row.get("conversation") or []
            if len(messages) >= 2:
                yield TextPair(str(messages[0]["value"]), str(messages[1]["value"]))
        except (AttributeError, LookupError, TypeError) as error:
            raise BenchError(f"{path}: entry {number} is not a ShareGPT conversation") from error
