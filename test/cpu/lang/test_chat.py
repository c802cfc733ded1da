"""Roles, chat templates and reasoning."""

from __future__ import annotations

import itertools

import pytest

import sglang as sgl
from sglang.lang.chat_template import (
    ChatTemplate,
    get_chat_template,
    get_chat_template_by_model_path,
    register_chat_template,
    register_chat_template_matching_function,
)
from sglang.lang.chat_template_table import FAMILIES, TEMPLATES
from sglang.lang.reasoning import ReasoningSplitter, reasoning_format

TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello!"},
    {"role": "user", "content": "Bye"},
]


@sgl.function
def chat(s, first, second):
    s += sgl.system("Be brief.")
    s += sgl.user(first)
    s += sgl.assistant(sgl.gen("one"))
    with s.user():
        s += second
    with s.assistant():
        s += sgl.gen("two")


@pytest.fixture
def chatml(server):
    backend = server.endpoint(chat_template_name="chatml")
    sgl.set_default_backend(backend)
    yield server
    backend.shutdown()


def test_roles_become_the_template_s_text_and_its_end_stops_generation(chatml):
    chatml.says("Hello!", "Goodbye.")
    state = chat.run("Hi", "Bye")
    first, second = chatml.bodies
    opening = (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert first["text"] == opening
    assert first["sampling_params"]["stop"] == ["<|im_end|>"]
    assert second["text"] == opening + (
        "Hello!<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n"
    )
    assert state.messages() == [*TURNS, {"role": "assistant", "content": "Goodbye."}]


def test_a_program_s_own_stops_stand_beside_the_template_s(chatml):
    @sgl.function
    def program(s):
        s += sgl.assistant_begin() + sgl.gen("x", stop=["\n", "<|im_end|>"]) + sgl.assistant_end()

    chatml.says("x")
    program.run()
    assert chatml.bodies[0]["sampling_params"]["stop"] == ["\n", "<|im_end|>"]


def test_a_default_system_prompt_is_put_before_the_first_message(server):
    backend = server.endpoint(chat_template_name="qwen")

    @sgl.function
    def program(s):
        s += sgl.user("Hi")
        s += sgl.assistant(sgl.gen("x"))

    server.says("Hello")
    state = program.run(backend=backend)
    assert server.bodies[0]["text"].startswith(
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nHi"
    )
    assert [message["role"] for message in state.messages()] == ["system", "user", "assistant"]
    server.says("Hello", "Bye")
    assert chat.run("Hi", "x", backend=backend).text().count("<|im_start|>system") == 1
    backend.shutdown()


def test_text_outside_of_roles_is_plain(server):
    @sgl.function
    def program(s):
        s += "1+1=" + sgl.gen("x")

    server.says("2")
    state = program.run()
    assert state.messages() == [] and state.text() == "1+1=2"


def test_a_role_must_end_before_another_s_end(server):
    @sgl.function
    def program(s):
        s += sgl.user_begin() + sgl.assistant_end()

    with pytest.raises(RuntimeError, match="assistant ends, but the open role is user"):
        program.run()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (
            "llama-2-chat",
            "[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST]Hello! </s><s>[INST] Bye [/INST]",
        ),
        ("mistral", "[INST] Be brief.\n\nHi [/INST]Hello!</s>[INST] Bye [/INST]"),
        (
            "gemma-it",
            "<start_of_turn>user\nBe brief.\n\nHi<end_of_turn>\n<start_of_turn>model\nHello!"
            "<end_of_turn>\n<start_of_turn>user\nBye<end_of_turn>\n",
        ),
        ("default", "SYSTEM:Be brief.\nUSER:Hi\nASSISTANT:Hello!\nUSER:Bye\n"),
        (
            "llama-3-instruct",
            "<|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\nHello!<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|>",
        ),
        (
            "vicuna_v1.1",
            "Be brief. USER: Hi ASSISTANT:Hello!</s>USER: Bye ",
        ),
        (
            "deepseek-v3",
            "Be brief.<\uff5cUser\uff5c>Hi<\uff5cAssistant\uff5c>Hello!"
            "<\uff5cend\u2581of\u2581sentence\uff5c><\uff5cUser\uff5c>Bye",
        ),
    ],
)
def test_a_conversation_is_rendered_in_the_family_s_format(name, text):
    assert get_chat_template(name).get_prompt(TURNS) == text


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda template: template.name)
def test_every_template_knows_the_three_roles_and_renders_piece_by_piece(template):
    pieces = []
    for i, turn in enumerate(TURNS):
        prefix, suffix = template.get_prefix_and_suffix(turn["role"], TURNS[:i])
        pieces.append(prefix + turn["content"] + suffix)
    assert "".join(pieces) == template.get_prompt(TURNS)
    assert all(template.stop_str)


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "chatml"),
        ("/models/Qwen2-7B-Instruct", "qwen"),
        ("Qwen/Qwen2.5-0.5B-Instruct", "qwen-2.5"),
        ("Qwen/Qwen3-8B", "chatml"),
        ("meta-llama/Llama-2-7b-chat-hf", "llama-2-chat"),
        ("meta-llama/Meta-Llama-3-8B-Instruct", "llama-3-instruct"),
        ("/models/Llama-3.1-8B-Instruct", "llama-3-instruct"),
        ("meta-llama/Llama-3.1-8B", "default"),
        ("meta-llama/Llama-4-Scout-17B-16E-Instruct", "llama-4"),
        ("mistralai/Mistral-7B-Instruct-v0.3", "mistral"),
        ("mistralai/Mixtral-8x7B-Instruct-v0.1", "mistral"),
        ("mistralai/Mistral-Small-3.1-24B-Instruct-2503", "mistral-v7"),
        ("google/gemma-2-9b-it", "gemma-it"),
        ("google/gemma-2-9b", "default"),
        ("microsoft/Phi-3-mini-4k-instruct", "phi-3"),
        ("microsoft/phi-4", "phi-4"),
        ("microsoft/Phi-4-mini-instruct", "phi-4-mini"),
        ("deepseek-ai/DeepSeek-V3", "deepseek-v3"),
        ("deepseek-ai/DeepSeek-R1-Distill-Qwen-7B", "deepseek-v3"),
        ("deepseek-ai/DeepSeek-V2-Lite-Chat", "deepseek-chat"),
        ("deepseek-ai/deepseek-coder-6.7b-instruct", "deepseek-coder"),
        ("lmsys/vicuna-7b-v1.5", "vicuna_v1.1"),
        ("TinyLlama/TinyLlama-1.1B-Chat-v1.0", "zephyr"),
        ("CohereForAI/c4ai-command-r-v01", "c4ai-command-r"),
        ("ibm-granite/granite-3.1-8b-instruct", "granite-3-instruct"),
        ("openai/gpt-oss-20b", "gpt-oss"),
        ("/models/something-else", "default"),
    ],
)
def test_the_template_follows_from_the_model_s_path(path, name):
    assert get_chat_template_by_model_path(path).name == name


