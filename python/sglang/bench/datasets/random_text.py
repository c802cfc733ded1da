"""`random`: prompts of random lengths, cut from or filled with the texts of a ShareGPT file."""

from __future__ import annotations

import numpy as np

from sglang.bench.datasets.jsonl import read_list, required_path
from sglang.bench.datasets.random_ids import draw_lengths
from sglang.bench.datasets.sharegpt import first_exchanges
from sglang.bench.errors import BenchError
from sglang.bench.options import BenchOptions
from sglang.bench.prompts import PromptMaker
from sglang.bench.workload import Conversation, Turn


def load(options: BenchOptions, prompts: PromptMaker) -> tuple[list[Conversation], str | None]:
    """The i-th prompt is the i-th text in random order, repeated until it is long enough."""
    path = required_path(options)
    texts = [pair.prompt for pair in first_exchanges(path, read_list(path)) if pair.prompt]
    if not texts:
        raise BenchError(f"{path}: no prompt of the file can be used")
    wanted = options.random
    count = options.num_prompts or len(texts)
    rng = np.random.default_rng(options.seed)
    input_lens = draw_lengths(rng, wanted.input_len, wanted.range_ratio, count)
    output_lens = draw_lengths(rng, wanted.output_len, wanted.range_ratio, count)
    order = rng.permutation(len(texts))
    conversations = []
    for number, (input_len, output_len) in enumerate(zip(input_lens, output_lens, strict=True)):
        ids = prompts.encode(texts[order[number % len(texts)]])
        prompt = prompts.from_ids(np.resize(ids, int(input_len)))
        conversations.append(Conversation((Turn(prompt, int(input_len), int(output_len)),)))
    return conversations, None
