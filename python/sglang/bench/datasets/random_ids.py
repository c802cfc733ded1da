"""`random-ids`: unrelated prompts of random tokens; works offline."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from sglang.bench.options import BenchOptions
from sglang.bench.prompts import PromptMaker
from sglang.bench.workload import Conversation, Turn

DEFAULT_NUM_PROMPTS = 1000


def load(options: BenchOptions, prompts: PromptMaker) -> tuple[list[Conversation], str | None]:
    count = DEFAULT_NUM_PROMPTS if options.num_prompts is None else options.num_prompts
    wanted = options.random
    rng = np.random.default_rng(options.seed)
    input_lens = draw_lengths(rng, wanted.input_len, wanted.range_ratio, count)
    output_lens = draw_lengths(rng, wanted.output_len, wanted.range_ratio, count)
    conversations = []
    for input_len, output_len in zip(input_lens, output_lens, strict=True):
        prompt = prompts.from_ids(prompts.draw(rng, int(input_len)))
        conversations.append(Conversation((Turn(prompt, int(input_len), int(output_len)),)))
    return conversations, None


def draw_lengths(
    rng: np.random.Generator, full_len: int, range_ratio: float, count: int
) -> NDArray[np.int64]:
    """[count] lengths, uniform on [full_len * range_ratio, full_len] and at least 1."""
    shortest = max(1, int(full_len * range_ratio))
    return rng.integers(shortest, full_len + 1, size=count)
