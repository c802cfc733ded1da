"""Greedy tokens of a multiplexing server under load against transformers, cold and from the cache.

The reference reads prompt and answer in one forward pass: the answer is its own greedy one if each
token is the likeliest after those before it. Two logits closer than TIE may change places, since
batching and caching change the order of additions; each such place is counted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

NEW_TOKENS = 64
REUSED_NEW_TOKENS = 24
AT_ONCE = 8
TIE = 1e-3  # between logits, whose range is about 40
MAX_PROMPTS_WITH_TIES = 3
TEXTS = Path(__file__).parents[2] / "benchmark" / "texts"

PLAIN = [
    "The capital of France is",
    "In the beginning",
    "Once upon a time, in a village at the foot of a mountain, there lived a clockmaker who",
    "Roses are red, violets are blue,",
    "Water boils at a lower temperature on a mountain because the air pressure",
    "def fibonacci(n: int) -> int:\n    if n < 2:\n        return n\n    return",
    "#include <stdio.h>\n\nint main(void) {\n    for (int i = 0; i < 10; i++) {\n        printf(",
    "SELECT name, COUNT(*) AS orders\nFROM customers\nJOIN orders ON orders.customer_id =",
    '{"name": "Ada", "born": 1815, "languages": ["English", "French"], "works": [',
    "1, 1, 2, 3, 5, 8, 13, 21, 34, 55,",
    "3.14159 26535 89793 23846 26433 83279 50288 41971",
    "17 * 23 = 391\n18 * 23 = 414\n19 * 23 = 437\n20 * 23 =",
    "La bibliothèque de la ville est ouverte tous les jours sauf le lundi, et les enfants",
    "Der Zug nach Hamburg fährt heute von Gleis sieben ab, weil auf dem anderen Gleis",
    "El niño abrió la ventana y vio que durante la noche había caído nieve sobre",
    "今日は天気がいいので、公園まで散歩に行きました。",
]
QUESTIONS = [
    "Why is the sky blue?",
    "Write a haiku about a winter morning.",
]
DOCUMENTS = [("lighthouse", 220), ("bakery", 150)]  # the first so many words

Ids = list[int]


@dataclass(frozen=True)
class Answered:
    prompt: Ids
    output: Ids
    cached_tokens: int


class Reference:
    """transformers in float32. Counts, by prompt, the ties that were needed."""

    def __init__(self, model_file: Path) -> None:
        from transformers import AutoModelForCausalLM

        self._model = AutoModelForCausalLM.from_pretrained(
            model_file.parent, gguf_file=model_file.name, dtype=torch.float32
        )

    @torch.inference_mode()
    def ties(self, prompt: Ids, output: Ids) -> int:
        """Places where `output` takes a token that is as good as the likeliest within TIE.

        Asserts that all other tokens are the likeliest ones.
        """
        logits = self._model(
            torch.tensor([prompt + output[:-1]]), logits_to_keep=len(output)
        ).logits[0]
        taken = torch.tensor(output)
        ties = 0
        for place in (logits.argmax(-1) != taken).nonzero().flatten().tolist():
            gap = float(logits[place].max() - logits[place, output[place]])
            assert gap < TIE, (
                f"token {place} of the answer is {output[place]}, the reference takes "
                f"{int(logits[place].argmax())}, better by {gap:.2e}; prompt {prompt}"
            )
            ties += 1
        return ties


@pytest.fixture(scope="module")
def reference(smollm2: Path) -> Reference:
    return Reference(smollm2)


@pytest.fixture(scope="module")
def texts(tokenizer: Any) -> list[str]:
    """Twenty prompts of 5 to about 300 tokens."""
    chats = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
        )
        for question in QUESTIONS
    ]
    documents = [
        " ".join((TEXTS / f"{name}.txt").read_text(encoding="utf-8").split()[:words])
        for name, words in DOCUMENTS
    ]
    return [*PLAIN, *chats, *documents]


@pytest.fixture(scope="module")
def ask_all(server: Any) -> Callable[[Sequence[str | Ids], int], list[Answered]]:
    """Sends the prompts, eight at a time."""

    def ask(prompt: str | Ids, new_tokens: int) -> Answered:
        params = {"temperature": 0, "ignore_eos": True, "max_new_tokens": new_tokens}
        answer = server.client.generate(prompt, params, return_prompt_token_ids=True)
        assert len(answer["output_ids"]) == new_tokens
        cached_tokens = answer["meta_info"]["cached_tokens"]
        return Answered(answer["prompt_token_ids"], answer["output_ids"], cached_tokens)

    def ask_all(prompts: Sequence[str | Ids], new_tokens: int) -> list[Answered]:
        with ThreadPoolExecutor(AT_ONCE) as pool:
            return list(pool.map(ask, prompts, [new_tokens] * len(prompts)))

    return ask_all


@dataclass(frozen=True)
class ColdRun:
    answers: list[Answered]
    both_busy_s: float


@pytest.fixture(scope="module")
def cold(server: Any, texts: list[str], ask_all: Callable[..., list[Answered]]) -> ColdRun:
    """Every prompt answered with an empty cache behind it."""
    server.client.flush_cache()
    before_s = server.client.state()["pd_multiplex"]["both_busy_s"]
    answers = ask_all(texts, NEW_TOKENS)
    after_s = server.client.state()["pd_multiplex"]["both_busy_s"]
    return ColdRun(answers, after_s - before_s)


def check(reference: Reference, answers: list[Answered]) -> None:
    """All answers are the reference's, but for few ties."""
    with_ties = [a.prompt for a in answers if reference.ties(a.prompt, a.output)]
    print(f"{len(answers)} answers, {len(with_ties)} with logits within {TIE:g} of each other")
    assert len(with_ties) <= MAX_PROMPTS_WITH_TIES


