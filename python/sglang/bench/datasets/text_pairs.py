"""From (prompt, answer) texts to single-turn conversations, for `sharegpt` and `custom`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from sglang.bench.datasets.random_ids import DEFAULT_NUM_PROMPTS
from sglang.bench.errors import BenchError
from sglang.bench.options import BenchOptions
from sglang.bench.prompts import PromptMaker
from sglang.bench.workload import Conversation, Turn

_MIN_TOKENS = 2  # shorter prompts and answers are junk in ShareGPT and say nothing of speed


@dataclass(frozen=True, slots=True)
class TextPair:
    """output_len, where the file states it, goes before the length of `answer`."""

    prompt: str
    answer: str | None
    output_len: int | None = None


def to_conversations(
    pairs: Iterable[TextPair], options: BenchOptions, prompts: PromptMaker
) -> tuple[list[Conversation], str | None]:
    """Shuffled by seed, then cut to --num-prompts; too short and too long pairs are left out."""
    candidates = list(pairs)
    order = np.random.default_rng(options.seed).permutation(len(candidates))
    limit = DEFAULT_NUM_PROMPTS if options.num_prompts is None else options.num_prompts
    conversations: list[Conversation] = []
    left_out = 0
    for index in order:
        if len(conversations) == limit:
            break
        turn = _to_turn(candidates[index], options, prompts)
        if turn is None:
            left_out += 1
        else:
            conversations.append(Conversation((turn,)))
    if not conversations:
        raise BenchError(f"{options.dataset_path}: no prompt of the file can be used")
    note = f"{options.dataset_name}: {left_out} prompts left out as too short or too long"
    return conversations, note if left_out else None


def _to_turn(pair: TextPair, options: BenchOptions, prompts: PromptMaker) -> Turn | None:
    wanted = options.text_file
    text = pair.prompt + wanted.prompt_suffix
    if wanted.apply_chat_template:
        text = _with_template(text, prompts)
    prompt_tokens = prompts.count(text) if prompts.has_tokenizer else None
    output_tokens = wanted.output_len or pair.output_len
    if output_tokens is None:
        if pair.answer is None:
            raise BenchError(
                f"{options.dataset_path}: a row has no answer to take the output length from; "
                "give --sharegpt-output-len"
            )
        output_tokens = prompts.count(pair.answer)
    if output_tokens < _MIN_TOKENS or (prompt_tokens is not None and prompt_tokens < _MIN_TOKENS):
        return None
    if wanted.context_len is not None and prompts.count(text) + output_tokens > wanted.context_len:
        return None
    return Turn(prompts.from_text(text), prompt_tokens, output_tokens)


def _with_template(text: str, prompts: PromptMaker) -> str:
    tokenizer = prompts.tokenizer
    formatted = str(
        tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
        )
    )
    # The server puts the begin-of-sequence token before a text prompt itself.
    return formatted.removeprefix(tokenizer.bos_token or "")
