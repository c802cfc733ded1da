"""`agentic-trace`: conversations of an agent, replayed with the server's own answers.

The file is {"conversations": [[turn, ...], ...]}; a turn's "messages" are those that are new in
it, the assistant's left out.
"""

from __future__ import annotations

from typing import Any

from sglang.bench.datasets.jsonl import checked_messages, read_json, required_path, rotated
from sglang.bench.errors import BenchError
from sglang.bench.options import BenchOptions
from sglang.bench.prompts import PromptMaker
from sglang.bench.workload import Conversation, Turn

DEFAULT_OUTPUT_LEN = 220  # tokens of a turn's answer


def load(options: BenchOptions, prompts: PromptMaker) -> tuple[list[Conversation], str | None]:
    """In the file's order from --dataset-offset on. The server counts the prompts."""
    path = required_path(options)
    content = read_json(path)
    rows = content.get("conversations") if isinstance(content, dict) else None
    if not isinstance(rows, list):
        raise BenchError(f"{path}: needs an object with a list `conversations`")
    output_len = options.text_file.output_len or DEFAULT_OUTPUT_LEN
    named = [(f"{path}: conversation {number}", row) for number, row in enumerate(rows)]
    conversations = []
    for where, row in rotated(named, options.text_file.offset):
        turns = [Turn(m, None, output_len) for m in _turns(where, row)]
        if turns:
            conversations.append(Conversation(tuple(turns[: options.text_file.max_turns])))
    return conversations[: options.num_prompts], None


def _turns(where: str, row: Any) -> list[list[dict[str, Any]]]:
    if not isinstance(row, list) or not all(isinstance(turn, dict) for turn in row):
        raise BenchError(f"{where}: must be a list of turns")
    return [checked_messages(where, turn["messages"]) for turn in row if turn.get("messages")]
