"""SmolLM2 in float32: the same greedy tokens with multiplexing on and off, and as on CPU."""

from __future__ import annotations

import pytest

from benchmark.greedy import Reference, ask_all, twenty_prompts

NEW_TOKENS = 64
AT_ONCE = 8
MAX_PROMPTS_WITH_TIES = 3

SERVERS = {
    "gpu, multiplexing": ["--device=cuda", "--enable-pd-multiplex"],
    "gpu, torch attention, multiplexing": [
        "--device=cuda",
        "--enable-pd-multiplex",
        "--attention-backend=torch_native",
    ],
    "gpu": ["--device=cuda"],
    "cpu, multiplexing": ["--device=cpu", "--enable-pd-multiplex"],
}


@pytest.fixture(scope="module")
def answers(smollm2, ask_servers):
    """The answers of each server: cold, then again from the prefix cache."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2.parent, gguf_file=smollm2.name)
    texts = twenty_prompts(tokenizer)

    def ask(base_url):
        cold = ask_all(base_url, texts, NEW_TOKENS, at_once=AT_ONCE)
        prompts = [answered.prompt for answered in cold]
        return cold, ask_all(base_url, prompts, NEW_TOKENS, at_once=AT_ONCE)

    servers = {
        name: ["--dtype=float32", "--max-total-tokens=48K", *flags]
        for name, flags in SERVERS.items()
    }
    found = {}
    for name, (cold, cached) in ask_servers(smollm2, servers, ask).items():
        found[name], found[f"{name}, cached"] = cold, cached
    return found


@pytest.mark.timeout(540)
def test_greedy_tokens_agree(answers, smollm2):
    reference = Reference(smollm2)
    plain = [answered.output for answered in answers["gpu"]]
    for name, run in answers.items():
        tied = sum(reference.ties(a.prompt, a.output) > 0 for a in run)
        same = sum(a.output == expected for a, expected in zip(run, plain, strict=True))
        cached = sum(a.cached_tokens for a in run)
        print(
            f"\n{name}: {same} of {len(run)} answers as without multiplexing, {tied} with logits "
            f"within 1e-3 of each other, {cached} cached tokens",
            end="",
        )
        assert tied <= MAX_PROMPTS_WITH_TIES
        # An answer that differs has passed through a tie, on one side or the other.
        assert same >= len(run) - 2 * MAX_PROMPTS_WITH_TIES


def test_the_second_run_came_from_the_cache(answers):
    for name, run in answers.items():
        if name.endswith("cached"):
            assert [a.cached_tokens for a in run] == [len(a.prompt) - 1 for a in run], name
