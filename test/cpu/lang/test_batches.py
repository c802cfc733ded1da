"""run_batch, cache and trace."""

from __future__ import annotations

import threading

import pytest

import sglang as sgl
from sglang.lang.errors import TracingError
from sglang.lang.ir import SglGen, SglVariable
from sglang.lang.tracer import Join

PREAMBLE = "You are given a sentence. Say in one word what feeling it expresses, in English.\n"


@sgl.function
def feeling(s, sentence, hint="none"):
    s += PREAMBLE
    s += "Sentence: " + sentence + " Hint: " + hint + "\nFeeling:"
    s += sgl.gen("feeling")


def echo(say):
    return lambda body: say.answer(body["text"][-60:].split("Sentence: ")[-1].split(" ")[0])


@pytest.mark.parametrize("num_threads", ["auto", 1, 3])
def test_states_come_in_the_order_of_the_batch(server, say, num_threads):
    server.script = echo(say)
    batch = [{"sentence": f"s{i}"} for i in range(20)]
    states = feeling.run_batch(batch, num_threads=num_threads, temperature=0, max_new_tokens=5)
    assert [state["feeling"] for state in states] == [f"s{i}" for i in range(20)]
    assert all(body["sampling_params"]["temperature"] == 0 for body in server.generations)
    assert all(body["sampling_params"]["max_new_tokens"] == 5 for body in server.generations)


def test_programs_of_a_batch_run_at_the_same_time(server, say):
    together = threading.Barrier(4)

    def script(body):
        if not say.is_prefill(body):
            together.wait(say.LIMIT_S)
        return say.answer("ok")

    server.script = script
    assert len(feeling.run_batch([{"sentence": "s"}] * 8, num_threads=4)) == 8


def test_no_more_programs_run_than_there_are_threads(server, say):
    running, most = 0, 0
    lock = threading.Lock()
    in_pairs = threading.Barrier(2)

    def script(body):
        nonlocal running, most
        if say.is_prefill(body):
            return say.answer("")
        with lock:
            running += 1
            most = max(most, running)
        in_pairs.wait(say.LIMIT_S)  # none is answered before the other has come
        with lock:
            running -= 1
        return say.answer("ok")

    server.script = script
    feeling.run_batch([{"sentence": "s"}] * 12, num_threads=2)
    assert most == 2


def test_the_text_that_all_programs_share_is_cached_first(server, say):
    server.script = echo(say)
    feeling.run_batch([{"sentence": "a"}, {"sentence": "b"}])
    prefill = {"text": PREAMBLE + "Sentence: ", "sampling_params": {"max_new_tokens": 0}}
    assert server.bodies[0] == prefill and server.prefills == [prefill]


def test_caching_first_can_be_switched_off(server, say, monkeypatch):
    monkeypatch.setattr(sgl.global_config, "enable_precache_with_tracing", False)
    server.script = echo(say)
    feeling.run_batch([{"sentence": "a"}, {"sentence": "b"}])
    assert server.prefills == []


def test_positional_arguments_and_defaults_fill_up(server, say):
    server.script = echo(say)
    states = feeling.run_batch([["a"], ("b", "sad")], num_threads=1)
    assert [state["feeling"] for state in states] == ["a", "b"]
    assert "Hint: sad" in states[1].text()


@pytest.mark.parametrize("row", [[], ["a", "b", "c"], "a", 5])
def test_a_row_that_does_not_fit_names_its_place(server, row):
    with pytest.raises(TypeError, match=r"batch_kwargs\[1\]"):
        feeling.run_batch([["ok"], row])


def test_an_empty_batch_is_done(server):
    assert feeling.run_batch([]) == []
    assert list(feeling.run_batch([], generator_style=True)) == []


@pytest.mark.parametrize("num_threads", [0, "many", 1.5])
def test_a_number_of_threads_must_be_one(server, num_threads):
    with pytest.raises(ValueError, match="num_threads"):
        feeling.run_batch([{"sentence": "a"}], num_threads=num_threads)


def test_a_generator_yields_states_before_the_batch_is_done(server, say):
    held = threading.Event()

    def script(body):
        if "Sentence: last" in body["text"]:
            held.wait(say.LIMIT_S)
        return say.answer("ok")

    server.script = script
    batch = [{"sentence": "first"}, {"sentence": "last"}]
    states = feeling.run_batch(batch, generator_style=True, num_threads=2)
    assert next(states)["feeling"] == "ok"
    assert not held.is_set()
    held.set()
    assert [state["feeling"] for state in states] == ["ok"]


