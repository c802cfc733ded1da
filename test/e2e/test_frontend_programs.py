"""Programs of the frontend language on a real server."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

import sglang as sgl
from benchmark.greedy import Reference

TOLERANCE = 1e-3
LIMIT_S = 120.0
QUESTIONS = [
    "Nora bakes 4 trays of 6 rolls and sells 15 of them. How many rolls are left?",
    "A bus has 23 passengers. 9 get off and 5 get on. How many are on the bus now?",
    "Tom saves 3 dollars a day. How many dollars does he have after two weeks?",
    "A box holds 12 pencils. How many pencils are in 7 boxes?",
    "Mia reads 18 pages on Monday and twice as many on Tuesday. How many pages in all?",
    "A rope of 45 metres is cut into 5 equal pieces. How long is one piece?",
    "There are 30 pupils and a third of them walk to school. How many do not walk?",
    "Ben has 50 marbles, loses 8 and gives away half of the rest. How many has he left?",
    "A farmer has 9 cows and 14 hens. How many legs do they have together?",
    "A film starts at 19:20 and lasts 95 minutes. How many minutes after 20:00 does it end?",
    "Three friends share 27 stickers equally. How many does each of them get?",
    "A shirt costs 40 euros and is reduced by 25 percent. What does it cost now?",
    "A car drives 60 kilometres an hour. How far does it get in two and a half hours?",
    "Lea plants 5 rows of 8 tulips; 6 do not grow. How many tulips grow?",
    "A pack of 6 eggs costs 2 euros. What do 24 eggs cost?",
    "Sam is 7 years older than Eve, who is 15. How old was Sam 4 years ago?",
    "A tank of 200 litres loses 8 litres an hour. How much is left after 12 hours?",
    "Ada scores 85, 90 and 95 points. What is her average?",
    "A garden is 12 metres long and 7 metres wide. How long is the fence around it?",
    "A baker uses 3 eggs a cake. How many cakes can be made of 20 eggs?",
]


@pytest.fixture(scope="module")
def backend(server: Any) -> Iterator[sgl.RuntimeEndpoint]:
    backend = sgl.RuntimeEndpoint(server.base_url, answer_limit_s=LIMIT_S)
    sgl.set_default_backend(backend)
    yield backend
    sgl.global_config.default_backend = None
    backend.shutdown()


@pytest.fixture(autouse=True)
def _fresh(client: Any, backend: sgl.RuntimeEndpoint) -> None:
    """Every program starts with an empty cache behind it."""
    assert sgl.flush_cache() is True


def test_the_client_s_template_is_the_model_s(
    backend: sgl.RuntimeEndpoint, tokenizer: Any, smollm2: Path
) -> None:
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": "Bye"},
    ]
    template = backend.get_chat_template()
    assert backend.get_model_name() == str(smollm2) and template.name == "chatml"
    expected = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=False)
    assert template.get_prompt(turns) == expected


@sgl.function
def two_turns(s, first, second):
    s += sgl.system("You are a helpful assistant who answers briefly.")
    s += sgl.user(first)
    s += sgl.assistant(sgl.gen("one", max_tokens=16))
    s += sgl.user(second)
    s += sgl.assistant(sgl.gen("two", max_tokens=16))


def test_a_conversation_is_that_of_the_chat_api_and_reuses_its_first_turn(client: Any) -> None:
    state = two_turns.run("Name an animal of the sea.", "What does it eat?", temperature=0)
    messages = state.messages()
    assert [m["role"] for m in messages] == ["system", "user", "assistant", "user", "assistant"]
    for turn, name in ((2, "one"), (4, "two")):
        body = {"model": "default", "temperature": 0, "max_tokens": 16, "messages": messages[:turn]}
        response = client.http.post("/v1/chat/completions", json=body)
        said = response.json()["choices"][0]["message"]["content"]
        assert said == state[name] and said.strip()
    first, second = state.get_meta_info("one"), state.get_meta_info("two")
    known = first["prompt_tokens"] + first["completion_tokens"] - 1
    assert second["cached_tokens"] >= known - 1


@sgl.function
def judge_essay(s, essay, dimensions):
    s += sgl.system("Judge essays.")
    s += sgl.user("Essay:\n" + essay + "\nJudge it.")
    with s.assistant():
        forks = s.fork(len(dimensions))
        forks += lambda i: f"As to {dimensions[i]}, it" + sgl.gen("judgment", stop=".")
        forks.join()
        s += "In summary, " + " And ".join(s["judgment"]) + sgl.gen("verdict")


def test_forks_judge_an_essay_side_by_side_on_one_prefix(client: Any) -> None:
    essay = "Cities should plant more trees, since shade cools streets and cleans the air. " * 6
    dimensions = ["clarity", "originality", "evidence"]
    state = judge_essay.run(essay, dimensions, temperature=0, max_new_tokens=16)
    judgments = state["judgment"]
    assert len(judgments) == 3 and all(text.strip() for text in judgments)
    prefix = state.text().partition("In summary")[0]
    params = {"temperature": 0, "max_new_tokens": 16, "stop": [".", "<|im_end|>"]}
    alone = [client.generate(f"{prefix}As to {d}, it", params) for d in dimensions]
    assert [answer["text"] for answer in alone] == judgments
    assert state.text().startswith(prefix + "In summary, " + " And ".join(judgments))


def test_forks_find_the_text_that_they_share_in_the_cache() -> None:
    infos = []

    @sgl.function
    def program(s):
        s += "The rivers of Europe, from the north to the south, and the towns on them. " * 4
        forks = s.fork(3)
        forks += lambda i: f" Number {i}:" + sgl.gen("x", max_tokens=4)
        infos.extend(fork.get_meta_info("x") for fork in forks)

    program.run(temperature=0)
    assert [info["cached_tokens"] > 60 for info in infos] == [True] * 3


@pytest.fixture(scope="module")
def mean_logprob(reference: Reference, tokenizer: Any) -> Callable[[str, str], float]:
    """mean_logprob(prompt, choice): over the choice's tokens, by transformers in float32."""

    def of(prompt: str, choice: str) -> float:
        ids = tokenizer(prompt + choice)["input_ids"]
        start = len(tokenizer(prompt)["input_ids"])
        assert ids[:start] == tokenizer(prompt)["input_ids"]
        logprobs = reference.logits(ids).log_softmax(-1)
        return float(sum(logprobs[i - 1, ids[i]] for i in range(start, len(ids)))) / (
            len(ids) - start
        )

    return of


