"""Weights reach the right place from every format, and misfits are named."""

from __future__ import annotations

import json
import shutil

import gguf
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from sglang.srt.errors import ConfigError
from sglang.srt.layers.rope import build_rotation
from sglang.srt.model_config import ModelConfig, resolve_model_source
from sglang.srt.model_loader import load_model


def load(path, load_format="auto", **arguments):
    source = resolve_model_source(str(path), load_format=load_format)
    return load_model(source, ModelConfig.load(source), "cpu", **arguments)


def parameters(model):
    return {name: tensor.clone() for name, tensor in model.named_parameters().items()}


def assert_same(got, expected):
    assert got.keys() == expected.keys()
    for name, tensor in got.items():
        assert torch.equal(tensor, expected[name]), name


@pytest.fixture
def copy_of(tmp_path):
    """Copies a checkpoint folder and edits its single weight file with a function."""

    def copy(folder, edit):
        target = tmp_path / "model"
        shutil.copytree(folder, target)
        weights = load_file(target / "model.safetensors")
        edit(weights)
        save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
        return target

    return copy


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_safetensors_single_and_sharded(kind, tiny_model_dir):
    single = tiny_model_dir(kind)
    sharded = tiny_model_dir(kind, max_shard_size="30KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    assert_same(parameters(load(single)), load_file(single / "model.safetensors"))
    assert_same(parameters(load(sharded)), load_file(single / "model.safetensors"))


def test_weights_are_converted_to_the_models_dtype(tiny_model_dir, copy_of):
    folder = tiny_model_dir("llama")
    halved = copy_of(
        folder, lambda weights: weights.update({n: t.bfloat16() for n, t in weights.items()})
    )
    got, exact = parameters(load(halved)), load_file(folder / "model.safetensors")
    assert_same(got, {name: tensor.bfloat16().float() for name, tensor in exact.items()})


def test_tied_embeddings_serve_as_head_and_a_stored_copy_is_ignored(tiny_model_dir, copy_of):
    folder = tiny_model_dir("llama", tie_word_embeddings=True)

    def add_old_leftovers(weights):
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
        weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(5)

    assert_same(parameters(load(copy_of(folder, add_old_leftovers))), parameters(load(folder)))


def test_misfits_are_all_named(tiny_model_dir, copy_of):
    def damage(weights):
        del weights["model.layers.1.self_attn.k_proj.weight"]
        weights["model.layers.0.self_attn.q_proj.lora_A"] = torch.ones(3)
        weights["model.norm.weight"] = torch.ones(47)

    with pytest.raises(ConfigError) as error:
        load(copy_of(tiny_model_dir("llama"), damage))
    text = str(error.value)
    assert "missing: model.layers.1.self_attn.k_proj.weight;" in text
    assert "unexpected: model.layers.0.self_attn.q_proj.lora_A;" in text
    assert "wrong shape: model.norm.weight [47] instead of [48]" in text


def test_a_long_list_of_misfits_is_cut(tiny_model_dir, copy_of):
    with pytest.raises(ConfigError, match=r"missing: .*model\.layers\.\S+ and \d+ more"):
        load(copy_of(tiny_model_dir("llama"), lambda weights: weights.clear()))


def test_an_untied_model_needs_its_head(tiny_model_dir, copy_of):
    with pytest.raises(ConfigError, match=r"missing: lm_head\.weight"):
        load(copy_of(tiny_model_dir("llama"), lambda weights: weights.pop("lm_head.weight")))


def test_index_that_names_an_absent_file(tiny_model_dir, tmp_path):
    target = tmp_path / "model"
    shutil.copytree(tiny_model_dir("llama", max_shard_size="30KB"), target)
    victim = sorted(target.glob("*.safetensors"))[1]
    victim.unlink()
    with pytest.raises(ConfigError, match=f"lacks weight files .*{victim.name}"):
        load(target)


def test_broken_files(tiny_model_dir, tmp_path):
    target = tmp_path / "model"
    shutil.copytree(tiny_model_dir("llama"), target)
    (target / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(ConfigError, match=r"model\.safetensors cannot be read"):
        load(target)
    (target / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ConfigError, match="not a valid index"):
        load(target)


def test_consolidated_copies_are_left_alone(tiny_model_dir, tmp_path):
    target = tmp_path / "model"
    shutil.copytree(tiny_model_dir("mistral"), target)
    (target / "model.safetensors").rename(target / "weights-1.safetensors")
    save_file({"tok_embeddings.weight": torch.ones(2)}, target / "consolidated.safetensors")
    assert_same(parameters(load(target)), parameters(load(tiny_model_dir("mistral"))))


def test_dummy_weights_need_only_a_config_and_follow_the_seed(tiny_model_dir, tmp_path):
    shutil.copy(tiny_model_dir("qwen2") / "config.json", tmp_path)
    first = parameters(load(tmp_path, "dummy", seed=3))
    assert_same(parameters(load(tmp_path, "dummy", seed=3)), first)
    other = parameters(load(tmp_path, "dummy", seed=4))
    for name, tensor in first.items():
        if "norm" in name:
            assert torch.equal(tensor, torch.ones_like(tensor)), name
        else:
            assert not torch.equal(tensor, other[name]), name
            assert 0.01 < tensor.std() < 0.04, name


GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name):
    stem, kind = name.rsplit(".", 1)
    if stem.startswith("model.layers."):
        index, stem = stem.removeprefix("model.layers.").split(".", 1)
        return f"blk.{index}.{GGUF_NAMES[stem]}.{kind}"
    return f"{GGUF_NAMES[stem]}.{kind}"


def interleave(tensor, num_heads):
    """What llama.cpp's converter does to the q and k rows of the llama architecture."""
    halves = tensor.reshape(num_heads, 2, -1, *tensor.shape[1:])
    return halves.transpose(1, 2).reshape(tensor.shape)


def write_gguf(path, folder, *, architecture=None, extra=None, rope_factors=None, dtype=np.float32):
    """Converts a tiny checkpoint as llama.cpp would."""
    config = ModelConfig.load(resolve_model_source(str(folder)))
    name = architecture or config.hf_config.model_type.replace("mistral", "llama")
    writer = gguf.GGUFWriter(path, name)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_layers)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_context_length(config.context_length)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.hf_config.rope_parameters["rope_theta"])
    writer.add_eos_token_id(5)
    writer.add_eot_token_id(6)
    writer.add_token_list(["<unk>", "a", "bc"])
    writer.add_token_types([2, 1, 1])
    if extra is not None:
        extra(writer)
    if rope_factors is not None:
        writer.add_tensor("rope_freqs.weight", np.array(rope_factors, dtype=np.float32))
    heads = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads}
    for parameter, tensor in load_file(folder / "model.safetensors").items():
        projection = parameter.split(".")[-2]
        if name == "llama" and projection in heads:
            tensor = interleave(tensor, heads[projection])
        writer.add_tensor(
            gguf_name(parameter), tensor.numpy().astype(dtype if tensor.dim() == 2 else np.float32)
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    ("kind", "overrides"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
        ("mistral", {}),
        ("qwen2", {}),
        ("qwen3", {"tie_word_embeddings": True}),
    ],
)
def test_gguf_equals_the_checkpoint_it_came_from(kind, overrides, tiny_model_dir, tmp_path):
    folder = tiny_model_dir(kind, **overrides)
    original = load(folder)
    model = load(write_gguf(tmp_path / "m.gguf", folder))
    assert_same(parameters(model), parameters(original))
    assert model.config.eos_token_ids == {5, 6}
    for name in (
        "head_dim",
        "num_kv_heads",
        "context_length",
        "tie_word_embeddings",
        "attention_bias",
        "attention_output_bias",
        "mlp_bias",
        "qk_norm",
        "vocab_size",
    ):
        assert getattr(model.config, name) == getattr(original.config, name), name
    assert model.config.rms_norm_eps == pytest.approx(original.config.rms_norm_eps)


