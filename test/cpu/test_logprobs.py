"""Log-probabilities of the engine's tokens against whole forward passes of transformers."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
import transformers

from sglang.srt.errors import RequestError
from sglang.srt.layers import logprobs as device_logprobs
from sglang.srt.logprobs import LogprobRows, LogprobWish, TokenScores
from sglang.srt.managers.answer_logprobs import LogprobLists
from sglang.srt.sampling_params import SamplingParams

VOCAB_SIZE = 133
TOLERANCE = 1e-3
FLAGS = {"max_total_tokens": 400, "chunked_prefill_size": 24, "max_running_requests": 6}
needs_two_cores = pytest.mark.skipif(
    len(os.sched_getaffinity(0)) < 2, reason="needs two cores to split"
)
POLICIES = [
    pytest.param({}, id="turns"),
    pytest.param(
        {"enable_pdmux": True, "pd_multiplex_policy": "chunked:10"},
        id="chunked",
        marks=needs_two_cores,
    ),
    pytest.param(
        {"enable_pdmux": True, "pd_multiplex_policy": "static:1/1"},
        id="static",
        marks=needs_two_cores,
    ),
]


@pytest.fixture(scope="module")
def model_dir(tiny_model_dir):
    return tiny_model_dir("llama", num_hidden_layers=4)


@pytest.fixture(scope="module")
def reference(model_dir):
    """reference(ids) -> logits [len(ids), vocab] f64."""
    model = transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)

    @torch.inference_mode()
    def logits(ids):
        return model(torch.tensor([ids])).logits[0].double()

    return logits


def prompt_of(length: int, start: int = 3) -> list[int]:
    return [(start + 7 * i) % VOCAB_SIZE for i in range(length)]


def sampling_of(**fields: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 0.0, "ignore_eos": True, **fields})


def check(reference: Any, prompt: list[int], sampling: SamplingParams, wish: Any, answer: Any):
    """Every number of an answer, against the reference's logits of prompt and answer."""
    sequence = [*prompt, *answer.ids]
    logits = reference(sequence)
    start = len(prompt) if wish.start == -1 else wish.start
    scale = 1.0 if sampling.greedy else sampling.temperature
    spans = [
        (answer.logprobs.prompt, range(start, len(prompt)), 1.0),
        (answer.logprobs.output, range(len(prompt), len(sequence)), scale),
    ]
    for lists, positions, temperature in spans:
        assert [token for _, token, _ in lists.tokens] == sequence[positions.start : positions.stop]
        assert len(lists.top) == len(lists.listed) == len(positions)
        for i, position in enumerate(positions):
            value, token, _ = lists.tokens[i]
            if lists is answer.logprobs.prompt and i == 0:
                assert value is lists.top[i] is lists.listed[i] is None
                continue
            expected = (logits[position - 1] / temperature).log_softmax(-1)
            assert value == pytest.approx(float(expected[token]), abs=TOLERANCE)
            values, ids = expected.topk(wish.top)
            assert [other for _, other, _ in lists.top[i]] == ids.tolist()
            assert [v for v, _, _ in lists.top[i]] == pytest.approx(values.tolist(), abs=TOLERANCE)
            listed = wish.token_ids or []
            assert [other for _, other, _ in lists.listed[i]] == listed
            assert [v for v, _, _ in lists.listed[i]] == pytest.approx(
                expected[listed].tolist(), abs=TOLERANCE
            )


# Longer than a chunk, shorter, cut in the middle of a prompt, with and without sampling.
ASKED = [
    (70, 6, {}, LogprobWish(start=0, top=3, token_ids=[5, 2, 99])),
    (9, 12, {"temperature": 0.8, "sampling_seed": 4}, LogprobWish(start=4, top=1)),
    (61, 3, {"temperature": 1.7, "top_k": 9, "sampling_seed": 2}, LogprobWish(start=30)),
    (30, 5, {}, LogprobWish(top=5, token_ids=[7])),
    (50, 0, {}, LogprobWish(start=48, top=2)),
    (26, 1, {"temperature": 0.5, "top_p": 0.5, "sampling_seed": 9}, LogprobWish(start=25)),
    (12, 9, {}, None),
]


def requests_of(asked: Any) -> list[Any]:
    return [
        (prompt_of(length, start=11 * i), sampling_of(max_new_tokens=count, **fields), wish)
        for i, (length, count, fields, wish) in enumerate(asked)
    ]


@pytest.mark.parametrize("flags", POLICIES)
def test_values_are_those_of_transformers(flags, model_dir, reference, tiny_engine):
    engine = tiny_engine(model_path=str(model_dir), **FLAGS, **flags)
    requests = requests_of(ASKED)
    for answers in (engine.serve(requests), engine.serve(requests)):
        for (prompt, sampling, wish), answer in zip(requests, answers, strict=True):
            assert len(answer.ids) == sampling.max_new_tokens
            if wish is None:
                assert answer.logprobs.prompt.tokens == answer.logprobs.output.tokens == []
            else:
                check(reference, prompt, sampling, wish, answer)
    # The second time prefixes are cached, but not further than values are asked for.
    cached = [answer.cached_tokens for answer in answers]
    assert cached[:3] == [0, 4, 30]
    assert cached[3] > 20 and cached[4] == 48


