"""`mt-bench`: the questions of MT-bench, two turns each, through the chat endpoint."""

from __future__ import annotations

from sglang.bench.datasets.jsonl import read_rows, required_path, rotated
from sglang.bench.errors import BenchError
from sglang.bench.options import BenchOptions
from sglang.bench.prompts import PromptMaker
from sglang.bench.workload import Conversation, Turn


def load(options: BenchOptions, prompts: PromptMaker) -> tuple[list[Conversation], str | None]:
    """In the file's order. Prompt lengths are left to the server, which applies the template."""
    conversations = []
    rows = list(read_rows(required_path(options)))
    for where, row in rotated(rows, options.text_file.offset):
        questions = row.get("turns")
        if not (
            isinstance(questions, list)
            and questions
            and all(isinstance(question, str) for question in questions)
        ):
            raise BenchError(f"{where}: turns must be a list of strings")
        max_tokens = options.text_file.mt_bench_output_len
        turns = tuple(Turn(question, None, max_tokens) for question in questions)
        conversations.append(Conversation(turns))
    return conversations[: options.num_prompts], None
