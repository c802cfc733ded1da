"""A fact hidden in a long text: SmolLM2 in float32 answers alike whatever computes attention."""

from __future__ import annotations

import pytest

from benchmark.greedy import TEXTS, Reference, ask_all

NEEDLE = " The password of the old harbour gate is BLUE HERON SEVEN."
QUESTION = "What is the password of the old harbour gate?"
NEW_TOKENS = 24
CONTEXTS = (1024, 4096, 8192 - NEW_TOKENS)
DEPTHS = (0.1, 0.5, 0.9)  # where in the text the needle lies

# A chunk cuts the long prompts, so that most of their attention is over what is cached.
SERVERS = {
    "triton": ["--device=cuda", "--enable-pd-multiplex", "--chunked-prefill-size=2048"],
    "triton, fused steps": [
        "--device=cuda",
        "--enable-mixed-chunk",
        "--chunked-prefill-size=512",
    ],
    "torch_native": ["--device=cuda", "--attention-backend=torch_native"],
    "torch_native on CPU": ["--device=cpu"],
}


def haystacks(tokenizer) -> list[str]:
    """Chats of just under each context, with the needle at each depth."""
    hay = " ".join(path.read_text(encoding="utf-8") for path in sorted(TEXTS.glob("*.txt")))
    words = (hay.split() * 40)[:12_000]
    ids = tokenizer(" ".join(words), add_special_tokens=False)["input_ids"]
    prompts = []
    for context in CONTEXTS:
        text = tokenizer.decode(ids[: context - 120])
        for depth in DEPTHS:
            cut = text.find(".", int(depth * len(text))) + 1
            content = f"{text[:cut]}{NEEDLE}{text[cut:]}\n\n{QUESTION}"
            chat = [{"role": "user", "content": content}]
            prompts.append(
                tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
            )
    return prompts


@pytest.fixture(scope="module")
def answers(smollm2, ask_servers):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2.parent, gguf_file=smollm2.name)
    prompts = haystacks(tokenizer)
    servers = {
        name: ["--dtype=float32", "--max-total-tokens=64K", *flags]
        for name, flags in SERVERS.items()
    }
    found = ask_servers(
        smollm2, servers, lambda base_url: ask_all(base_url, prompts, NEW_TOKENS, at_once=3)
    )
    for prompt, answered in zip(prompts, found["triton"], strict=True):
        depth = prompt.find(NEEDLE) / len(prompt)
        print(f"\n{len(answered.prompt)} tokens, needle at {depth:.0%}: ", end="")
        print(repr(tokenizer.decode(answered.output)), end="")
    return found


@pytest.mark.timeout(540)
def test_every_backend_gives_the_same_answer(answers, smollm2):
    reference = Reference(smollm2)
    plain = answers["torch_native on CPU"]
    assert max(len(answered.prompt) for answered in plain) > 8000
    for name, run in answers.items():
        for answered, expected in zip(run, plain, strict=True):
            if answered.output != expected.output:
                # Only where two tokens are as good as each other may an answer part.
                assert reference.ties(answered.prompt, answered.output) or reference.ties(
                    expected.prompt, expected.output
                ), (name, len(answered.prompt))
