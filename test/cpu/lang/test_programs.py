"""What programs send to a server, and what their states hold afterwards."""

from __future__ import annotations

import threading
from typing import Any

import pytest

import sglang as sgl

DEFAULTS = {
    "skip_special_tokens": True,
    "spaces_between_special_tokens": True,
    "max_new_tokens": 128,
    "min_new_tokens": 0,
    "n": 1,
    "stop": [],
    "stop_token_ids": [],
    "stop_regex": [],
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": -1,
    "min_p": 0.0,
    "frequency_penalty": 0.0,
    "presence_penalty": 0.0,
    "ignore_eos": False,
    "regex": None,
    "json_schema": None,
}


@sgl.function
def question(s, text):
    s += "Q: " + text + "\nA:" + sgl.gen("answer", stop="\n")


def test_a_generation_sends_the_text_so_far_and_all_sampling_parameters(server):
    server.says(" Paris.")
    state = question.run("Capital of France?")
    assert server.bodies == [
        {
            "text": "Q: Capital of France?\nA:",
            "sampling_params": {**DEFAULTS, "stop": ["\n"]},
        }
    ]
    assert state["answer"] == " Paris."
    assert state.text() == "Q: Capital of France?\nA: Paris."


def test_what_gen_leaves_open_is_taken_from_run(server):
    @sgl.function
    def program(s):
        s += sgl.gen("a", max_tokens=7, temperature=0.5, min_tokens=2, stop_token_ids=[3])
        s += sgl.gen("b")

    server.says("x", "y")
    program.run(
        max_new_tokens=99,
        temperature=0,
        top_p=0.9,
        top_k=5,
        min_p=0.1,
        frequency_penalty=0.3,
        presence_penalty=0.4,
        ignore_eos=True,
        stop=["."],
        stop_regex="[0-9]",
    )
    shared = {
        "top_p": 0.9,
        "top_k": 5,
        "min_p": 0.1,
        "frequency_penalty": 0.3,
        "presence_penalty": 0.4,
        "ignore_eos": True,
        "stop": ["."],
        "stop_regex": ["[0-9]"],
    }
    first, second = (body["sampling_params"] for body in server.bodies)
    own = {"max_new_tokens": 7, "temperature": 0.5, "min_new_tokens": 2, "stop_token_ids": [3]}
    assert first == {**DEFAULTS, **shared, **own}
    assert second == {**DEFAULTS, **shared, "max_new_tokens": 99, "temperature": 0}


def test_log_prob_fields_are_sent_only_if_asked_for(server):
    @sgl.function
    def program(s):
        s += "x" + sgl.gen("a", return_logprob=True, logprob_start_len=0, top_logprobs_num=2)
        s += sgl.gen("b", return_logprob=False)

    server.says("1", "2")
    program.run(return_text_in_logprobs=True)
    first, second = server.bodies
    assert {name: first[name] for name in first.keys() - {"text", "sampling_params"}} == {
        "return_logprob": True,
        "logprob_start_len": 0,
        "top_logprobs_num": 2,
        "return_text_in_logprobs": True,
    }
    assert second["return_logprob"] is False and "logprob_start_len" not in second


@pytest.mark.parametrize(
    ("dtype", "regex", "stop"),
    [
        (int, r"[-+]?[0-9]+[ \n]*", [".", " ", "\n"]),
        ("float", r"[-+]?[0-9]*\.?[0-9]+[ \n]*", [".", " ", "\n"]),
        (bool, r"(True|False)", ["."]),
        ("str", r'"[\w\d\s]*"', ["."]),
    ],
)
def test_a_dtype_becomes_a_regex_and_numbers_stop_at_white_space(server, dtype, regex, stop):
    @sgl.function
    def program(s):
        s += "n=" + sgl.gen("n", dtype=dtype, stop=".")

    server.says("1")
    program.run()
    [body] = server.bodies
    assert body["sampling_params"]["regex"] == regex
    assert body["sampling_params"]["stop"] == stop


