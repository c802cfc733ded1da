"""Penalties and biases against a naive reference in f64, and transformers' own generation."""

from __future__ import annotations

import os
from collections import Counter

import numpy as np
import pytest
import torch
import transformers

from sglang.srt.layers.penalties import BLOCK_LINES, History, PenaltyTable
from sglang.srt.layers.sampler import SamplingBatch, sample
from sglang.srt.logprobs import LogprobWish
from sglang.srt.sampling_params import SamplingParams

VOCAB_SIZE = 133
CPU = torch.device("cpu")
FLAGS = {"max_total_tokens": 400, "chunked_prefill_size": 24, "max_running_requests": 6}
CHUNKED = {"enable_pdmux": True, "pd_multiplex_policy": "chunked:10"}
needs_two_cores = pytest.mark.skipif(
    len(os.sched_getaffinity(0)) < 2, reason="needs two cores to split"
)


def adjusted(logits: torch.Tensor, prompt: list[int], output: list[int], wish: SamplingParams):
    """Logits [vocab] f64 as one request's next token is chosen by them, token by token."""
    result = logits.double().clone()
    times = Counter(output)
    for token in {*prompt, *output}:
        value = float(result[token])
        if times[token]:
            value -= wish.frequency_penalty * times[token] + wish.presence_penalty
        result[token] = (
            value / wish.repetition_penalty if value > 0 else value * wish.repetition_penalty
        )
    for token, bias in wish.logit_bias.items():
        result[token] += bias
    return result


WISHES = [
    SamplingParams(frequency_penalty=0.7),
    SamplingParams(presence_penalty=-1.5, repetition_penalty=0.6),
    SamplingParams(),
    SamplingParams(repetition_penalty=1.8, logit_bias={3: -4.0, 100: 2.5}),
    SamplingParams(frequency_penalty=-2.0, presence_penalty=2.0, repetition_penalty=1.1),
    SamplingParams(logit_bias={0: 1.0}),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_those_of_the_naive_reference(dtype):
    """Twenty penalised rows, more than a block holds, over a few steps."""
    draw = np.random.default_rng(0)
    wishes = [WISHES[i % len(WISHES)] for i in range(30)]
    owners = [object() for _ in wishes]
    prompts = [draw.integers(0, VOCAB_SIZE, size) for size in draw.integers(1, 60, len(wishes))]
    outputs = [draw.integers(0, 40, size).tolist() for size in draw.integers(0, 30, len(wishes))]
    table = PenaltyTable(VOCAB_SIZE, CPU)
    for owner, wish, prompt, output in zip(owners, wishes, prompts, outputs, strict=True):
        if wish.penalises:
            table.take(owner)
            table.begin(History(owner, prompt, np.array(output, dtype=np.int64)))
    assert table.num_blocks == 2
    batch = SamplingBatch.from_params(
        wishes, [0] * len(wishes), VOCAB_SIZE, CPU, penalised=table.rows_of(owners, wishes)
    )
    positions = torch.zeros(len(wishes), dtype=torch.int64)
    for _ in range(4):
        logits = torch.randn(len(wishes), VOCAB_SIZE, dtype=torch.float32).to(dtype)
        before = logits.clone()
        got = batch.adjusted(logits, positions)
        assert torch.equal(logits, before)
        for row, wish in enumerate(wishes):
            expected = adjusted(logits[row], prompts[row].tolist(), outputs[row], wish)
            torch.testing.assert_close(got[row].double(), expected, rtol=1e-5, atol=1e-5)
        tokens = torch.from_numpy(draw.integers(0, VOCAB_SIZE, len(wishes)))
        batch.count(tokens)
        for output, token in zip(outputs, tokens.tolist(), strict=True):
            output.append(token)


def test_sample_takes_the_adjusted_logits():
    logits = torch.zeros(2, VOCAB_SIZE)
    logits[:, 5] = 1.0
    wishes = [SamplingParams(temperature=0, logit_bias={9: 1.5}), SamplingParams(temperature=0)]
    batch = SamplingBatch.from_params(wishes, [0, 0], VOCAB_SIZE, CPU)
    assert sample(logits, torch.zeros(2, dtype=torch.int64), batch).tolist() == [9, 5]


def test_a_line_is_written_anew_for_each_owner_and_blocks_are_given_back():
    table = PenaltyTable(VOCAB_SIZE, CPU)
    owners = [object() for _ in range(BLOCK_LINES + 1)]
    for owner in owners:
        table.take(owner)
        table.take(owner)
        table.begin(History(owner, np.array([4]), np.array([6, 6])))
    assert table.num_blocks == 2
    table.forget(owners[3])
    table.forget(owners[3])
    table.forget("never taken")
    table.take("new")
    table.begin(History("new", np.array([1]), np.array([], dtype=np.int64)))
    assert table.num_blocks == 2
    wish = SamplingParams(frequency_penalty=1.0)
    [rows] = table.rows_of(["new"], [wish])
    logits = torch.ones(1, VOCAB_SIZE)
    rows.apply(logits)
    assert torch.equal(logits, torch.ones(1, VOCAB_SIZE))
    for owner in (*owners, "new"):
        table.forget(owner)
    assert table.num_blocks == 0


@pytest.fixture(scope="module")
def model_dir(tiny_model_dir):
    return tiny_model_dir("llama", num_hidden_layers=4)


@pytest.fixture(scope="module")
def model(model_dir):
    return transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)


