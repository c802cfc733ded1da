"""Running programs: one, many at once, or only as far as the text that all their runs share."""

from __future__ import annotations

import itertools
import os
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from sglang.global_config import global_config
from sglang.lang.backend.base_backend import BaseBackend
from sglang.lang.executor import StreamExecutor
from sglang.lang.program_state import ProgramState, ProgramStateGroup
from sglang.lang.sampling_params import SglSamplingParams
from sglang.lang.tracer import extract_prefix_by_tracing

if TYPE_CHECKING:
    from sglang.lang.function import SglFunction

__all__ = [
    "ProgramState",
    "ProgramStateGroup",
    "StreamExecutor",
    "cache_program",
    "run_program",
    "run_program_batch",
]

WORTH_CACHING_CHARS = 64


def run_program(
    program: SglFunction,
    backend: BaseBackend,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    defaults: SglSamplingParams,
    *,
    stream: bool = False,
    use_thread: bool = True,
) -> ProgramState:
    """The state of a run, which is over unless it streams. Raises what failed unless it streams."""
    executor = StreamExecutor(
        backend,
        defaults,
        stream=stream,
        num_api_spec_tokens=program.num_api_spec_tokens,
        use_thread=use_thread,
        follower=threading.get_ident() if stream else None,
    )
    state = ProgramState(executor)
    if stream:
        threading.Thread(
            target=_run_followed, args=(state, program, args, kwargs), name="sgl-run", daemon=True
        ).start()
    else:
        _run(state, program, args, kwargs)
    return state


def _run(
    state: ProgramState, program: SglFunction, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> None:
    executor = state.stream_executor
    try:
        state.ret_value = program.func(state, *args, **kwargs)
        executor.settle()
    except BaseException as error:
        executor.fail(error)
        raise
    finally:
        executor.end()
    if global_config.verbosity >= 2:
        print(executor.text_)


def _run_followed(
    state: ProgramState, program: SglFunction, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> None:
    """Errors are kept for whoever reads the state."""
    state.stream_executor.runner = threading.get_ident()
    with suppress(BaseException):
        _run(state, program, args, kwargs)


def run_program_batch(
    program: SglFunction,
    backend: BaseBackend,
    batch: Sequence[Mapping[str, Any]],
    defaults: SglSamplingParams,
    *,
    num_threads: int | str = "auto",
    progress_bar: bool = False,
) -> Iterator[ProgramState]:
    """The states in the order of the batch, as soon as they are there.

    As many programs as threads are under way, and as many again may be done before their turn.
    """
    threads = _thread_count(num_threads, len(batch))
    if global_config.enable_precache_with_tracing and len(batch) > 1:
        cache_program(program, backend)
    return _run_all(program, backend, batch, defaults, threads, progress_bar)


def _run_all(
    program: SglFunction,
    backend: BaseBackend,
    batch: Sequence[Mapping[str, Any]],
    defaults: SglSamplingParams,
    threads: int,
    progress_bar: bool,
) -> Iterator[ProgramState]:
    from tqdm import tqdm

    left = iter(batch)
    under_way: deque[Future[ProgramState]] = deque()
    pool = ThreadPoolExecutor(threads, thread_name_prefix="sgl-batch")

    def start(count: int) -> None:
        for arguments in itertools.islice(left, count):
            under_way.append(pool.submit(run_program, program, backend, (), arguments, defaults))

    try:
        with tqdm(total=len(batch), disable=not progress_bar) as bar:
            start(2 * threads)
            while under_way:
                state = under_way.popleft().result()
                start(1)
                bar.update(1)
                yield state
    finally:  # also when one has failed, or the caller wants no more
        pool.shutdown(wait=True, cancel_futures=True)


def _thread_count(num_threads: int | str, programs: int) -> int:
    """auto: far more than processors, since they only wait for the server."""
    if num_threads == "auto":
        return min(max(96, 16 * (os.cpu_count() or 1)), programs)
    if not isinstance(num_threads, int) or num_threads < 1:
        raise ValueError(f"num_threads: expected auto or at least 1, got {num_threads!r}")
    return min(num_threads, programs)


def cache_program(program: SglFunction, backend: BaseBackend) -> None:
    """Lets the backend compute the text that every run begins with, if it is worth a call."""
    prefix = extract_prefix_by_tracing(program, backend)
    if len(prefix) > WORTH_CACHING_CHARS:
        backend.cache_prefix(prefix)