def test_gen_int_and_gen_string_are_gens_of_a_type(server):
    @sgl.function
    def program(s):
        s += sgl.gen_int("n", max_tokens=3) + sgl.gen_string("t", temperature=0)

    server.says("1", '"x"')
    program.run()
    first, second = (body["sampling_params"] for body in server.bodies)
    assert first["regex"].startswith("[-+]?") and first["max_new_tokens"] == 3
    assert second["regex"].startswith('"') and second["temperature"] == 0


def test_a_regex_and_a_schema_are_sent_as_they_are(server):
    @sgl.function
    def program(s):
        s += sgl.gen("a", regex="(a|b)+") + sgl.gen("b", json_schema='{"type": "object"}')

    server.says("ab", "{}")
    program.run()
    first, second = (body["sampling_params"] for body in server.bodies)
    assert (first["regex"], first["json_schema"]) == ("(a|b)+", None)
    assert (second["regex"], second["json_schema"]) == (None, '{"type": "object"}')


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"regex": "("}, "regex"),
        ({"dtype": list}, "dtype"),
        ({"dtype": int, "regex": "a"}, "dtype: does not go with regex"),
        ({"choices": []}, "choices"),
        ({"choices": ["a", ""]}, "choices"),
    ],
)
def test_a_gen_that_cannot_be_is_refused_where_it_is_written(arguments, problem):
    with pytest.raises(ValueError, match=problem):
        sgl.gen("x", **arguments)


def test_several_answers_become_a_list_and_the_first_goes_on(server, say):
    @sgl.function
    def program(s):
        s += "x" + sgl.gen("a", n=2) + "!" + sgl.gen("b")

    def script(body):
        if body["sampling_params"]["n"] == 2:
            return [say.answer("1", id="r0"), say.answer("2", id="r1")]
        return say.answer("3")

    server.script = script
    state = program.run()
    assert state["a"] == ["1", "2"]
    assert [info["id"] for info in state.get_meta_info("a")] == ["r0", "r1"]
    assert state.text() == "x1!3"


def test_meta_info_is_what_the_server_told(server, say):
    server.script = lambda body: say.answer("yes", prompt_tokens=7)
    state = question.run("?")
    assert state.get_meta_info("answer")["prompt_tokens"] == 7


def test_a_name_used_again_is_read_anew(server):
    seen = []

    @sgl.function
    def program(s):
        for _ in range(3):
            s += sgl.gen("x")
            seen.append(s["x"])

    server.says("1", "2", "3")
    program.run()
    assert seen == ["1", "2", "3"]


def test_control_flow_may_depend_on_what_was_generated(server):
    @sgl.function
    def program(s):
        s += sgl.gen("tool")
        if s["tool"] == "search":
            s += sgl.gen("query")
        s["done"] = "query" in s
        return len(s["tool"])

    server.says("search", "cats")
    state = program.run()
    assert state["query"] == "cats" and state["done"] is True and state.ret_value == 6


def test_an_unknown_variable_is_a_key_error_that_lists_the_known(server):
    server.says("yes")
    state = question.run("?")
    with pytest.raises(KeyError, match="there are answer"):
        state["reply"]


def test_a_variable_scope_holds_all_that_was_appended_inside(server):
    @sgl.function
    def program(s):
        s += "a"
        with s.var_scope("middle"):
            s += "b" + sgl.gen("c")
            s += "d"
        s += "e"

    server.says("c")
    state = program.run()
    assert state["middle"] == "bcd" and state.text() == "abcde"


def test_forks_share_a_prefilled_text_and_their_variables_are_gathered(server, say):
    @sgl.function
    def program(s):
        s += "Tips:"
        forks = s.fork(3)
        forks += lambda i: f" tip {i}:" + sgl.gen("tip")
        forks.join()
        s += " and ".join(s["tip"])

    server.script = lambda body: say.answer(body["text"][-2])
    state = program.run()
    prefill = {"text": "Tips:", "sampling_params": {"max_new_tokens": 0}}
    assert server.bodies[0] == prefill and server.prefills == [prefill]
    assert sorted(body["text"] for body in server.generations) == [
        f"Tips: tip {i}:" for i in range(3)
    ]
    assert state["tip"] == ["0", "1", "2"]
    assert state.text() == "Tips:0 and 1 and 2"