@pytest.mark.parametrize("flags", POLICIES[:2])
def test_a_retracted_request_tells_everything_once(flags, model_dir, reference, tiny_engine):
    flags = {"schedule_conservativeness": 0.001, **flags}
    engine = tiny_engine(model_path=str(model_dir), **{**FLAGS, "max_total_tokens": 90}, **flags)
    requests = requests_of(
        [
            (30, 40, {}, LogprobWish(start=3, top=2)),
            (29, 40, {"temperature": 0.9, "sampling_seed": 3}, LogprobWish(start=0)),
        ]
    )
    answers = engine.serve(requests)
    assert sum(answer.retractions for answer in answers) > 0
    for (prompt, sampling, wish), answer in zip(requests, answers, strict=True):
        check(reference, prompt, sampling, wish, answer)


def test_asking_changes_no_token(model_dir, tiny_engine):
    engine = tiny_engine(model_path=str(model_dir), **FLAGS)
    requests = requests_of(ASKED)
    told = [answer.ids for answer in engine.serve(requests)]
    silent = [(prompt, sampling, None) for prompt, sampling, _ in requests]
    assert [answer.ids for answer in engine.serve(silent)] == told


def test_small_pieces_give_what_one_gives(model_dir, tiny_engine, monkeypatch):
    engine = tiny_engine(model_path=str(model_dir), **FLAGS)
    requests = requests_of(ASKED)
    whole = engine.serve(requests)
    monkeypatch.setattr(device_logprobs, "_PIECE_ELEMENTS", 2 * VOCAB_SIZE)
    engine.parts.cache.radix.reset()
    for one, other in zip(whole, engine.serve(requests), strict=True):
        for ours, theirs in [
            (one.logprobs.prompt, other.logprobs.prompt),
            (one.logprobs.output, other.logprobs.output),
        ]:
            assert [t[1:] for t in ours.tokens] == [t[1:] for t in theirs.tokens]
            values = [[t[0] or 0.0 for t in lists.tokens] for lists in (ours, theirs)]
            assert values[0] == pytest.approx(values[1], abs=1e-5)


def test_tokens_that_cannot_be_chosen_are_told_so(model_dir, tiny_engine):
    engine = tiny_engine(model_path=str(model_dir), **FLAGS)
    sampling = sampling_of(max_new_tokens=2, min_new_tokens=2, stop_token_ids=[7])
    [answer] = engine.serve([(prompt_of(5), sampling, LogprobWish(token_ids=[7]))])
    assert [row[0][0] for row in answer.logprobs.output.listed] == [-float("inf")] * 2


@pytest.mark.parametrize(
    ("wish", "field"),
    [
        (LogprobWish(top=-1), "top_logprobs_num"),
        (LogprobWish(top=VOCAB_SIZE + 1), "top_logprobs_num"),
        (LogprobWish(token_ids=[VOCAB_SIZE]), "token_ids_logprob"),
        (LogprobWish(token_ids=[0] * 5000), "token_ids_logprob"),
        (LogprobWish(start=-2), "logprob_start_len"),
    ],
)
def test_a_bad_wish_names_its_field(wish, field):
    with pytest.raises(RequestError, match=field) as refused:
        wish.check(VOCAB_SIZE)
    assert refused.value.field == field


def test_a_start_behind_the_prompt_is_refused():
    assert LogprobWish().for_prompt(7).start == 7
    assert LogprobWish(start=6).for_prompt(7).start == 6
    with pytest.raises(RequestError, match="less than the prompt's 7 tokens"):
        LogprobWish(start=7).for_prompt(7)


def test_rows_are_cut_and_named_token_by_token():
    wish = LogprobWish(top=1, token_ids=[4], texts=True)
    column = torch.tensor([[-1.0], [-2.0], [-3.0]])
    scores = TokenScores(
        column[:, 0].numpy(),
        column.numpy(),
        torch.tensor([[8], [9], [8]]).int().numpy(),
        (column * 2).numpy(),
    )
    rows = LogprobRows.of([5, 6, 7], scores, wish).first(2)
    named = rows.with_texts(lambda ids: [f"<{token}>" for token in ids])
    lists = LogprobLists()
    lists.extend(named)
    assert lists.tokens == [(-1.0, 5, "<5>"), (-2.0, 6, "<6>")]
    assert lists.top == [[(-1.0, 8, "<8>")], [(-2.0, 9, "<9>")]]
    assert lists.listed == [[(-2.0, 4, "<4>")], [(-4.0, 4, "<4>")]]
    empty = LogprobLists()
    empty.extend(rows.first(0))
    assert empty.tokens == empty.top == empty.listed == []
