"""Finding a model's files and reading its config."""

from __future__ import annotations

import json
import logging
import shutil

import pytest
import torch

from sglang.srt.errors import ConfigError
from sglang.srt.model_config import ModelConfig, resolve_model_source


@pytest.fixture
def edited_model(tiny_model_dir, tmp_path):
    """A copy of a tiny checkpoint whose config.json has some keys replaced (None: removed)."""

    def edit(kind="llama", **changes):
        folder = tmp_path / kind
        shutil.copytree(tiny_model_dir(kind), folder)
        config = json.loads((folder / "config.json").read_text())
        config.update(changes)
        config = {key: value for key, value in config.items() if value is not None}
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return edit


def load(folder, **arguments):
    return ModelConfig.load(resolve_model_source(str(folder)), **arguments)


def test_reads_a_checkpoint(tiny_model_dir):
    config = load(tiny_model_dir("qwen3", tie_word_embeddings=True))
    assert config.architecture == "Qwen3ForCausalLM"
    assert (config.hidden_size, config.num_layers, config.intermediate_size) == (48, 3, 67)
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (6, 2, 14)
    assert (config.vocab_size, config.context_length) == (133, 512)
    assert config.tie_word_embeddings
    assert config.qk_norm
    assert not config.attention_bias
    assert config.sliding_window is None
    assert config.kv_bytes_per_token == 2 * 3 * 2 * 14 * 4


def test_biases_by_architecture(tiny_model_dir):
    def biases(kind, **overrides):
        config = load(tiny_model_dir(kind, **overrides))
        return config.attention_bias, config.attention_output_bias, config.mlp_bias

    assert biases("qwen2") == (True, False, False)
    assert biases("mistral") == (False, False, False)
    assert biases("llama", attention_bias=True, mlp_bias=True) == (True, True, True)
    assert biases("qwen3", attention_bias=True) == (True, True, False)


@pytest.mark.parametrize(
    ("asked", "device", "configured", "expected"),
    [
        ("auto", "cpu", "bfloat16", torch.float32),
        ("auto", "cuda", "bfloat16", torch.bfloat16),
        ("auto", "cuda", "float16", torch.float16),
        ("auto", "cuda", "float32", torch.float32),
        ("auto", "cuda", None, torch.bfloat16),
        ("half", "cpu", "bfloat16", torch.float16),
        ("float", "cuda", "bfloat16", torch.float32),
        ("bfloat16", "cpu", None, torch.bfloat16),
    ],
)
def test_dtype(asked, device, configured, expected, edited_model):
    assert load(edited_model(dtype=configured), dtype=asked, device=device).dtype == expected


def test_older_configs_spell_dtype_and_rope_differently(edited_model):
    folder = edited_model(
        dtype=None,
        torch_dtype="float16",
        rope_parameters=None,
        rope_theta=5000.0,
        rope_scaling={"type": "linear", "factor": 2.0},
    )
    config = load(folder, device="cuda")
    assert config.dtype == torch.float16
    assert config.hf_config.rope_parameters["rope_theta"] == 5000.0
    assert config.hf_config.rope_parameters["rope_type"] == "linear"


def test_unknown_dtype_names_the_flag(tiny_model_dir):
    with pytest.raises(ConfigError, match="--dtype 'int4'"):
        load(tiny_model_dir("llama"), dtype="int4")


def test_context_length(tiny_model_dir):
    folder = tiny_model_dir("llama")
    assert load(folder, context_length=100).context_length == 100
    assert load(folder, context_length=512).context_length == 512
    with pytest.raises(ConfigError, match=r"--context-length 513 exceeds 512"):
        load(folder, context_length=513)
    with pytest.raises(ConfigError, match=r"--context-length must be at least 1"):
        load(folder, context_length=0)


def test_yarn_extends_the_context(edited_model):
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
    assert load(edited_model(rope_parameters=rope)).context_length == 2048


