"""LiveModel: a model that serves, whose weights can be replaced and whose memory given back.

Weights are replaced where they lie, so that graphs, which keep addresses, stay as they are. Memory
that is given back comes back elsewhere: graphs are dropped with it and captured anew.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from sglang.srt.errors import ConfigError, SglangError
from sglang.srt.mem_cache.kv_pool import DeviceKVPool
from sglang.srt.model_config import ModelConfig
from sglang.srt.model_executor.model_runner import ModelRunner
from sglang.srt.model_loader import fill_model, read_weights
from sglang.srt.model_source import ModelSource, resolve_model_source
from sglang.srt.models.decoder import Decoder
from sglang.srt.models.decoder_weights import copy_weights
from sglang.srt.server_args import ServerArgs

logger = logging.getLogger(__name__)

KV_CACHE, WEIGHTS, GRAPHS = TAGS = ("kv_cache", "weights", "cuda_graph")


class LiveModelError(SglangError):
    """The model cannot be changed so; it is as it was."""


@dataclass(slots=True)
class _Storage:
    """Memory of one parameter or of several; kept: its content while it is released, if copied."""

    storage: torch.UntypedStorage
    nbytes: int
    kept: torch.UntypedStorage | None = None


class LiveModel:
    """To be used with nothing in flight, but for `rows` and `usage`.

    capture: hands graphs of the present addresses to the runner; None where there are none.
    """

    def __init__(
        self,
        args: ServerArgs,
        model: Decoder,
        source: ModelSource,
        runner: ModelRunner,
        kv_pool: DeviceKVPool,
        capture: Callable[[], None] | None,
    ) -> None:
        self._args = args
        self._model = model
        self._source = source
        self._runner = runner
        self._kv_pool = kv_pool
        self._capture = capture
        self._has_graphs = runner.graphs is not None
        self._released: set[str] = set()
        self._storages = _storages(model.named_parameters().values())

    @property
    def released(self) -> frozenset[str]:
        return frozenset(self._released)

    def update_weights(self, model_path: str, load_format: str, beat: Callable[[], None]) -> None:
        """Takes the weights of another checkpoint. Raises SglangError, the old weights in place.

        All of it is read and compared before anything is written.
        """
        self._require_weights()
        source = resolve_model_source(
            model_path, load_format=load_format, download_dir=self._args.download_dir
        )
        config = self._checked_config(source)
        if source.weight_format != "dummy":
            parameters = self._model.named_parameters()
            shapes = {name: torch.empty_like(p, device="meta") for name, p in parameters.items()}
            copy_weights(shapes, _beating(read_weights(source, config), beat))
        try:
            self._fill(source, beat)
        except Exception as error:
            logger.exception("the new weights could be read once, but not twice")
            self._fill(self._source, beat)
            raise LiveModelError(f"{model_path}: {error}") from error
        beat()
        self._synchronize()
        self._source = source

    def rows(self, name: str, count: int) -> list[Any]:
        """The first rows of a parameter as numbers; `name` is its Hugging Face name."""
        self._require_weights()
        parameter = self._model.named_parameters().get(name)
        if parameter is None:
            raise LiveModelError(f"name: the model has no parameter {name!r}")
        values: list[Any] = parameter[:count].float().cpu().tolist()
        return values

    def release(self, tags: list[str]) -> None:
        """Gives back what `tags` name; what is released already stays so."""
        tags = [tag for tag in tags if tag not in self._released]
        if self._has_graphs and tags:
            self._runner.drop_graphs()
        if KV_CACHE in tags:
            self._kv_pool.release()
        if WEIGHTS in tags:
            for entry in self._storages:
                # On a CPU a copy would take as much as is given back: read them again instead.
                entry.kept = entry.storage.cpu() if self._on_gpu else None
                entry.storage.resize_(0)
        self._released.update(tags)
        if self._on_gpu:
            self._synchronize()
            torch.cuda.empty_cache()

    def resume(self, tags: list[str], beat: Callable[[], None]) -> None:
        """Takes back what `tags` name; graphs are captured when the rest is there."""
        tags = [tag for tag in tags if tag in self._released]
        if WEIGHTS in tags:
            self._restore_weights(beat)
            self._released.discard(WEIGHTS)
        beat()
        if KV_CACHE in tags:
            self._kv_pool.restore()
        self._released.difference_update(tags)
        beat()
        if self._has_graphs and not self._released and self._runner.graphs is None:
            assert self._capture is not None
            self._capture()
            beat()

    def usage(self) -> dict[str, Any]:
        """GB by what they are for, and the tokens that the KV cache holds."""
        weights = 0 if WEIGHTS in self._released else sum(s.nbytes for s in self._storages)
        return {
            "weight": weights / 1e9,
            "kvcache": self._kv_pool.nbytes / 1e9,
            "token_capacity": self._kv_pool.num_slots,
            "released": sorted(self._released),
        }

    @property
    def _on_gpu(self) -> bool:
        return self._runner.device.type == "cuda"

    def _checked_config(self, source: ModelSource) -> ModelConfig:
        ours = self._model.config
        theirs = ModelConfig.load(
            source,
            dtype=str(ours.dtype).removeprefix("torch."),
            device=self._runner.device,
            context_length=ours.context_length,
            override_args=self._args.json_model_override_args,
            trust_remote_code=self._args.trust_remote_code,
        )
        # Which ids end an answer is the serving engine's business and does not change.
        theirs = replace(theirs, eos_token_ids=ours.eos_token_ids)
        names = [name for name in ModelConfig.__dataclass_fields__ if name != "hf_config"]
        different = [name for name in names if getattr(ours, name) != getattr(theirs, name)]
        if _rope(ours) != _rope(theirs):
            different.append("rope_parameters")
        if different:
            raise LiveModelError(
                f"model_path: {source.name} differs from the model served in {', '.join(different)}"
            )
        return theirs

    def _fill(self, source: ModelSource, beat: Callable[[], None]) -> None:
        config = self._model.config
        if source.weight_format == "dummy":
            fill_model(self._model, source, config, seed=self._args.random_seed or 0)
        else:
            self._model.load_weights(_beating(read_weights(source, config), beat))

    def _restore_weights(self, beat: Callable[[], None]) -> None:
        for entry in self._storages:
            entry.storage.resize_(entry.nbytes)
        if self._on_gpu:
            for entry in self._storages:
                assert entry.kept is not None
                entry.storage.copy_(entry.kept)
                entry.kept = None
            self._synchronize()
            return
        try:
            self._fill(self._source, beat)
        except ConfigError as error:
            for entry in self._storages:
                entry.storage.resize_(0)
            raise LiveModelError(f"the weights cannot be read again: {error}") from error

    def _require_weights(self) -> None:
        if WEIGHTS in self._released:
            raise LiveModelError("the weights are released: resume them first")

    def _synchronize(self) -> None:
        if self._on_gpu:
            torch.cuda.synchronize(self._runner.device)


def _storages(parameters: Any) -> list[_Storage]:
    """Of all parameters, each once: several may share one."""
    found: dict[int, _Storage] = {}
    for parameter in parameters:
        storage = parameter.untyped_storage()
        found.setdefault(storage.data_ptr(), _Storage(storage, storage.nbytes()))
    return list(found.values())


def _rope(config: ModelConfig) -> Any:
    return getattr(config.hf_config, "rope_parameters", None)


def _beating(
    weights: Iterator[tuple[str, torch.Tensor]], beat: Callable[[], None]
) -> Iterator[tuple[str, torch.Tensor]]:
    for entry in weights:
        beat()
        yield entry
