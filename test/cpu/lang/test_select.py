"""How select scores its choices from what the server reports, and how each method decides."""

from __future__ import annotations

import pytest

import sglang as sgl
from sglang.lang.backend.select_scores import logprob_start, scored_tokens
from sglang.lang.errors import BackendError

WORDS = {"The": 10, " sky": 11, " is": 12, " b": 13, "lue": 14, " red": 15, " green": 16, "ish": 17}

PROMPT = ["The", " sky", " is"]
SCORES = {" b": -1.0, "lue": -0.5, " red": -0.9, " green": -0.8, "ish": -4.0, " is": -3.0}
ALONE = {"lue": -0.1, "ish": -9.0}


@pytest.fixture
def reporting(server, say):
    """The server tokenises along WORDS and reports log-probs as SGLang does: the first is null."""

    def tokens(text):
        found = []
        while text:
            [word] = [word for word in sorted(WORDS, key=len) if text.startswith(word)][-1:]
            found.append(word)
            text = text.removeprefix(word)
        return found

    def report(words, start, scores):
        triples = [[scores.get(word, -7.0), WORDS[word], word] for word in words[start:]]
        triples[0][0] = None
        return triples

    def script(body):
        assert body["sampling_params"] == {"max_new_tokens": 0, "temperature": 0}
        if "input_ids" in body:
            words = {number: word for word, number in WORDS.items()}
            rows = [[words[i] for i in ids] for ids in body["input_ids"]]
            return [
                say.answer("", input_token_logprobs=report(row, body["logprob_start_len"], ALONE))
                for row in rows
            ]
        if isinstance(body["text"], str):
            return say.answer("", prompt_tokens=len(tokens(body["text"])))
        start = body["logprob_start_len"]
        return [
            say.answer(
                "",
                input_token_logprobs=report(tokens(text), start, SCORES),
                output_token_logprobs=[],
            )
            for text in body["text"]
        ]

    server.script = script
    return server


@sgl.function
def colour(s, choices, method=sgl.token_length_normalized, prompt="The sky is"):
    s += prompt + sgl.select("colour", choices, choices_method=method) + "."


def test_the_requests_are_a_prefill_of_the_prompt_and_one_batch_of_choices(reporting):
    state = colour.run([" blue", " red"])
    params = {"max_new_tokens": 0, "temperature": 0}
    assert reporting.bodies == [
        {"text": "The sky is", "sampling_params": params},
        {
            "text": ["The sky is blue", "The sky is red"],
            "sampling_params": params,
            "return_logprob": True,
            "return_text_in_logprobs": True,
            "logprob_start_len": 1,
        },
    ]
    assert state["colour"] == " blue" and state.text() == "The sky is blue."


def test_only_the_choice_s_own_tokens_are_scored(reporting):
    info = colour.run([" blue", " red"]).get_meta_info("colour")
    assert info["normalized_prompt_logprobs"] == [-0.75, -0.9]
    assert info["input_token_logprobs"] == [
        [[-1.0, 13, " b"], [-0.5, 14, "lue"]],
        [[-0.9, 15, " red"]],
    ]
    assert info["output_token_logprobs"] == [[], []]


def test_the_highest_mean_wins_whatever_the_length(reporting):
    assert colour.run([" red", " blue"])["colour"] == " blue"  # -0.75 a token, -1.5 in all


def test_greedy_selection_looks_at_one_token_after_the_other(reporting):
    state = colour.run([" blue", " red", " greenish"], sgl.greedy_token_selection)
    assert state["colour"] == " greenish"  # " green" is the likeliest first token
    info = state.get_meta_info("colour")
    assert info["greedy_logprob_matrix"] == [[-1.0, -0.5], [-0.9, -0.9], [-0.8, -4.0]]


def test_greedy_selection_extends_a_shorter_choice_by_its_mean(reporting):
    state = colour.run([" greenish", " green"], sgl.greedy_token_selection)
    assert state["colour"] == " green"


def test_unconditional_normalisation_asks_again_without_the_prompt(reporting):
    state = colour.run([" blue", " greenish"], sgl.unconditional_likelihood_normalized)
    assert reporting.bodies[-1] == {
        "input_ids": [[13, 14], [16, 17]],
        "sampling_params": {"max_new_tokens": 0, "temperature": 0},
        "return_logprob": True,
        "logprob_start_len": 0,
    }
    info = state.get_meta_info("colour")
    gains = [(-1.0 + -0.5 + 0.1) / 2, (-0.8 + -4.0 + 9.0) / 2]
    assert info["normalized_unconditional_prompt_logprobs"] == pytest.approx(gains)
    assert state["colour"] == " greenish"


def test_a_token_that_merges_prompt_and_choice_is_scored_with_the_choice():
    # "The sky is " + "red": the space that ended the prompt has moved into the next token.
    assert logprob_start(4) == 2
    reported = [[None, 12, " is"], [-0.9, 15, " red"]]
    assert scored_tokens(reported, "The sky is ", 4, "red") == [[-0.9, 15, " red"]]


def test_a_prompt_of_one_token_leaves_the_choice_whole():
    reported = [[None, 10, "The"], [-1.0, 11, " sky"]]
    assert logprob_start(1) == 0
    assert scored_tokens(reported, "The", 1, " sky") == [[-1.0, 11, " sky"]]


def test_a_choice_that_has_vanished_into_the_prompt_s_tokens_is_an_error():
    with pytest.raises(BackendError, match="word's boundary"):
        scored_tokens([[None, 10, "food"]], "foo", 2, "d")


def test_gen_with_choices_is_a_select(reporting):
    @sgl.function
    def program(s):
        s += "The sky is" + sgl.gen("colour", choices=[" red", " blue"])

    assert program.run()["colour"] == " blue"


def test_a_method_of_one_s_own_gets_the_scored_tokens(reporting):
    from sglang.lang.choices import ChoicesDecision, ChoicesSamplingMethod

    class LeastLikely(ChoicesSamplingMethod):
        def __call__(self, *, choices, normalized_prompt_logprobs, input_token_logprobs, **_):
            assert all(token[0] is not None for row in input_token_logprobs for token in row)
            lowest = normalized_prompt_logprobs.index(min(normalized_prompt_logprobs))
            return ChoicesDecision(choices[lowest], {"lowest": lowest})

    state = colour.run([" blue", " red"], LeastLikely())
    assert state["colour"] == " red" and state.get_meta_info("colour") == {"lowest": 1}


def test_a_temperature_is_refused(reporting):
    @sgl.function
    def program(s):
        s += "The sky is" + sgl.select("colour", [" red"], temperature=0.7)

    with pytest.raises(NotImplementedError, match="temperature"):
        program.run()