def test_a_sliding_window_limits_the_context(edited_model, caplog):
    folder = edited_model("mistral", sliding_window=128)
    with caplog.at_level(logging.WARNING):
        config = load(folder)
    assert (config.context_length, config.sliding_window) == (128, 128)
    assert "128 tokens" in caplog.text
    assert load(folder, context_length=64).context_length == 64
    with pytest.raises(ConfigError, match=r"--context-length 129 exceeds 128.*sliding window"):
        load(folder, context_length=129)


def test_an_idle_sliding_window_does_not(edited_model):
    folder = edited_model("qwen2", sliding_window=128, use_sliding_window=False)
    assert (load(folder).context_length, load(folder).sliding_window) == (512, None)


def test_a_window_used_by_some_layers_does(edited_model):
    folder = edited_model(
        "qwen2", sliding_window=128, use_sliding_window=True, max_window_layers=2, layer_types=None
    )
    assert load(folder).context_length == 128


def test_eos_ids_come_from_both_files(edited_model):
    folder = edited_model(eos_token_id=[7, 8])
    (folder / "generation_config.json").write_text('{"eos_token_id": 9}')
    assert load(folder).eos_token_ids == {7, 8, 9}


def test_no_eos_id_at_all(edited_model):
    folder = edited_model()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": None}))
    (folder / "generation_config.json").unlink()
    assert load(folder).eos_token_ids == frozenset()


OLD_ROPE = {
    "rope_parameters": None,
    "rope_theta": 777.0,
    "rope_scaling": {"type": "linear", "factor": 8.0},
}
NEW_ROPE = {"rope_parameters": {"rope_type": "linear", "factor": 8.0, "rope_theta": 777.0}}
LINEAR_2 = {"rope_type": "linear", "factor": 2.0}


@pytest.mark.parametrize("spelling", [OLD_ROPE, NEW_ROPE], ids=["old", "new"])
@pytest.mark.parametrize(
    ("override", "rope_type", "factor", "theta"),
    [
        ({"vocab_size": 133}, "linear", 8.0, 777.0),
        ({"rope_scaling": LINEAR_2}, "linear", 2.0, 777.0),
        ({"rope_parameters": LINEAR_2}, "linear", 2.0, 777.0),
        ({"rope_parameters": {**LINEAR_2, "rope_theta": 9.0}}, "linear", 2.0, 9.0),
        ({"rope_scaling": LINEAR_2, "rope_theta": 5.0}, "linear", 2.0, 5.0),
        ({"rope_theta": 5.0}, "linear", 8.0, 5.0),
        ({"rope_scaling": None}, "default", None, 777.0),
    ],
)
def test_rope_overrides_in_either_spelling(
    spelling, override, rope_type, factor, theta, edited_model
):
    rope = load(edited_model(**spelling), override_args=override).hf_config.rope_parameters
    assert (rope["rope_type"], rope.get("factor"), rope["rope_theta"]) == (rope_type, factor, theta)


def test_overrides_replace_keys(tiny_model_dir):
    folder = tiny_model_dir("llama")
    assert load(folder, override_args={"max_position_embeddings": 256}).context_length == 256
    with pytest.raises(ConfigError, match="rope_scaling must be a JSON object"):
        load(folder, override_args={"rope_scaling": "linear"})


def test_own_config_code_runs_only_when_trusted(edited_model, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules")
    )
    folder = edited_model(model_type="own", auto_map={"AutoConfig": "own.OwnConfig"})
    (folder / "own.py").write_text(
        "from transformers import LlamaConfig\n"
        "class OwnConfig(LlamaConfig):\n"
        "    model_type = 'own'\n"
    )
    with pytest.raises(ConfigError, match="--trust-remote-code"):
        load(folder)
    config = load(folder, trust_remote_code=True)
    assert type(config.hf_config).__name__ == "OwnConfig"
    assert (config.architecture, config.hidden_size) == ("LlamaForCausalLM", 48)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope type 'dynamic'"),
        ({"quantization_config": {"quant_method": "awq"}}, r"quantised \(awq\)"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({"architectures": None}, "architectures"),
        ({"model_type": "no_such_type"}, "model_type 'no_such_type'"),
        ({"model_type": "own", "auto_map": {"AutoConfig": "c.C"}}, "--trust-remote-code"),
        ({"num_key_value_heads": 4}, "6 attention heads cannot share 4 KV heads"),
        ({"hidden_size": "wide"}, "config.json is not valid"),
    ],
)
def test_what_is_not_supported_is_refused(changes, message, edited_model):
    with pytest.raises(ConfigError, match=message):
        load(edited_model(**changes))