def test_a_generator_that_is_given_up_starts_no_more(server, say):
    server.script = echo(say)
    states = feeling.run_batch(
        [{"sentence": f"s{i}"} for i in range(50)], generator_style=True, num_threads=1
    )
    next(states)
    states.close()
    assert len(server.generations) <= 5


def test_a_progress_bar_counts_programs(server, say, capsys):
    server.script = echo(say)
    feeling.run_batch([{"sentence": "a"}] * 3, progress_bar=True)
    assert "3/3" in capsys.readouterr().err


def test_cache_prefills_the_common_text_of_a_bound_program(server):
    feeling.bind(sentence="fixed").cache()
    assert server.bodies == [
        {
            "text": PREAMBLE + "Sentence: fixed Hint: ",
            "sampling_params": {"max_new_tokens": 0},
        }
    ]


def test_a_short_common_text_is_not_worth_a_call(server):
    @sgl.function
    def short(s, x):
        s += "Q: " + x

    short.cache()
    assert server.bodies == []


def test_roles_are_part_of_the_cached_text_as_they_are_of_a_run(server, say):
    @sgl.function
    def chat(s, x):
        s += sgl.system("Answer with a single word, and never with more than that. Be kind.")
        s += sgl.user("Word: " + x) + sgl.assistant(sgl.gen("a"))

    server.script = lambda body: say.answer("ok")
    chat.cache()
    chat.run("y")
    cached, asked = (body["text"] for body in server.bodies)
    assert asked.startswith(cached) and cached.endswith("Word: ")


def test_a_trace_is_the_program_s_graph_and_generates_nothing(server):
    @sgl.function
    def program(s, topic):
        s += "Tips on " + topic + ":"
        forks = s.fork(2)
        for fork in forks:
            fork += sgl.gen("tip", max_tokens=9)
        forks.join()
        s += s["tip"][0] + "."

    trace = program.trace()
    exprs = [node.expr for node in trace.nodes]
    shapes = [
        "Constant('Tips on ')",
        "Argument('topic')",
        "Constant(':')",
        "Fork(states=(1, 2))",
        "Gen('tip')",
        "Gen('tip')",
        "Join(states=(1, 2))",
        "Variable('tip', state=1)",
        "Constant('.')",
    ]
    assert [repr(expr) for expr in exprs] == shapes
    assert [node.previous for node in trace.nodes] == [
        (), (0,), (1,), (2,), (3,), (3,), (3, 4, 5), (6,), (7,),
    ]  # fmt: skip
    assert isinstance(exprs[4], SglGen) and exprs[4].sampling["max_new_tokens"] == 9
    assert isinstance(exprs[6], Join) and isinstance(exprs[7], SglVariable)
    assert trace.last_node is trace.nodes[-1] and server.bodies == []


def test_a_trace_takes_arguments_and_prints_one_line_a_step(server, capsys):
    trace = feeling.trace(sentence="I won")
    trace.print_graph_dfs()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(trace.nodes)
    assert lines[1] == "%1 = Constant('Sentence: I won Hint: ')  # state 0, after %0"
    assert lines[2] == "%2 = Argument('hint')  # state 0, after %1"


@pytest.mark.parametrize(
    "look",
    [
        lambda s, x: f"{x}",
        lambda s, x: bool(x),
        lambda s, x: x == "a",
        lambda s, x: len(x),
        lambda s, x: x[0],
        lambda s, x: [*x],
        lambda s, x: s.text(),
    ],
)
def test_a_trace_refuses_to_look_into_what_is_not_known(look):
    @sgl.function
    def program(s, x):
        look(s, x)

    with pytest.raises(TracingError, match="while tracing"):
        program.trace()


def test_a_program_that_another_calls_is_traced_with_it(server):
    inner = []

    @sgl.function
    def outer(s, x):
        inner.append(feeling(x))

    outer.trace()
    assert "Argument('x')" in [repr(node.expr) for node in inner[0].nodes]
    assert server.bodies == []


def test_a_program_that_a_running_one_calls_is_run(server, say):
    @sgl.function
    def outer(s):
        s += feeling("cats")["feeling"]

    server.script = echo(say)
    assert outer.run().text() == "cats"