def test_cold(cold: ColdRun, reference: Reference, texts: list[str], tokenizer: Any) -> None:
    prompts = [answered.prompt for answered in cold.answers]
    assert prompts == [tokenizer(text)["input_ids"] for text in texts]
    lengths = sorted(map(len, prompts))
    assert len(lengths) == 20 and lengths[0] <= 5 and lengths[-1] >= 250
    check(reference, cold.answers)


def test_prefill_and_decode_ran_at_once(cold: ColdRun) -> None:
    assert cold.both_busy_s > 0


def test_same_prompts_again(
    cold: ColdRun, reference: Reference, ask_all: Callable[..., list[Answered]]
) -> None:
    prompts = [answered.prompt for answered in cold.answers]
    answers = ask_all(prompts, REUSED_NEW_TOKENS)
    assert [a.cached_tokens for a in answers] == [len(prompt) - 1 for prompt in prompts]
    check(reference, answers)


def test_prompts_with_part_of_their_answers(
    cold: ColdRun, reference: Reference, ask_all: Callable[..., list[Answered]]
) -> None:
    known = [1 + (7 * i) % (NEW_TOKENS - 1) for i in range(len(cold.answers))]
    prompts = [a.prompt + a.output[:count] for a, count in zip(cold.answers, known, strict=True)]
    answers = ask_all(prompts, REUSED_NEW_TOKENS)
    assert [a.cached_tokens for a in answers] == [len(prompt) - 1 for prompt in prompts]
    check(reference, answers)


def test_beginnings_of_prompts_with_another_end(
    cold: ColdRun,
    reference: Reference,
    tokenizer: Any,
    ask_all: Callable[..., list[Answered]],
) -> None:
    end = tokenizer("\n\nBut that is not the whole story. As it turns out,")["input_ids"]
    kept = [1 + (11 * i) % len(a.prompt) for i, a in enumerate(cold.answers)]
    prompts = [a.prompt[:count] + end for a, count in zip(cold.answers, kept, strict=True)]
    answers = ask_all(prompts, REUSED_NEW_TOKENS)
    for answered, count in zip(answers, kept, strict=True):
        assert count <= answered.cached_tokens < len(answered.prompt)
    check(reference, answers)