@sgl.function
def classify(s, text, labels, method=sgl.token_length_normalized):
    s += "Text: " + text + "\nThe topic of this text is"
    s += sgl.select("topic", labels, choices_method=method)


@pytest.mark.parametrize(
    "text", ["The striker scored in the last minute.", "The soup needs salt and an onion."]
)
def test_a_classifier_s_probabilities_are_those_of_transformers(
    mean_logprob: Callable[[str, str], float], text: str
) -> None:
    labels = [" football", " cooking", " quantum physics"]
    state = classify.run(text, labels)
    got = state.get_meta_info("topic")["normalized_prompt_logprobs"]
    prompt = f"Text: {text}\nThe topic of this text is"
    expected = [mean_logprob(prompt, label) for label in labels]
    assert got == pytest.approx(expected, abs=TOLERANCE)
    assert state["topic"] == labels[expected.index(max(expected))]
    again = classify.run(text, labels).get_meta_info("topic")["normalized_prompt_logprobs"]
    assert again == pytest.approx(expected, abs=TOLERANCE)  # now that all of it is in the cache


def test_the_other_methods_decide_from_the_same_probabilities(
    mean_logprob: Callable[[str, str], float],
) -> None:
    labels = [" football", " cooking", " cooking recipes"]
    text = "The soup needs salt and an onion."
    for method in (sgl.greedy_token_selection, sgl.unconditional_likelihood_normalized):
        state = classify.run(text, labels, method)
        info = state.get_meta_info("topic")
        prompt = f"Text: {text}\nThe topic of this text is"
        expected = [mean_logprob(prompt, label) for label in labels]
        assert info["normalized_prompt_logprobs"] == pytest.approx(expected, abs=TOLERANCE)
        assert state["topic"] in labels
    [alone] = [row for row in info["unconditional_token_logprobs"] if len(row) == 2]
    assert alone[0][0] is None
    assert alone[1][0] == pytest.approx(mean_logprob(" cooking", " recipes"), abs=TOLERANCE)


DATE = r"(19|20)[0-9]{2}-(0[1-9]|1[0-2])-(0[1-9]|[12][0-9]|3[01])"


