"""Engine: the server's pipeline without HTTP, in the process that makes it.

Results and parameters are those of POST /generate. Parameters that cannot be served raise
ValueError naming the field; a death of the scheduler or detokenizer raises EngineFailed.
"""

from __future__ import annotations

import atexit
import difflib
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Iterator
from contextlib import aclosing
from dataclasses import fields
from types import TracebackType
from typing import Any, Self, TypeVar

from sglang.srt.entrypoints.engine_operations import EngineOperations
from sglang.srt.entrypoints.engine_thread import EngineThread
from sglang.srt.entrypoints.error_forms import Aborted, raise_if_refused
from sglang.srt.entrypoints.native import Generation
from sglang.srt.entrypoints.start_up import Parts, default_parts
from sglang.srt.errors import ConfigError, Overloaded, RequestError
from sglang.srt.server_args import ServerArgs

T = TypeVar("T")
Result = dict[str, Any] | list[dict[str, Any]]


class Engine(EngineOperations):
    """Starts the scheduler and the detokenizer and waits until they serve.

    Engine(model_path=..., more fields of ServerArgs) or Engine(server_args=ServerArgs(...)).
    Raises ValueError naming a field that cannot be served, StartFailed if a child cannot start.
    Methods may be called from any thread, and from coroutines of any loop. It ends with
    `shutdown()`, at the end of a `with` block, or with the interpreter.
    """

    def __init__(
        self,
        *,
        server_args: ServerArgs | None = None,
        parts: Parts | None = None,
        **kwargs: Any,
    ) -> None:
        self.server_args = _checked_args(server_args, kwargs)
        try:
            self._thread = EngineThread(self.server_args, parts or default_parts())
        except ConfigError as error:
            raise ValueError(str(error)) from None
        self._state = self._thread.state
        atexit.register(self.shutdown)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.shutdown()

    def shutdown(self) -> None:
        """Fails what is in flight and ends the children. May be called again."""
        self._thread.close()
        atexit.unregister(self.shutdown)

    def get_all_child_pids(self) -> list[int]:
        return self._thread.group.pids()

    def generate(
        self,
        prompt: str | list[str] | None = None,
        sampling_params: dict[str, Any] | list[dict[str, Any]] | None = None,
        input_ids: list[int] | list[list[int]] | None = None,
        image_data: Any = None,
        audio_data: Any = None,
        video_data: Any = None,
        mm_hashes: list[str] | list[list[str]] | None = None,
        return_logprob: bool | list[bool] | None = False,
        logprob_start_len: int | list[int] | None = None,
        top_logprobs_num: int | list[int] | None = None,
        token_ids_logprob: list[int] | list[list[int]] | None = None,
        lora_path: list[str | None] | None = None,
        custom_logit_processor: str | list[str] | None = None,
        require_reasoning: bool = False,
        return_hidden_states: bool = False,
        return_routed_experts: bool = False,
        routed_experts_start_len: int = 0,
        stream: bool = False,
        bootstrap_host: str | list[str] | None = None,
        bootstrap_port: int | list[int] | None = None,
        bootstrap_room: int | list[int] | None = None,
        routed_dp_rank: int | None = None,
        disagg_prefill_dp_rank: int | None = None,
        data_parallel_rank: int | None = None,
        external_trace_header: dict[str, Any] | None = None,
        rid: str | list[str] | None = None,
        session_params: dict[str, Any] | None = None,
        priority: int | None = None,
        session_id: str | None = None,
        **more: Any,
    ) -> Any:
        """The answer, a list of them for a batch or n > 1, or with `stream` an iterator over the
        chunks. `more`: other fields of POST /generate, such as slo or extra_key."""
        generation = self._generation(locals())
        if stream:
            return self._chunks(generation)
        return self._call(generation.collect())

    async def async_generate(
        self,
        prompt: str | list[str] | None = None,
        sampling_params: dict[str, Any] | list[dict[str, Any]] | None = None,
        input_ids: list[int] | list[list[int]] | None = None,
        image_data: Any = None,
        audio_data: Any = None,
        video_data: Any = None,
        mm_hashes: list[str] | list[list[str]] | None = None,
        return_logprob: bool | list[bool] | None = False,
        logprob_start_len: int | list[int] | None = None,
        top_logprobs_num: int | list[int] | None = None,
        token_ids_logprob: list[int] | list[list[int]] | None = None,
        lora_path: list[str | None] | None = None,
        custom_logit_processor: str | list[str] | None = None,
        require_reasoning: bool = False,
        return_hidden_states: bool = False,
        return_routed_experts: bool = False,
        routed_experts_start_len: int = 0,
        stream: bool = False,
        bootstrap_host: str | list[str] | None = None,
        bootstrap_port: int | list[int] | None = None,
        bootstrap_room: int | list[int] | None = None,
        routed_dp_rank: int | None = None,
        disagg_prefill_dp_rank: int | None = None,
        data_parallel_rank: int | None = None,
        external_trace_header: dict[str, Any] | None = None,
        rid: str | list[str] | None = None,
        session_params: dict[str, Any] | None = None,
        priority: int | None = None,
        session_id: str | None = None,
        **more: Any,
    ) -> Any:
        """See `generate`; with `stream`, awaiting it gives an asynchronous iterator."""
        generation = self._generation(locals())
        if stream:
            return self._async_chunks(generation)
        try:
            return await self._thread.call_async(generation.collect())
        except (RequestError, Aborted) as error:
            raise as_plain_error(error) from None

    def abort_request(self, rid: str = "", abort_all: bool = False) -> None:
        """Ends the requests whose id starts with `rid`, or all."""

        async def abort() -> None:
            self._state.manager.abort(rid, abort_all)

        self._call(abort())

    def _call(self, work: Coroutine[Any, Any, T]) -> T:
        try:
            return self._thread.call(work)
        except (RequestError, Aborted) as error:
            raise as_plain_error(error) from None

    def _generation(self, arguments: dict[str, Any]) -> Generation:
        """arguments: of `generate`, whose names but one are those of a body's fields."""
        body = {**arguments, **arguments["more"], "text": arguments["prompt"]}
        for name in ("self", "more", "prompt"):
            del body[name]
        given = {name: value for name, value in body.items() if value is not None}
        try:
            return Generation(self._state, given)
        except RequestError as error:
            raise as_plain_error(error) from None

    def _chunks(self, generation: Generation) -> Iterator[dict[str, Any]]:
        try:
            yield from self._thread.iterate(_results(generation))
        except (RequestError, Aborted) as error:
            raise as_plain_error(error) from None

    async def _async_chunks(self, generation: Generation) -> AsyncIterator[dict[str, Any]]:
        try:
            async with aclosing(self._thread.iterate_async(_results(generation))) as chunks:
                async for chunk in chunks:
                    yield chunk
        except (RequestError, Aborted) as error:
            raise as_plain_error(error) from None