def test_forks_run_at_the_same_time(server, say):
    together = threading.Barrier(3)

    @sgl.function
    def program(s):
        forks = s.fork(3)
        for i, fork in enumerate(forks):
            fork += f"{i}" + sgl.gen("x")
        forks.join()

    def script(body: Any) -> Any:
        together.wait(say.LIMIT_S)
        return say.answer("ok")

    server.script = script
    assert program.run()["x"] == ["ok"] * 3


def test_forks_can_be_appended_in_order_without_a_dead_endpoint(server, say):
    @sgl.function
    def program(s):
        s += "start"
        forks = s.fork(2)
        forks += ["|a" + sgl.gen("a"), "|b" + sgl.gen("b")]
        forks.join("concate_and_append")
        s += "|end"

    server.script = lambda body: say.answer(body["text"][-1].upper())
    state = program.run()
    assert state.text() == "start|aA|bB|end"
    assert {path for _, path in server.calls} == {"/generate"}


def test_a_copy_goes_on_by_itself_and_needs_no_prefill(server):
    @sgl.function
    def program(s):
        s += "x"
        with s.copy() as t:
            t += "y" + sgl.gen("tried")
        s += "z"

    server.says("!")
    state = program.run()
    assert state.text() == "xz" and state["tried"] == ["!"]
    assert server.prefills == []


@pytest.mark.parametrize(
    ("append", "error", "problem"),
    [
        (lambda s: s.__iadd__(None), ValueError, "None"),
        (lambda s: s.__iadd__(5), TypeError, "not int: 5"),
        (lambda s: s.fork(0), ValueError, "size"),
        (lambda s: s.fork(2).join("sum"), ValueError, "mode"),
        (lambda s: s.fork(2).__iadd__(["a"]), ValueError, "1 expressions were appended to 2 forks"),
        (lambda s: s.fork(1, [3]), NotImplementedError, "position_ids_offset"),
    ],
)
def test_what_cannot_be_appended_is_refused_at_once(server, append, error, problem):
    @sgl.function
    def program(s):
        append(s)

    with pytest.raises(error, match=problem):
        program.run()


def test_the_first_argument_must_be_s():
    with pytest.raises(TypeError, match="must be named s"):

        @sgl.function
        def program(state):
            pass


def test_bound_arguments_are_given_to_every_run(server):
    server.says(" 1", " 2")
    bound = question.bind(text="one?")
    bound.run()
    bound.run(text="two?")
    assert [body["text"] for body in server.bodies] == ["Q: one?\nA:", "Q: two?\nA:"]
    with pytest.raises(TypeError, match="no argument colour"):
        question.bind(colour="red")


def test_without_threads_everything_is_done_in_the_program_s_own(server):
    running: list[int] = []

    @sgl.function
    def program(s):
        s += "x" + sgl.gen("a")
        running.append(sum(t.name == "sgl-state" for t in threading.enumerate()))
        s += sgl.gen("b")

    server.says("1", "2")
    assert program.run(use_thread=False).text() == "x12"
    assert running == [0]


def test_a_program_needs_a_backend():
    with pytest.raises(ValueError, match="set_default_backend"):
        question.run("?")


def test_a_runtime_stands_for_its_endpoint(server):
    class Owner:
        endpoint = server.endpoint()

    server.says(" yes")
    sgl.global_config.default_backend = None
    assert question.run("?", backend=Owner())["answer"] == " yes"
    Owner.endpoint.shutdown()


def test_appending_to_a_finished_program_says_so(server):
    server.says(" yes")
    state = question.run("?")
    with pytest.raises(RuntimeError, match="the program is over"):
        state += "more"