def test_every_family_leads_to_a_template_that_exists():
    assert {name for _, name in FAMILIES} <= {template.name for template in TEMPLATES}


def test_a_template_of_one_s_own_can_be_registered(monkeypatch):
    from sglang.lang import chat_template

    monkeypatch.setattr(chat_template, "_BY_NAME", dict(chat_template._BY_NAME))
    monkeypatch.setattr(chat_template, "_MATCHERS", list(chat_template._MATCHERS))
    mine = ChatTemplate("mine", None, {"user": ("U ", "\n"), "assistant": ("A ", "\n")})
    register_chat_template(mine)
    register_chat_template_matching_function(lambda path: "mine" if "qwen" in path else None)
    assert get_chat_template_by_model_path("my-qwen2-chat") is mine
    with pytest.raises(ValueError, match="no role 'system', only user, assistant"):
        mine.get_prompt(TURNS)


def test_an_unknown_template_lists_those_that_exist():
    with pytest.raises(ValueError, match=r"no chat template named 'alpaca'.*chatml"):
        get_chat_template("alpaca")


THOUGHTS = [
    ("deepseek-r1", "I think.\n</think>\n\nFour.", "I think.", "Four."),
    ("deepseek-r1", "<think>\nI think.</think>Four.", "I think.", "Four."),
    ("deepseek-r1", "I never stop", "I never stop", ""),
    ("qwen3", "<think>\nA < b </thin\n</think>\n\nFour.", "A < b </thin", "Four."),
    ("qwen3", " Four <think>", "", " Four <think>"),
    ("qwen3", "<thi", "", "<thi"),
    ("kimi", "\u25c1think\u25b7x\u25c1/think\u25b7y", "x", "y"),
]


@pytest.mark.parametrize(("model_type", "text", "reasoning", "answer"), THOUGHTS)
def test_thoughts_are_split_off_however_the_text_is_cut(model_type, text, reasoning, answer):
    for size in range(1, len(text) + 1):
        splitter = ReasoningSplitter(reasoning_format(model_type))
        shown = [("", "")]
        for start in range(0, len(text), size):
            splitter.feed(text[start : start + size])
            shown.append((splitter.reasoning, splitter.answer))
        splitter.finish()
        shown.append((splitter.reasoning, splitter.answer))
        assert shown[-1] == (reasoning, answer), size
        for before, after in itertools.pairwise(shown):
            assert after[0].startswith(before[0]) and after[1].startswith(before[1]), size


@sgl.function
def think(s):
    s += sgl.user("2+2?")
    s += sgl.assistant(sgl.separate_reasoning(sgl.gen("answer"), model_type="qwen3"))


@pytest.mark.parametrize("stream", [False, True])
def test_separate_reasoning_keeps_thoughts_out_of_the_text(chatml, say, stream):
    pieces = ["<think>", "easy", "</think>\n", "Fo", "ur."]
    chatml.script = lambda body: (
        say.stream(*pieces, id="r") if stream else say.answer("".join(pieces), id="r")
    )
    state = think.run(stream=stream)
    assert "".join(state.text_iter("answer")) == "Four."
    assert state["answer"] == "Four." and state["answer_reasoning_content"] == "easy"
    assert state.messages()[-1] == {"role": "assistant", "content": "Four."}
    assert "easy" not in state.text() and state.get_meta_info("answer")["id"] == "r"


def test_thoughts_can_be_streamed_apart_from_the_answer(chatml, say):
    chatml.script = lambda body: say.stream("<think>", "ea", "sy", "</think>", "4")
    state = think.run(stream=True)
    assert "".join(state.text_iter("answer_reasoning_content")) == "easy"


@pytest.mark.parametrize(
    ("arguments", "error", "problem"),
    [
        ((sgl.gen("x"), None), ValueError, "model_type"),
        ((None, "qwen3"), ValueError, "an expression"),
        ((sgl.gen(), "qwen3"), ValueError, "a gen with a name"),
        ((sgl.gen("x"), "gpt-oss"), NotImplementedError, "no reasoning format 'gpt-oss'"),
    ],
)
def test_reasoning_that_cannot_be_separated_is_refused(arguments, error, problem):
    with pytest.raises(error, match=problem):
        sgl.separate_reasoning(*arguments)
