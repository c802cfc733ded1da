"""`generated-shared-prefix`: groups of prompts that share a system prompt; may have many turns."""

from __future__ import annotations

import numpy as np

from sglang.bench.datasets.random_ids import draw_lengths
from sglang.bench.options import BenchOptions, SharedPrefixOptions
from sglang.bench.prompts import PromptMaker
from sglang.bench.workload import Conversation, Turn

ROUTING_KEY = "X-SMG-Routing-Key"


def load(options: BenchOptions, prompts: PromptMaker) -> tuple[list[Conversation], str | None]:
    """One conversation a prompt of a group, in random order unless --gsp-ordered.

    A first turn is system prompt and question, a later one a question only.
    """
    gsp = options.gsp
    rng = np.random.default_rng(options.seed)
    system_prompts = [
        prompts.draw(rng, int(length))
        for length in draw_lengths(rng, gsp.system_prompt_len, gsp.range_ratio, gsp.num_groups)
    ]
    conversations = []
    for group in _groups_of_prompts(gsp, rng):
        turns: list[Turn] = []
        headers = {ROUTING_KEY: f"{options.seed}-{group}"} if gsp.send_routing_key else {}
        question_lens = draw_lengths(rng, gsp.question_len, gsp.range_ratio, gsp.num_turns)
        output_lens = draw_lengths(rng, gsp.output_len, gsp.range_ratio, gsp.num_turns)
        for question_len, output_len in zip(question_lens, output_lens, strict=True):
            parts = [prompts.draw(rng, int(question_len))]
            if not turns:
                parts.insert(0, system_prompts[group])
            prompt_tokens = sum(part.size for part in parts)
            turns.append(
                Turn(prompts.from_ids(*parts), prompt_tokens, int(output_len), headers=headers)
            )
        conversations.append(Conversation(tuple(turns)))
    if not gsp.ordered:
        conversations = [conversations[i] for i in rng.permutation(len(conversations))]
    return conversations[: options.num_prompts], None


def _groups_of_prompts(gsp: SharedPrefixOptions, rng: np.random.Generator) -> list[int]:
    """The group of every prompt, group by group."""
    total = gsp.num_groups * gsp.prompts_per_group
    if gsp.zipf_alpha is None:
        return [index // gsp.prompts_per_group for index in range(total)]
    weights = 1.0 / np.arange(1, gsp.num_groups + 1) ** gsp.zipf_alpha
    drawn = rng.choice(gsp.num_groups, size=total, p=weights / weights.sum())
    return sorted(drawn.tolist())