def test_gguf_half_precision(tiny_model_dir, tmp_path):
    folder = tiny_model_dir("qwen2")
    got = parameters(load(write_gguf(tmp_path / "m.gguf", folder, dtype=np.float16)))
    for name, tensor in load_file(folder / "model.safetensors").items():
        expected = tensor.half().float() if tensor.dim() == 2 else tensor
        assert torch.equal(got[name], expected), name


def test_gguf_rope_scaling(tiny_model_dir, tmp_path):
    def add_yarn(writer):
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(4.0)
        writer.add_rope_scaling_orig_ctx_len(128)

    rope = {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 128,
    }
    folder = tiny_model_dir("qwen2", rope_parameters=rope)
    expected = build_rotation(load(folder).config, torch.device("cpu"))
    config = load(write_gguf(tmp_path / "m.gguf", folder, extra=add_yarn)).config
    assert torch.equal(build_rotation(config, torch.device("cpu")).cos, expected.cos)


def test_gguf_rope_factors_of_llama3(tiny_model_dir, tmp_path):
    factors = [1.0, 1.0, 1.5, 8.0, 8.0]
    model = load(write_gguf(tmp_path / "m.gguf", tiny_model_dir("llama"), rope_factors=factors))
    frequencies = 10000.0 ** -(torch.arange(0, 10, 2) / 10) / torch.tensor(factors)
    angles = torch.outer(torch.arange(512.0), frequencies)
    table = build_rotation(model.config, torch.device("cpu"))
    torch.testing.assert_close(table.cos, angles.cos(), rtol=1e-5, atol=1e-5)