@torch.inference_mode()
def greedy(model, prompt: list[int], wish: SamplingParams) -> list[int]:
    """By whole forward passes and the naive reference."""
    output: list[int] = []
    for _ in range(wish.max_new_tokens or 0):
        logits = model(torch.tensor([[*prompt, *output]])).logits[0, -1]
        output.append(int(adjusted(logits, prompt, output, wish).argmax()))
    return output


def prompt_of(length: int, start: int = 3) -> list[int]:
    return [(start + 7 * i) % VOCAB_SIZE for i in range(length)]


def wish_of(count: int, **fields) -> SamplingParams:
    return SamplingParams(
        **{"temperature": 0.0, "ignore_eos": True, "max_new_tokens": count, **fields}
    )


REQUESTS = [
    (prompt_of(60), wish_of(14, repetition_penalty=1.7)),
    (prompt_of(9, start=40), wish_of(20, frequency_penalty=1.2, presence_penalty=0.4)),
    (prompt_of(31, start=9), wish_of(17)),
    (prompt_of(5, start=70), wish_of(25, presence_penalty=2.0, logit_bias={8: 3.0, 77: -50.0})),
    (prompt_of(44, start=2), wish_of(9, frequency_penalty=-2.0)),
]
POLICIES = [
    pytest.param({}, id="turns"),
    pytest.param(CHUNKED, id="chunked", marks=needs_two_cores),
]


@pytest.mark.parametrize("flags", POLICIES)
def test_steps_launched_ahead_penalise_every_token_before_them(
    flags, model_dir, model, tiny_engine
):
    engine = tiny_engine(model_path=str(model_dir), **FLAGS, **flags)
    answers = engine.serve([(prompt, wish, None) for prompt, wish in REQUESTS])
    for (prompt, wish), answer in zip(REQUESTS, answers, strict=True):
        assert answer.ids == greedy(model, prompt, wish)
    plain = wish_of(14)
    assert answers[0].ids != greedy(model, REQUESTS[0][0], plain)
    assert engine.parts.executor.runner.penalties.num_blocks == 0


@pytest.mark.parametrize("flags", POLICIES)
def test_a_retracted_request_is_penalised_for_all_it_has_had(flags, model_dir, model, tiny_engine):
    small = {**FLAGS, "max_total_tokens": 90, "schedule_conservativeness": 0.001}
    engine = tiny_engine(model_path=str(model_dir), **small, **flags)
    requests = [
        (prompt_of(30), wish_of(40, repetition_penalty=1.3, frequency_penalty=0.5)),
        (prompt_of(29, start=50), wish_of(40, presence_penalty=1.5)),
    ]
    answers = engine.serve([(prompt, wish, None) for prompt, wish in requests])
    assert sum(answer.retractions for answer in answers) > 0
    for (prompt, wish), answer in zip(requests, answers, strict=True):
        assert answer.ids == greedy(model, prompt, wish)
    assert engine.parts.executor.runner.penalties.num_blocks == 0


def test_repetition_penalty_is_that_of_transformers(model_dir, model, tiny_engine):
    engine = tiny_engine(model_path=str(model_dir), **FLAGS)
    for penalty in (0.7, 1.4):
        prompt = prompt_of(20)
        [answer] = engine.serve([(prompt, wish_of(16, repetition_penalty=penalty), None)])
        expected = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            do_sample=False,
            max_new_tokens=16,
            min_new_tokens=16,
            repetition_penalty=penalty,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert answer.ids == expected[0, len(prompt) :].tolist()


def test_log_probabilities_are_those_of_adjusted_logits(model_dir, model, tiny_engine):
    engine = tiny_engine(model_path=str(model_dir), **FLAGS)
    prompt = prompt_of(20)
    wish = wish_of(
        10,
        temperature=0.8,
        sampling_seed=3,
        frequency_penalty=1.1,
        repetition_penalty=1.2,
        logit_bias={5: 2.0},
    )
    [answer] = engine.serve([(prompt, wish, LogprobWish(start=0, top=1))])
    with torch.inference_mode():
        logits = model(torch.tensor([[*prompt, *answer.ids]])).logits[0]
    for i, (value, token, _) in enumerate(answer.logprobs.output.tokens):
        here = adjusted(logits[len(prompt) + i - 1], prompt, answer.ids[:i], wish)
        expected = (here / wish.temperature).log_softmax(-1)
        assert value == pytest.approx(float(expected[token]), abs=1e-3)
    for i, (value, token, _) in enumerate(answer.logprobs.prompt.tokens[1:]):
        expected = logits[i].double().log_softmax(-1)
        assert value == pytest.approx(float(expected[token]), abs=1e-3)


def test_a_request_that_ends_early_leaves_no_line(model_dir, tiny_engine, monkeypatch):
    engine = tiny_engine(model_path=str(model_dir), **FLAGS)
    parts = engine.parts
    penalties = parts.executor.runner.penalties
    seen = []
    read = engine.read

    def read_and_abort(answers):
        read(answers)
        [(rid, answer)] = answers.items()
        if len(answer.ids) > 4 and answer.finish is None:
            seen.append(penalties.num_blocks)
            parts.engine.abort(rid)

    monkeypatch.setattr(engine, "read", read_and_abort)
    [answer] = engine.serve([(prompt_of(10), wish_of(300, frequency_penalty=0.5), None)])
    assert answer.finish.type == "abort"
    assert seen == [1]
    assert penalties.num_blocks == 0