@sgl.function
def extract_date(s, text):
    s += "Text: " + text + "\nDate (year-month-day): " + sgl.gen("date", regex=DATE)
    s += "\nA number: " + sgl.gen_int("number", max_tokens=6)
    s += "\nIs it a date? " + sgl.gen("flag", dtype=bool)


def test_a_regex_extracts_what_matches_it() -> None:
    state = extract_date.run("The war ended on 8 May 1945.", temperature=0, max_new_tokens=32)
    assert re.fullmatch(DATE, state["date"])
    assert re.fullmatch(r"[-+]?[0-9]+[ \n]*", state["number"])
    assert state["flag"] in ("True", "False")


PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "city": {"type": "string", "enum": ["Lisbon", "Oslo", "Rome"]},
    },
    "required": ["name", "age", "city"],
    "additionalProperties": False,
}


@sgl.function
def extract_person(s, text):
    s += sgl.user("Describe the person as JSON: " + text)
    s += sgl.assistant(sgl.gen("person", json_schema=json.dumps(PERSON), max_tokens=96))


def test_a_schema_extracts_an_object_that_satisfies_it() -> None:
    import jsonschema_rs

    state = extract_person.run("Ann, 34 years old, lives in Oslo.", temperature=0)
    person = json.loads(state["person"])
    jsonschema_rs.validator_for(PERSON).validate(person)


@sgl.function
def solve(s, question):
    s += "Answer each question with a number, after a short calculation.\n"
    s += "Question: A jar holds 8 coins. How many coins are in 3 jars?\nAnswer: 8 * 3 = 24\n"
    s += "Question: " + question + "\nAnswer:" + sgl.gen("answer", stop="\n", max_tokens=16)


def test_a_batch_of_questions_is_answered_in_parallel_as_one_by_one(client: Any) -> None:
    batch = [{"question": question} for question in QUESTIONS]
    states = solve.run_batch(batch, temperature=0, num_threads=8)
    assert [QUESTIONS[i] in states[i].text() for i in range(20)] == [True] * 20
    params = {"temperature": 0, "max_new_tokens": 16, "stop": ["\n", "<|im_end|>"]}
    some = states[::4]
    alone = [client.generate(s.text().removesuffix(s["answer"]), params)["text"] for s in some]
    differing = [i for i, state in enumerate(some) if alone[i] != state["answer"]]
    assert len(differing) <= 1  # batching changes the order of additions: a tie may fall otherwise
    shared = min(state.get_meta_info("answer")["cached_tokens"] for state in states)
    assert shared >= 30  # what all programs begin with was computed before the first


def test_streaming_is_what_the_program_says_without(backend: sgl.RuntimeEndpoint) -> None:
    turns = ("Name an animal of the sea.", "What does it eat?")
    whole = two_turns.run(*turns, temperature=0)
    state = two_turns.run(*turns, temperature=0, stream=True)
    pieces = list(state.text_iter("one"))
    assert len(pieces) > 1 and "".join(pieces) == whole["one"]
    assert "".join(state.text_iter()) == whole.text()

    async def read() -> list[tuple[str, Any]]:
        state = two_turns.run(*turns, temperature=0, stream=True)
        return [pair async for pair in state.text_async_iter("two", return_meta_data=True)]

    told = asyncio.run(asyncio.wait_for(read(), LIMIT_S))
    assert len(told) > 1 and "".join(piece for piece, _ in told) == whole["two"]
    assert told[-1][1]["completion_tokens"] == whole.get_meta_info("two")["completion_tokens"]


def test_a_refused_generation_raises_what_the_server_says() -> None:
    with pytest.raises(RuntimeError, match="top_p must be in"):
        solve.run("1+1?", top_p=2.0)


def test_a_runtime_serves_programs_and_is_gone_afterwards(
    smollm2: Path, server_env: None, eventually: Callable[..., None]
) -> None:
    options = {"dtype": "float32", "context_length": 512, "max_total_tokens": 2048}
    with sgl.Runtime(model_path=str(smollm2), launch_timeout=LIMIT_S, **options) as runtime:
        family = [psutil.Process(runtime.pid)]
        family += family[0].children(recursive=True)
        state = solve.run("1+1?", backend=runtime, temperature=0)
        assert state["answer"].strip()
        ids = runtime.get_tokenizer()("Hello")["input_ids"]
        assert runtime.get_server_info()["context_length"] == 512 and len(ids) == 1
    assert not family[0].is_running()
    eventually(lambda: not any(process.is_running() for process in family), 20)
