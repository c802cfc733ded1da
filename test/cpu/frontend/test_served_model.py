"""What the front loads of a model, and the sockets' typed ends."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import zmq

from sglang.srt.errors import ConfigError
from sglang.srt.ipc import Receiver, Sender, ipc_directory
from sglang.srt.messages import AbortRequest, Shutdown, ToScheduler
from sglang.srt.served_model import generation_defaults, load_served_model
from sglang.srt.server_args import ServerArgs


def write(folder: Path, text: str) -> Path:
    (folder / "generation_config.json").write_text(text)
    return folder


def test_generation_defaults(tmp_path: Path) -> None:
    config = {
        "temperature": 0.6,
        "top_k": 0,
        "top_p": None,
        "repetition_penalty": 1.1,
        "eos_token_id": 2,
    }
    folder = write(tmp_path, json.dumps(config))
    expected = {"temperature": 0.6, "top_k": -1, "repetition_penalty": 1.1}
    assert generation_defaults(folder) == expected


def test_no_generation_config(tmp_path: Path) -> None:
    assert generation_defaults(tmp_path) == {}


def test_broken_generation_config(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="generation_config"):
        generation_defaults(write(tmp_path, "{"))


def test_load_without_tokenizer(smollm2_path: Path) -> None:
    args = ServerArgs(model_path=str(smollm2_path), skip_tokenizer_init=True, context_length=100)
    model = load_served_model(args)
    assert (model.vocab_size, model.context_length) == (49152, 100)
    assert model.model_type == "llama"
    assert model.tokenizer is None


def test_sockets_are_typed_and_leave_nothing() -> None:
    with ipc_directory() as ipc, zmq.Context() as context:
        folder = Path(ipc.scheduler.removeprefix("ipc://")).parent
        sender = Sender(context, ipc.scheduler)  # may come before its receiver
        receiver: Receiver[object] = Receiver(context, ipc.scheduler, ToScheduler)
        sent = [AbortRequest(rid="a"), Shutdown()]
        for message in sent:
            sender.send(message)
        got: list[object] = []
        while len(got) < 2:
            arrived = receiver.recv_all(timeout_ms=5000)
            assert arrived, "nothing arrived in 5 s"
            got += arrived
        assert got == sent
        assert receiver.recv_all(timeout_ms=0) == []
        sender.close()
        receiver.close()
        assert folder.stat().st_mode & 0o077 == 0
    assert not folder.exists()