def as_plain_error(error: RequestError | Aborted) -> Exception:
    """What a Python caller expects: ValueError for what was asked, Overloaded for want of room."""
    if isinstance(error, RequestError) or error.status_code == RequestError.status_code:
        return ValueError(str(error))
    return Overloaded(str(error)) if error.status_code == Overloaded.status_code else error


async def _results(generation: Generation) -> AsyncGenerator[dict[str, Any], None]:
    first = not generation.several  # of several one may be refused: its own result says so
    async with aclosing(generation.updates) as updates:
        async for update in updates:
            if first:
                raise_if_refused(update.answer.finish)
            first = False
            yield generation.form.result(update)


def _checked_args(server_args: ServerArgs | None, kwargs: dict[str, Any]) -> ServerArgs:
    if server_args is not None and kwargs:
        raise ValueError(f"server_args: contradicts {', '.join(kwargs)}: give one or the other")
    known = [field.name for field in fields(ServerArgs)]
    for name in kwargs:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise ValueError(f"{name}: is not a server argument{hint}")
    # Quiet unless told: its lines would come between those of the program that uses it.
    args = server_args or ServerArgs(**{"log_level": "error", **kwargs})
    try:
        args.check()
    except ConfigError as error:
        raise ValueError(str(error)) from None
    return args