def test_partial_rotary_is_refused(edited_model):
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    with pytest.raises(ConfigError, match="partial rotary"):
        load(edited_model(rope_parameters=rope))


def test_broken_config_file(edited_model):
    folder = edited_model()
    (folder / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config\.json cannot be read"):
        load(folder)


def test_source_of_a_folder(tiny_model_dir, tmp_path):
    folder = tiny_model_dir("llama")
    source = resolve_model_source(str(folder))
    assert (source.folder, source.gguf_file, source.weight_format) == (folder, None, "safetensors")
    assert resolve_model_source(str(folder), load_format="dummy").weight_format == "dummy"
    with pytest.raises(ConfigError, match=r"holds no \.gguf file"):
        resolve_model_source(str(folder), load_format="gguf")


def test_source_of_a_gguf_file_and_its_folder(tmp_path):
    file = tmp_path / "a.gguf"
    file.touch()
    for path in (file, tmp_path):
        source = resolve_model_source(str(path))
        assert (source.folder, source.gguf_file) == (tmp_path, file)
        assert source.weight_format == "gguf"
    assert resolve_model_source(str(file), load_format="dummy").weight_format == "dummy"
    with pytest.raises(ConfigError, match="is a GGUF file, but --load-format says safetensors"):
        resolve_model_source(str(file), load_format="safetensors")
    (tmp_path / "b.gguf").touch()
    with pytest.raises(ConfigError, match=r"several GGUF files.*a\.gguf, b\.gguf"):
        resolve_model_source(str(tmp_path))


def test_sources_without_weights(tmp_path):
    with pytest.raises(ConfigError, match=r"neither config\.json nor a \.gguf"):
        resolve_model_source(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"no \.safetensors file; --load-format dummy"):
        resolve_model_source(str(tmp_path))
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(ConfigError, match="convert them to safetensors"):
        resolve_model_source(str(tmp_path))
    with pytest.raises(ConfigError, match=r"not a \.gguf file"):
        resolve_model_source(str(tmp_path / "config.json"))


def test_arguments_that_cannot_apply(tiny_model_dir):
    folder = str(tiny_model_dir("llama"))
    with pytest.raises(ConfigError, match="--revision"):
        resolve_model_source(folder, revision="main")
    with pytest.raises(ConfigError, match="--load-format 'pt'"):
        resolve_model_source(folder, load_format="pt")
    with pytest.raises(ConfigError, match="does not exist"):
        resolve_model_source("/no/such/folder")
    with pytest.raises(ConfigError, match="needs a local file"):
        resolve_model_source("someone/some-model", load_format="gguf")


def test_hub_id_while_offline(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match=r"someone/some-model at --revision v2 .*could not be"):
        resolve_model_source("someone/some-model", revision="v2", download_dir=str(tmp_path))


def test_hub_id_fetches_what_the_format_needs(tiny_model_dir, monkeypatch):
    calls = []

    def fake_snapshot_download(repo_id, **arguments):
        calls.append((repo_id, arguments))
        return str(tiny_model_dir("llama"))

    monkeypatch.setattr("huggingface_hub.snapshot_download", fake_snapshot_download)
    source = resolve_model_source("someone/m", revision="v2", download_dir="/d")
    assert (source.name, source.folder) == ("someone/m", tiny_model_dir("llama"))
    resolve_model_source("someone/m", load_format="dummy")
    (first_id, first), (_, dummy) = calls
    assert (first_id, first["revision"], first["cache_dir"]) == ("someone/m", "v2", "/d")
    assert "*.safetensors" in first["allow_patterns"]
    assert "*.safetensors" not in dummy["allow_patterns"]