def test_gguf_errors(tiny_model_dir, tmp_path):
    folder = tiny_model_dir("qwen2")
    with pytest.raises(ConfigError, match=r"GGUF architecture 'mamba'.*llama, qwen2, qwen3"):
        load(write_gguf(tmp_path / "mamba.gguf", folder, architecture="mamba"))
    split = write_gguf(
        tmp_path / "split.gguf", folder, extra=lambda writer: writer.add_uint16("split.count", 3)
    )
    with pytest.raises(ConfigError, match="one part of a split GGUF"):
        load(split)
    partial = write_gguf(
        tmp_path / "partial.gguf", folder, extra=lambda writer: writer.add_rope_dimension_count(4)
    )
    with pytest.raises(ConfigError, match="rotates 4 of 8 dimensions"):
        load(partial)
    (tmp_path / "broken.gguf").write_bytes(b"GG" * 100)
    with pytest.raises(ConfigError, match="cannot be read as a GGUF file"):
        load(tmp_path / "broken.gguf")
    whole = split.read_bytes()
    for kept_bytes in (0, 3, 20, 200, 700):
        (tmp_path / "broken.gguf").write_bytes(whole[:kept_bytes])
        with pytest.raises(ConfigError, match="cannot be read as a GGUF file"):
            load(tmp_path / "broken.gguf")
    good = write_gguf(tmp_path / "good.gguf", folder).read_bytes()
    (tmp_path / "broken.gguf").write_bytes(good[:-200])
    with pytest.raises(ConfigError, match="cannot be read as a GGUF file"):
        load(tmp_path / "broken.gguf")


def test_gguf_dummy_weights(tiny_model_dir, tmp_path):
    path = write_gguf(tmp_path / "m.gguf", tiny_model_dir("qwen3"))
    norm = parameters(load(path, "dummy"))["model.norm.weight"]
    assert torch.equal(norm, torch.ones(48))


def test_a_config_that_is_wider_than_the_weights(tiny_model_dir, tmp_path):
    target = tmp_path / "model"
    shutil.copytree(tiny_model_dir("llama"), target)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, "vocab_size": 140}))
    with pytest.raises(ConfigError, match=r"embed_tokens\.weight \[133, 48\] instead of \[140, 48"):
        load(target)


@pytest.mark.timeout(240)
def test_smollm2_agrees_with_transformers(smollm2_path, paged_runner):
    tokens = [1, 520, 9531, 198, 1780, 314, 260, 3575, 282, 4649, 47, 2, 198, 1, 520, 9531, 198]
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        smollm2_path.parent, gguf_file=smollm2_path.name, dtype=torch.float32
    ).eval()
    with torch.inference_mode():
        expected = reference(torch.tensor([tokens])).logits[0]
    del reference

    model = load(smollm2_path)
    assert model.config.eos_token_ids == {2}
    assert model.config.context_length == 8192
    runner = paged_runner(model, num_rows=1)
    prefill = runner.step({0: tokens[:-2]}, boundaries=(1, 17))[0]
    decoded = [runner.step({0: [token]})[0] for token in tokens[-2:]]
    logits = torch.cat([prefill, *decoded])
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)
