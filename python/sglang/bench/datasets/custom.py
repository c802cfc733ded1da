"""`custom`: a JSONL file of the user's own prompts.

A row is {"conversations": [{"role": ..., "content": prompt}, {"role": ..., "content": answer}]},
with "value" accepted for "content", or {"prompt": text, "output_len": tokens}.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sglang.bench.datasets.jsonl import read_rows, required_path
from sglang.bench.datasets.text_pairs import TextPair, to_conversations
from sglang.bench.errors import BenchError
from sglang.bench.options import BenchOptions
from sglang.bench.prompts import PromptMaker
from sglang.bench.workload import Conversation


def load(options: BenchOptions, prompts: PromptMaker) -> tuple[list[Conversation], str | None]:
    return to_conversations(_pairs(required_path(options)), options, prompts)


def _pairs(path: str) -> Iterator[TextPair]:
    for where, row in read_rows(path):
        if "prompt" in row:
            output_len = row.get("output_len")
            if not isinstance(row["prompt"], str):
                raise BenchError(f"{where}: prompt must be a string")
            if output_len is not None and (type(output_len) is not int or output_len < 1):
                raise BenchError(f"{where}: output_len must be an integer of at least 1")
            yield TextPair(row["prompt"], None, output_len)
            continue
        messages = row.get("conversations")
        if not isinstance(messages, list) or not messages:
            raise BenchError(f"{where}: needs a list `conversations` or a string `prompt`")
        texts = [_content(where, message) for message in messages[:2]]
        yield TextPair(texts[0], texts[1] if len(texts) > 1 else None)


def _content(where: str, message: Any) -> str:
    text = None
    if isinstance(message, dict):
        text = message.get("content", message.get("value"))
    if not isinstance(text, str):
        raise BenchError(f"{where}: every message needs a string `content`")
    return text
