"""Our decoders against transformers' implementation of the same random checkpoints."""

from __future__ import annotations

import itertools
import threading
from typing import Any

import pytest
import torch
import transformers

from sglang.srt.errors import ConfigError
from sglang.srt.layers.rope import build_rotation
from sglang.srt.model_config import ModelConfig, resolve_model_source
from sglang.srt.model_loader import load_model
from sglang.srt.models import build_model

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0}

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-biased": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-one-kv-head": ("llama", {"num_key_value_heads": 1}),
    "llama3-rope": ("llama", {"rope_parameters": LLAMA3_ROPE}),
    "mistral": ("mistral", {}),
    "qwen2": ("qwen2", {}),
    "qwen2-tied-multi-head": ("qwen2", {"tie_word_embeddings": True, "num_key_value_heads": 6}),
    "qwen2-yarn": ("qwen2", {"rope_parameters": YARN_ROPE}),
    "qwen3": ("qwen3", {}),
    "qwen3-tied-biased": ("qwen3", {"tie_word_embeddings": True, "attention_bias": True}),
}


def load(folder, dtype="auto"):
    source = resolve_model_source(str(folder))
    return load_model(source, ModelConfig.load(source, dtype=dtype), "cpu")


def load_reference(folder, dtype=torch.float32):
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager"
    ).eval()


@torch.inference_mode()
def reference_logits(reference, ids: list[int]) -> torch.Tensor:
    return reference(torch.tensor([ids])).logits[0].float()


def random_ids(count: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 133, (count,), generator=generator).tolist()


@pytest.mark.parametrize("variant", VARIANTS)
def test_prefill_and_decode_agree_with_transformers(variant, tiny_model_dir, paged_runner):
    kind, overrides = VARIANTS[variant]
    folder = tiny_model_dir(kind, **overrides)
    reference = load_reference(folder)
    runner = paged_runner(load(folder))
    sequences = {row: random_ids(90, seed=row) for row in range(4)}
    expected = {row: reference_logits(reference, ids) for row, ids in sequences.items()}
    assert expected[0].abs().max() > 0.5, "the reference must not be trivially small"

    # Prefill of mixed lengths; then a prefix is cached for some; then decode, alone and mixed.
    for counts in (
        {0: 1, 1: 19, 2: 40},
        {3: 33, 1: 28, 0: 1},
        {0: 1, 1: 1, 2: 1, 3: 1},
        {2: 1},
        {3: 17, 0: 1},
        {0: 1, 3: 1},
    ):
        start = dict(enumerate(runner.lens))
        logits = runner.step(
            {row: sequences[row][start[row] : start[row] + n] for row, n in counts.items()}
        )
        for row, count in counts.items():
            assert logits[row].dtype == torch.float32
            wanted = expected[row][start[row] : start[row] + count]
            torch.testing.assert_close(logits[row], wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_every_slicing_gives_identical_logits(kind, tiny_model_dir, paged_runner):
    model = load(tiny_model_dir(kind))
    ids = {0: random_ids(23), 2: random_ids(9, seed=1)}
    more = {0: [7], 2: [8]}
    whole = paged_runner(model)
    expected = [whole.step(ids), whole.step(more)]
    cuts = [subset for size in (1, 2) for subset in itertools.combinations(range(1, 3), size)]
    assert len(cuts) == 3
    for boundaries in cuts:
        sliced = paged_runner(model)
        for step, wanted in zip((ids, more), expected, strict=True):
            got = sliced.step(step, boundaries)
            for row in step:
                assert torch.equal(got[row], wanted[row]), (boundaries, row)


def test_logits_of_chosen_tokens_only(tiny_model_dir, paged_runner):
    model = load(tiny_model_dir("llama"))
    state = model.embed(torch.tensor(random_ids(6)))
    everything = model.logits(state, torch.arange(6))
    assert everything.shape == (6, 133)
    assert torch.equal(model.logits(state, None), everything)
    buffer = torch.empty(6, 133)
    assert model.logits(state, None, out=buffer) is buffer
    assert torch.equal(buffer, everything)
    torch.testing.assert_close(model.logits(state, torch.tensor([4, 1])), everything[[4, 1]])


def test_bfloat16_is_as_close_to_float32_as_transformers_is(tiny_model_dir, paged_runner):
    folder = tiny_model_dir("llama")
    ids = random_ids(40)
    exact = reference_logits(load_reference(folder), ids)
    theirs = reference_logits(load_reference(folder, torch.bfloat16), ids)
    ours = paged_runner(load(folder, "bfloat16")).step({0: ids})[0]
    error, their_error = (ours - exact).abs().mean(), (theirs - exact).abs().mean()
    assert error < 1.5 * their_error, (error, their_error)


@pytest.mark.timeout(60)
def test_two_threads_may_use_one_model(tiny_model_dir, paged_runner):
    model = load(tiny_model_dir("qwen3"))
    prompts = {0: random_ids(31), 1: random_ids(57, seed=9)}
    expected = {row: paged_runner(model).step({row: ids})[row] for row, ids in prompts.items()}
    start, wrong = threading.Barrier(2, timeout=20), []

    def work(row: int) -> None:
        start.wait()
        results = [paged_runner(model).step({row: prompts[row]})[row] for _ in range(15)]
        wrong.extend(row for logits in results if not torch.equal(logits, expected[row]))

    threads = [threading.Thread(target=work, args=(row,)) for row in prompts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=40)
        assert not thread.is_alive()
    assert wrong == []


@pytest.mark.parametrize("rope", [None, LLAMA3_ROPE, YARN_ROPE, LINEAR_ROPE])
def test_rotation_table_is_transformers(rope, tiny_model_dir):
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    overrides = {} if rope is None else {"rope_parameters": rope}
    config = ModelConfig.load(resolve_model_source(str(tiny_model_dir("llama", **overrides))))
    table = build_rotation(config, torch.device("cpu"))
    assert table.cos.shape == table.sin.shape == (512, 5)
    assert table.cos.dtype == torch.float32
    reference = LlamaRotaryEmbedding(config.hf_config)
    cos, sin = reference(torch.zeros(1), torch.arange(512)[None])
    torch.testing.assert_close(table.cos, cos[0, :, :5], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(table.sin, sin[0, :, :5], rtol=1e-5, atol=1e-5)


def test_unsupported_architecture_lists_the_supported(tiny_model_dir):
    source = resolve_model_source(str(tiny_model_dir("llama")))
    with pytest.raises(ConfigError, match=r"GPT5.*LlamaForCausalLM.*Qwen3ForCausalLM"):
        ModelConfig.load(source, override_args={"architectures": ["GPT5"]})


def test_build_model_allocates_every_matrix(tiny_model_dir):
    folder = tiny_model_dir("qwen2")
    config = ModelConfig.load(resolve_model_source(str(folder)))
    named = build_model(config, "cpu").named_parameters()
    theirs = dict(load_reference(folder).named_parameters())
    assert {name: t.shape for name, t in named.items()} == {n: t.shape for n, t in theirs.items()}
    matrices = sum(tensor.numel() for tensor in theirs.values() if tensor.dim() == 2)
    assert config.num_parameters == matrices
