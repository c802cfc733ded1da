"""Whether a server's greedy tokens are those of transformers, and the prompts to ask with.

The reference reads prompt and answer in one float32 forward pass: the answer is greedy if each of
its tokens is the likeliest after those before it. Two logits closer than TIE may change places,
since batching and caching change the order of additions; each such place is counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import torch

TIE = 1e-3  # between logits, whose range is about 40
ANSWER_LIMIT_S = 240.0
TEXTS = Path(__file__).parent / "texts"

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
QUESTIONS = ["Why is the sky blue?", "Write a haiku about a winter morning."]
DOCUMENTS = [("lighthouse", 220), ("bakery", 150)]  # the first so many words

Ids = list[int]


@dataclass(frozen=True)
class Answered:
    prompt: Ids
    output: Ids
    cached_tokens: int


def twenty_prompts(tokenizer: Any) -> list[str]:
    """Prompts of 5 to about 300 tokens: English, other languages, code, numbers, chat."""
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


def ask_all(
    base_url: str, prompts: Sequence[str | Ids], new_tokens: int, *, at_once: int
) -> list[Answered]:
    """Greedy answers of exactly `new_tokens` from /generate, in order; `at_once` run together."""

    def ask(prompt: str | Ids) -> Answered:
        body = {
            "text" if isinstance(prompt, str) else "input_ids": prompt,
            "sampling_params": {
                "temperature": 0,
                "ignore_eos": True,
                "max_new_tokens": new_tokens,
            },
            "return_prompt_token_ids": True,
        }
        response = client.post("/generate", json=body)
        assert response.status_code == 200, response.text
        answer = response.json()
        assert len(answer["output_ids"]) == new_tokens
        cached_tokens = answer["meta_info"]["cached_tokens"]
        return Answered(answer["prompt_token_ids"], answer["output_ids"], cached_tokens)

    limits = httpx.Limits(max_connections=None)
    with (
        httpx.Client(base_url=base_url, timeout=ANSWER_LIMIT_S, limits=limits) as client,
        ThreadPoolExecutor(at_once) as pool,
    ):
        return list(pool.map(ask, prompts))


class Reference:
    """transformers in float32 on CPU."""

    def __init__(self, gguf_file: Path) -> None:
        from transformers import AutoModelForCausalLM

        self._model = AutoModelForCausalLM.from_pretrained(
            gguf_file.parent, gguf_file=gguf_file.name, dtype=torch.float32
        ).eval()

    @torch.inference_mode()
    def logits(self, ids: Ids) -> torch.Tensor:
        """Of the token behind each of ids, [len(ids), vocab] f32."""
        logits: torch.Tensor = self._model(torch.tensor([ids])).logits[0]
        return logits

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
