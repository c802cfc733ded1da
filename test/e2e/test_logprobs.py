"""Log-probabilities that a server tells, against a whole forward pass of transformers."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from benchmark.greedy import Reference

TOLERANCE = 1e-3
PROMPT = "The quick brown fox jumps over the lazy dog. " * 12
NEW_TOKENS = 8


@pytest.fixture(scope="module")
def logprobs(reference: Reference) -> Any:
    """logprobs(ids) -> [len(ids), vocab] f32, at a temperature."""

    def of(ids: list[int], temperature: float = 1.0) -> torch.Tensor:
        return (reference.logits(ids) / temperature).log_softmax(-1)

    return of


def agree(got: list[Any], expected: torch.Tensor, ids: list[int]) -> None:
    """Triples, and the values that they should have."""
    assert [token for _, token, _ in got] == ids
    values = [value for value, _, _ in got]
    assert values == pytest.approx(expected[ids].tolist(), abs=TOLERANCE)


def check(logprobs: Any, prompt: list[int], start: int, result: Any, temperature: float) -> None:
    info, output = result["meta_info"], result["output_ids"]
    sequence = [*prompt, *output]
    of_prompt, of_output = logprobs(sequence), logprobs(sequence, temperature)
    assert info["input_token_logprobs"][0] == [None, prompt[start], None]
    assert info["input_top_logprobs"][0] is info["input_token_ids_logprobs"][0] is None
    for i, position in enumerate(range(start + 1, len(prompt)), 1):
        expected = of_prompt[position - 1]
        agree([info["input_token_logprobs"][i]], expected, [prompt[position]])
        agree(info["input_top_logprobs"][i], expected, expected.topk(2).indices.tolist())
        agree(info["input_token_ids_logprobs"][i], expected, [11, 30])
    for i, token in enumerate(output):
        expected = of_output[len(prompt) + i - 1]
        agree([info["output_token_logprobs"][i]], expected, [token])
        agree(info["output_top_logprobs"][i], expected, expected.topk(2).indices.tolist())
        agree(info["output_token_ids_logprobs"][i], expected, [11, 30])
    assert len(info["input_token_logprobs"]) == len(prompt) - start
    assert len(info["output_token_logprobs"]) == len(output) == NEW_TOKENS


@pytest.mark.parametrize("policy", ["adaptive", "chunked:64", "static"])
def test_they_are_those_of_transformers(
    server: Any, client: Any, tokenizer: Any, logprobs: Any, policy: str
) -> None:
    if policy == "static":
        split = client.state()["pd_multiplex"]["partitions"][1]
        policy = f"static:{split['prefill_sms']}/{split['decode_sms']}"
    before = client.http.get("/pd_multiplex/policy").json()["policy"]
    prompt = tokenizer(PROMPT)["input_ids"]
    fields = {
        "return_logprob": True,
        "top_logprobs_num": 2,
        "token_ids_logprob": [11, 30],
    }
    asks = [(0, 0.0), (len(prompt) - 20, 0.0), (len(prompt) - 5, 0.7)]
    client.http.post("/pd_multiplex/policy", json={"policy": policy}).raise_for_status()
    try:
        client.flush_cache()
        for _ in range(2):  # the second time there are prefixes in the cache
            with ThreadPoolExecutor(len(asks)) as pool:
                results = list(
                    pool.map(
                        lambda ask: client.generate(
                            prompt,
                            {
                                "max_new_tokens": NEW_TOKENS,
                                "temperature": ask[1],
                                "ignore_eos": True,
                            },
                            logprob_start_len=ask[0],
                            **fields,
                        ),
                        asks,
                    )
                )
            for (start, temperature), result in zip(asks, results, strict=True):
                check(logprobs, prompt, start, result, temperature or 1.0)
        cached = [result["meta_info"]["cached_tokens"] for result in results]
        assert cached == [start for start, _ in asks]
    finally:
        client.http.post("/pd_multiplex/policy", json={"policy": before})


def test_prompts_can_be_scored_without_an_answer(
    client: Any, tokenizer: Any, logprobs: Any
) -> None:
    """How `select` of the frontend language ranks its choices."""
    result = client.generate(
        PROMPT,
        {"max_new_tokens": 0, "temperature": 0},
        return_logprob=True,
        logprob_start_len=0,
        return_text_in_logprobs=True,
    )
    prompt = tokenizer(PROMPT)["input_ids"]
    first, *rest = result["meta_info"]["input_token_logprobs"]
    assert first == [None, prompt[0], tokenizer.decode(prompt[:1])]
    expected = logprobs(prompt)[torch.arange(len(prompt) - 1), prompt[1:]]
    assert sum(value for value, _, _ in rest) / len(rest) == pytest.approx(
        float(expected.mean()), abs=TOLERANCE
    )
    assert "".join(text for _, _, text in [first, *rest]) == PROMPT
    assert result["meta_info"]["output_token_logprobs"] == []
    assert all(math.isfinite(value) for value, _, _ in rest)
