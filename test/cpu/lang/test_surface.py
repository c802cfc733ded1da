"""The public names: those of SGLang's language, with its signatures, and light to import."""

from __future__ import annotations

import inspect
import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import sglang as sgl
import sglang.lang

SAMPLING = [
    "name",
    "max_tokens",
    "n",
    "stop",
    "stop_token_ids",
    "stop_regex",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "frequency_penalty",
    "presence_penalty",
    "ignore_eos",
    "return_logprob",
    "logprob_start_len",
    "top_logprobs_num",
    "return_text_in_logprobs",
]
GEN = [*SAMPLING[:2], "min_tokens", *SAMPLING[2:]]
GEN += ["dtype", "choices", "choices_method", "regex", "json_schema"]
SIGNATURES = {
    "assistant": {"expr": None},
    "assistant_begin": {},
    "assistant_end": {},
    "flush_cache": {"backend": None},
    "function": {"func": None, "num_api_spec_tokens": None},
    "gen": dict.fromkeys(GEN),
    "gen_int": dict.fromkeys(SAMPLING),
    "gen_string": dict.fromkeys(SAMPLING),
    "get_server_info": {"backend": None},
    "image": {"expr": inspect.Parameter.empty},
    "select": {
        "name": None,
        "choices": None,
        "temperature": 0.0,
        "choices_method": sgl.token_length_normalized,
    },
    "separate_reasoning": {"expr": None, "model_type": None},
    "set_default_backend": {"backend": inspect.Parameter.empty},
    "system": {"expr": None},
    "system_begin": {},
    "system_end": {},
    "user": {"expr": None},
    "user_begin": {},
    "user_end": {},
    "video": {"path": inspect.Parameter.empty, "num_frames": inspect.Parameter.empty},
}
STATE_METHODS = [
    "_role_common",
    "assistant",
    "copy",
    "error",
    "fork",
    "get_meta_info",
    "get_var",
    "messages",
    "set_var",
    "sync",
    "system",
    "text",
    "text_async_iter",
    "text_iter",
    "user",
    "var_scope",
]
OTHERS = [
    "Anthropic",
    "Crusoe",
    "LiteLLM",
    "OpenAI",
    "Runtime",
    "RuntimeEndpoint",
    "ServerArgs",
    "VertexAI",
    "__version__",
    "global_config",
    "greedy_token_selection",
    "token_length_normalized",
    "unconditional_likelihood_normalized",
]


@pytest.mark.parametrize("name", SIGNATURES)
def test_functions_take_what_sglang_s_take_in_the_same_order(name):
    parameters = inspect.signature(getattr(sgl, name)).parameters
    assert {key: value.default for key, value in parameters.items()} == SIGNATURES[name]
    assert list(parameters) == list(SIGNATURES[name])


def test_a_state_has_sglang_s_methods():
    from sglang.lang.interpreter import ProgramState

    assert [name for name in STATE_METHODS if not callable(getattr(ProgramState, name, None))] == []


@pytest.mark.parametrize("name", [*SIGNATURES, *OTHERS])
def test_every_name_is_there_and_listed(name):
    assert getattr(sgl, name) is not None
    assert name in dir(sgl)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'generate'"):
        _ = sgl.generate


def test_global_config_is_the_settings_and_not_their_module():
    from sglang.global_config import global_config

    assert sgl.global_config is global_config


@pytest.mark.parametrize(
    "use",
    [lambda: sgl.image("x"), lambda: sgl.video("x", 3), sgl.VertexAI, sgl.Crusoe],
)
def test_what_is_not_served_says_so(use):
    with pytest.raises(NotImplementedError, match="not served"):
        use()


def test_the_language_imports_neither_torch_nor_the_runtime():
    modules = [
        module.name for module in pkgutil.walk_packages(sglang.lang.__path__, "sglang.lang.")
    ]
    assert "sglang.lang.backend.openai" in modules
    program = (
        f"import sglang as sgl, importlib, sys; [importlib.import_module(m) for m in {modules!r}]; "
        f"[getattr(sgl, n) for n in sgl.__all__ if n not in ('ServerArgs', 'Engine')]; "
        "heavy = ('torch', 'transformers', 'openai', 'anthropic', 'sglang.srt', 'numpy'); "
        "print([m for m in heavy if m in sys.modules])"
    )
    path = os.pathsep.join([str(Path(sgl.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert done.stdout.strip() == "[]"


def test_a_server_s_own_calls_go_to_its_endpoints(server):
    server.other |= {
        "/flush_cache": {},
        "/server_info": {"version": "1"},
        "/start_profile": {},
        "/stop_profile": b"Stopped",
    }
    assert sgl.flush_cache() is True
    assert sgl.get_server_info() == {"version": "1"}
    backend = sgl.global_config.default_backend
    backend.start_profile()
    backend.stop_profile()
    assert backend.get_model_name() == "/models/plain-model"
    assert server.calls == [
        ("POST", "/flush_cache"),
        ("GET", "/server_info"),
        ("GET", "/start_profile"),
        ("GET", "/stop_profile"),
    ]


def test_without_a_backend_there_is_nothing_to_flush_or_to_ask():
    assert sgl.flush_cache() is False and sgl.get_server_info() is None


def test_the_key_is_sent_with_every_call(server):
    backend = server.endpoint(api_key="secret")
    assert server.headers_seen[-1]["Authorization"] == "Bearer secret"
    backend.shutdown()
