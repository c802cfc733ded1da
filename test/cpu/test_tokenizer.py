"""Tokenizers from folders and GGUF files, templates, and errors that name a way out."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sglang.srt.converted_tokenizers import keep, kept_at
from sglang.srt.errors import ConfigError
from sglang.srt.model_source import resolve_model_source
from sglang.srt.tokenizer import load_tokenizer


@pytest.fixture
def tokenizer_dir(tmp_path):
    """A folder with a tokenizer of three words."""
    core = Tokenizer(models.WordLevel({"<unk>": 0, "hello": 1, "world": 2}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    folder = tmp_path / "tokenizer"
    PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", chat_template="{{ messages[0].content }}"
    ).save_pretrained(folder)
    return folder


def render(tokenizer, text):
    messages = [{"role": "user", "content": text}]
    return tokenizer.apply_chat_template(messages, tokenize=False)


@pytest.mark.parametrize("mode", ["auto", "slow"])
def test_from_a_folder(mode, tokenizer_dir):
    tokenizer = load_tokenizer(tokenizer_dir, tokenizer_mode=mode)
    assert tokenizer.encode("world hello moon") == [2, 1, 0]
    assert render(tokenizer, "hello") == "hello"


def test_another_path_takes_the_place_of_the_models(tokenizer_dir, tiny_model_dir):
    source = resolve_model_source(str(tiny_model_dir("llama")))
    tokenizer = load_tokenizer(source, tokenizer_path=str(tokenizer_dir))
    assert tokenizer.encode("hello") == [1]


def test_a_template_file_takes_the_place_of_the_tokenizers(tokenizer_dir, tmp_path):
    template = tmp_path / "chat.jinja"
    template.write_text("[{{ messages[0].content }}]")
    tokenizer = load_tokenizer(tokenizer_dir, chat_template=str(template))
    assert render(tokenizer, "hello") == "[hello]"


def test_absent_template_names_the_flag(tokenizer_dir, tmp_path):
    with pytest.raises(ConfigError, match=r"--chat-template .*chatml must be the path"):
        load_tokenizer(tokenizer_dir, chat_template=str(tmp_path / "chatml"))


def test_no_tokenizer_names_the_ways_out(tiny_model_dir):
    source = resolve_model_source(str(tiny_model_dir("llama")))
    with pytest.raises(ConfigError, match=r"--tokenizer-path.*--skip-tokenizer-init"):
        load_tokenizer(source)


def test_a_broken_tokenizer_names_the_ways_out(tokenizer_dir):
    (tokenizer_dir / "tokenizer.json").write_text("{")
    with pytest.raises(ConfigError, match=r"--tokenizer-path.*--skip-tokenizer-init"):
        load_tokenizer(tokenizer_dir)


def test_a_hub_id_while_offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match=r"someone/none .*--tokenizer-path"):
        load_tokenizer("someone/none")


def test_other_wrong_arguments(tokenizer_dir):
    with pytest.raises(ConfigError, match="--tokenizer-mode 'mistral'"):
        load_tokenizer(tokenizer_dir, tokenizer_mode="mistral")
    with pytest.raises(ConfigError, match=r"expected a folder or a \.gguf file"):
        load_tokenizer(tokenizer_dir / "tokenizer.json")


@pytest.mark.timeout(120)
def test_from_a_gguf_file(smollm2_path, tmp_path, monkeypatch):
    """The second time it is read from where the first time has kept it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source = resolve_model_source(str(smollm2_path))
    converted = load_tokenizer(source)
    with monkeypatch.context() as patch:
        patch.setattr("gguf.GGUFReader", None)
        read_again = load_tokenizer(source)
    text = "Grüße, 世界! 12 + 30 = 42 <|im_end|>\n"
    for tokenizer in converted, read_again:
        ids = tokenizer.encode(text)
        assert ids == converted.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.eos_token_id == 2
        assert tokenizer.all_special_tokens == converted.all_special_tokens
        assert "<|im_start|>user\nhi<|im_end|>" in render(tokenizer, "hi")
        assert render(tokenizer, "hi") == render(converted, "hi")
    assert read_again.get_vocab() == converted.get_vocab()
    assert type(read_again) is type(converted)


def test_a_changed_file_is_converted_anew(tmp_path):
    file = tmp_path / "a.gguf"
    file.write_bytes(b"GGUF")
    place = kept_at(file)
    assert kept_at(file) == place
    file.write_bytes(b"GGUF more")
    assert kept_at(file) != place


def test_a_damaged_one_is_converted_anew(smollm2_path, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source = resolve_model_source(str(smollm2_path))
    ids = load_tokenizer(source).encode("Good morning")
    vocabulary = kept_at(smollm2_path) / "tokenizer.json"
    whole = vocabulary.read_bytes()
    vocabulary.write_bytes(whole[:1000])
    assert load_tokenizer(source).encode("Good morning") == ids
    assert f"left aside, {vocabulary.parent}" in caplog.text
    assert vocabulary.read_bytes() == whole


def test_a_tokenizer_is_kept_once_and_where_it_cannot_be_is_no_error(tokenizer_dir, tmp_path):
    tokenizer = load_tokenizer(tokenizer_dir)
    place = tmp_path / "cache" / "place"
    keep(tokenizer, place)
    keep(tokenizer, place)
    assert list(place.parent.iterdir()) == [place]
    assert load_tokenizer(place).encode("hello") == [1]
    (tmp_path / "file").touch()
    keep(tokenizer, tmp_path / "file" / "place")
