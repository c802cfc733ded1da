"""One data set a file; `load_conversations` picks by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from sglang.bench.datasets import (
    agentic_trace,
    custom,
    generated_shared_prefix,
    longbench_v2,
    mooncake,
    mt_bench,
    openai_requests,
    random_ids,
    random_text,
    sharegpt,
)
from sglang.bench.options import BenchOptions
from sglang.bench.prompts import PromptMaker
from sglang.bench.workload import Conversation


@dataclass(frozen=True, slots=True)
class Loaded:
    """Conversations, and a line for the user where rows were left out or changed."""

    conversations: list[Conversation]
    note: str | None = None


_Loader = Callable[[BenchOptions, PromptMaker], tuple[list[Conversation], str | None]]

_LOADERS: dict[str, _Loader] = {
    "random-ids": random_ids.load,
    "generated-shared-prefix": generated_shared_prefix.load,
    "mooncake": mooncake.load,
    "mt-bench": mt_bench.load,
    "sharegpt": sharegpt.load,
    "custom": custom.load,
    "random": random_text.load,
    "openai": openai_requests.load,
    "agentic-trace": agentic_trace.load,
    "longbench_v2": longbench_v2.load,
}
DATASETS = tuple(_LOADERS)


def load_conversations(options: BenchOptions, prompts: PromptMaker) -> Loaded:
    """Deterministic given the options and files. Raises BenchError naming the file or flag."""
    return Loaded(*_LOADERS[options.dataset_name](options, prompts))
