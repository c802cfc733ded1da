"""`openai`: JSONL of chat completion requests; what a row says beside its messages is sent too."""

from __future__ import annotations

from sglang.bench.datasets.jsonl import checked_messages, read_rows, required_path, rotated
from sglang.bench.errors import BenchError
from sglang.bench.options import BenchOptions
from sglang.bench.prompts import PromptMaker
from sglang.bench.workload import Conversation, Turn

DEFAULT_OUTPUT_LEN = 256
# Decided here: the answer is read as it was asked for.
_OURS = (
    "messages",
    "model",
    "max_tokens",
    "max_completion_tokens",
    "stream",
    "stream_options",
    "n",
)


def load(options: BenchOptions, prompts: PromptMaker) -> tuple[list[Conversation], str | None]:
    """In the file's order from --dataset-offset on. The server counts the prompts."""
    conversations = []
    for where, row in rotated(list(read_rows(required_path(options))), options.text_file.offset):
        max_tokens = row.get("max_completion_tokens", row.get("max_tokens"))
        if max_tokens is not None and (type(max_tokens) is not int or max_tokens < 1):
            raise BenchError(f"{where}: max_tokens must be an integer of at least 1")
        turn = Turn(
            checked_messages(where, row.get("messages")),
            None,
            options.text_file.output_len or max_tokens or DEFAULT_OUTPUT_LEN,
            extra_body={name: value for name, value in row.items() if name not in _OURS},
        )
        conversations.append(Conversation((turn,)))
    return conversations[: options.num_prompts], None
