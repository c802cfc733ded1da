"""What an Engine can do beside generating, and what it cannot."""

from __future__ import annotations

from collections.abc import Coroutine, Sequence
from typing import Any, NamedTuple, NoReturn, TypeVar

from sglang.srt.entrypoints.operations.information import server_info
from sglang.srt.entrypoints.server_state import ServerState
from sglang.srt.messages import ControlReply

T = TypeVar("T")


class WeightsUpdate(NamedTuple):
    """A tuple, as SGLang's callers index it."""

    success: bool
    message: str
    num_paused_requests: int


class EngineOperations:
    """Methods of Engine; replies are the dicts of the HTTP endpoints of the same name."""

    _state: ServerState

    def _call(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of `work`, run on the engine's loop."""
        raise NotImplementedError

    def flush_cache(self, timeout_s: float = 0.0) -> dict[str, Any]:
        """Empties the prefix cache, as soon as the engine is idle."""
        return _outcome(self._call(self._state.manager.flush_cache(timeout_s)))

    def get_server_info(self) -> dict[str, Any]:
        return self._call(server_info(self._state))

    def start_profile(self, **options: Any) -> dict[str, Any]:
        """Keywords: the fields of POST /start_profile."""
        return _outcome(self._call(self._state.controls.start_profile(options)))

    def stop_profile(self) -> dict[str, Any]:
        """Returns once the trace is written; its path is in the message."""
        return _outcome(self._call(self._state.controls.stop_profile()))

    def pause_generation(self, mode: str = "abort") -> dict[str, Any]:
        return _outcome(self._call(self._state.controls.pause({"mode": mode})))

    def continue_generation(self) -> dict[str, Any]:
        return _outcome(self._call(self._state.controls.resume({})))

    def update_weights_from_disk(
        self, model_path: str, load_format: str | None = None, **options: Any
    ) -> WeightsUpdate:
        """`options`: abort_all_requests, flush_cache, keep_pause, weight_version."""
        fields = {"model_path": model_path, "load_format": load_format, **options}
        reply = self._call(self._state.controls.update_weights(fields))
        return WeightsUpdate(reply.ok, reply.message, reply.data.get("num_paused_requests", 0))

    def get_weights_by_name(self, name: str, truncate_size: int = 100) -> list[Any]:
        """The first rows of a parameter, by its Hugging Face name."""
        fields = {"name": name, "truncate_size": truncate_size}
        return self._call(self._state.controls.get_weights(fields))

    def release_memory_occupation(self, tags: Sequence[str] | None = None) -> dict[str, Any]:
        """Gives back memory until `resume_memory_occupation`; None: of all kinds."""
        return _outcome(self._call(self._state.controls.release_memory(_tags(tags))))

    def resume_memory_occupation(self, tags: Sequence[str] | None = None) -> dict[str, Any]:
        return _outcome(self._call(self._state.controls.resume_memory(_tags(tags))))

    def freeze_gc(self) -> dict[str, Any]:
        """Leaves what lives now in the children out of garbage collection, for good."""
        return _outcome(self._call(self._state.controls.freeze_gc()))

    def encode(self, prompt: Any, **more: Any) -> NoReturn:
        _unavailable("encode", "embedding models are not served")

    async def async_encode(self, prompt: Any, **more: Any) -> NoReturn:
        _unavailable("async_encode", "embedding models are not served")

    def rerank(self, prompt: Any) -> NoReturn:
        _unavailable("rerank", "reranking models are not served")

    def score(self, *args: Any, **more: Any) -> NoReturn:
        _unavailable("score", _SCORES)

    async def async_score(self, *args: Any, **more: Any) -> NoReturn:
        _unavailable("async_score", _SCORES)

    def open_session(
        self,
        capacity_of_str_len: int,
        session_id: str | None = None,
        streaming: bool = False,
        timeout: float | None = None,
    ) -> NoReturn:
        _unavailable("open_session", "sessions are not served; prefixes are cached without them")

    def close_session(self, session_id: str) -> NoReturn:
        _unavailable("close_session", "sessions are not served")

    def start_expert_distribution_record(self) -> NoReturn:
        _unavailable("start_expert_distribution_record", "experts are not recorded")

    def stop_expert_distribution_record(self) -> NoReturn:
        _unavailable("stop_expert_distribution_record", "experts are not recorded")

    def dump_expert_distribution_record(self) -> NoReturn:
        _unavailable("dump_expert_distribution_record", "experts are not recorded")

    def init_weights_update_group(self, *args: Any, **more: Any) -> NoReturn:
        _unavailable("init_weights_update_group", _DISK_ONLY)

    def destroy_weights_update_group(self, group_name: str) -> NoReturn:
        _unavailable("destroy_weights_update_group", _DISK_ONLY)

    def update_weights_from_distributed(self, *args: Any, **more: Any) -> NoReturn:
        _unavailable("update_weights_from_distributed", _DISK_ONLY)

    def update_weights_from_tensor(self, *args: Any, **more: Any) -> NoReturn:
        _unavailable("update_weights_from_tensor", _DISK_ONLY)

    def update_weights_from_ipc(self, *args: Any, **more: Any) -> NoReturn:
        _unavailable("update_weights_from_ipc", _DISK_ONLY)

    def load_lora_adapter_from_tensors(self, *args: Any, **more: Any) -> NoReturn:
        _unavailable("load_lora_adapter_from_tensors", _NO_LORA)

    def load_lora_adapter(self, *args: Any, **more: Any) -> NoReturn:
        _unavailable("load_lora_adapter", _NO_LORA)

    def unload_lora_adapter(self, lora_name: str) -> NoReturn:
        _unavailable("unload_lora_adapter", _NO_LORA)

    async def async_load_lora_adapter(self, *args: Any, **more: Any) -> NoReturn:
        _unavailable("async_load_lora_adapter", _NO_LORA)

    async def async_unload_lora_adapter(self, lora_name: str) -> NoReturn:
        _unavailable("async_unload_lora_adapter", _NO_LORA)

    def collective_rpc(self, method: str, **kwargs: Any) -> NoReturn:
        _unavailable("collective_rpc", "the scheduler takes no calls by name")

    def save_remote_model(self, **kwargs: Any) -> NoReturn:
        _unavailable("save_remote_model", _NO_SAVING)

    def save_sharded_model(self, **kwargs: Any) -> NoReturn:
        _unavailable("save_sharded_model", _NO_SAVING)


_DISK_ONLY = "weights are taken from disk only, see update_weights_from_disk"
_SCORES = "ask generate for token_ids_logprob, or a server for /v1/score"
_NO_LORA = "LoRA adapters are not served"
_NO_SAVING = "weights are not written"


def _unavailable(method: str, reason: str) -> NoReturn:
    raise NotImplementedError(f"Engine.{method}: {reason}")


def _tags(tags: Sequence[str] | None) -> dict[str, Any]:
    return {"tags": None if tags is None else list(tags)}


def _outcome(reply: ControlReply) -> dict[str, Any]:
    return {"success": reply.ok, "message": reply.message, **reply.data}
