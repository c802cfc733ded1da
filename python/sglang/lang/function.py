"""SglFunction: a program, as `@sgl.function` makes it from a Python function."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from sglang.global_config import global_config
from sglang.lang.backend.base_backend import BaseBackend
from sglang.lang.interpreter import cache_program, run_program, run_program_batch
from sglang.lang.program_state import ProgramState
from sglang.lang.sampling_params import SglSamplingParams
from sglang.lang.tracer import TracerProgramState, current_trace, trace_program


class SglFunction:
    """A Python function whose first argument, `s`, is the state it builds.

    num_api_spec_tokens: with an API, generate so many tokens ahead of what a `gen` asks for.
    bind_arguments: values that every run has.
    """

    def __init__(
        self,
        func: Callable[..., Any],
        num_api_spec_tokens: int | None = None,
        bind_arguments: Mapping[str, Any] | None = None,
    ) -> None:
        spec = inspect.getfullargspec(func)
        if not spec.args or spec.args[0] != "s":
            raise TypeError(f"the first argument of {func.__name__} must be named s")
        self.func = func
        self.num_api_spec_tokens = num_api_spec_tokens
        self.bind_arguments = dict(bind_arguments or {})
        self.arg_names = spec.args[1:]
        self.arg_defaults = spec.defaults or ()
        self.__doc__ = func.__doc__
        self.__name__ = func.__name__

    def bind(self, **kwargs: Any) -> SglFunction:
        """The program with these arguments set."""
        for name in kwargs:
            if name not in self.arg_names:
                raise TypeError(f"{self.__name__} has no argument {name}")
        return SglFunction(self.func, self.num_api_spec_tokens, self.bind_arguments | kwargs)

    def run(
        self,
        *args: Any,
        max_new_tokens: int = 128,
        n: int = 1,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = -1,
        min_p: float = 0.0,
        frequency_penalty: float = 0.0,
        presence_penalty: float = 0.0,
        ignore_eos: bool = False,
        stop: str | Iterable[str] | None = None,
        stop_token_ids: Iterable[int] | None = None,
        stop_regex: str | Iterable[str] | None = None,
        return_logprob: bool | None = None,
        logprob_start_len: int | None = None,
        top_logprobs_num: int | None = None,
        return_text_in_logprobs: bool | None = None,
        stream: bool = False,
        backend: BaseBackend | None = None,
        use_thread: bool = True,
        **kwargs: Any,
    ) -> ProgramState:
        """Runs it; the other arguments are the program's own, the named ones what its generations
        do not set themselves. Raises what failed.

        stream: returns at once, with a state that can be read while it grows and raises then.
        use_thread: False to generate in the program's thread, one expression after the other.
        """
        defaults = SglSamplingParams().overridden(
            {
                "max_new_tokens": max_new_tokens,
                "n": n,
                "temperature": temperature,
                "top_p": top_p,
                "top_k": top_k,
                "min_p": min_p,
                "frequency_penalty": frequency_penalty,
                "presence_penalty": presence_penalty,
                "ignore_eos": ignore_eos,
                "stop": stop,
                "stop_token_ids": stop_token_ids,
                "stop_regex": stop_regex,
                "return_logprob": return_logprob,
                "logprob_start_len": logprob_start_len,
                "top_logprobs_num": top_logprobs_num,
                "return_text_in_logprobs": return_text_in_logprobs,
            }
        )
        return run_program(
            self,
            backend_or_default(backend),
            args,
            self.bind_arguments | kwargs,
            defaults,
            stream=stream,
            use_thread=use_thread,
        )

    def run_batch(
        self,
        batch_kwargs: Sequence[Mapping[str, Any] | Sequence[Any]],
        *,
        max_new_tokens: int = 128,
        n: int = 1,
        stop: str | Iterable[str] | None = None,
        stop_token_ids: Iterable[int] | None = None,
        stop_regex: str | Iterable[str] | None = None,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = -1,
        min_p: float = 0.0,
        frequency_penalty: float = 0.0,
        presence_penalty: float = 0.0,
        ignore_eos: bool = False,
        return_logprob: bool | None = None,
        logprob_start_len: int | None = None,
        top_logprobs_num: int | None = None,
        return_text_in_logprobs: bool | None = None,
        backend: BaseBackend | None = None,
        num_threads: int | str = "auto",
        progress_bar: bool = False,
        generator_style: bool = False,
    ) -> list[ProgramState] | Iterator[ProgramState]:
        """Runs it once for each element, a dict of arguments or a list of positional ones.

        The states come in the order of the elements. generator_style: one by one, as soon as they
        are there. Raises what the first program to fail has failed with; then none is started any
        more and those that run are waited for.
        """
        if not batch_kwargs:
            return iter(()) if generator_style else []
        defaults = SglSamplingParams().overridden(
            {
                "max_new_tokens": max_new_tokens,
                "n": n,
                "stop": stop,
                "stop_token_ids": stop_token_ids,
                "stop_regex": stop_regex,
                "temperature": temperature,
                "top_p": top_p,
                "top_k": top_k,
                "min_p": min_p,
                "frequency_penalty": frequency_penalty,
                "presence_penalty": presence_penalty,
                "ignore_eos": ignore_eos,
                "return_logprob": return_logprob,
                "logprob_start_len": logprob_start_len,
                "top_logprobs_num": top_logprobs_num,
                "return_text_in_logprobs": return_text_in_logprobs,
            }
        )
        states = run_program_batch(
            self,
            backend_or_default(backend),
            [self._named(i, arguments) for i, arguments in enumerate(batch_kwargs)],
            defaults,
            num_threads=num_threads,
            progress_bar=progress_bar,
        )
        return states if generator_style else list(states)

    def _named(self, i: int, arguments: Mapping[str, Any] | Sequence[Any]) -> dict[str, Any]:
        if isinstance(arguments, Mapping):
            return self.bind_arguments | dict(arguments)
        if isinstance(arguments, str) or not isinstance(arguments, Sequence):
            raise TypeError(
                f"batch_kwargs[{i}]: expected a dict or a list of arguments, got {arguments!r}"
            )
        least = len(self.arg_names) - len(self.arg_defaults)
        if not least <= len(arguments) <= len(self.arg_names):
            raise TypeError(
                f"batch_kwargs[{i}]: {self.__name__} takes {', '.join(self.arg_names)}, got "
                f"{len(arguments)} values"
            )
        return self.bind_arguments | dict(zip(self.arg_names, arguments, strict=False))

    def trace(self, *, backend: BaseBackend | None = None, **kwargs: Any) -> TracerProgramState:
        """The program's graph; nothing is generated. Missing arguments stand for themselves."""
        where = getattr(backend or global_config.default_backend, "endpoint", None)
        where = where or backend or global_config.default_backend or BaseBackend()
        return trace_program(self, self.bind_arguments | kwargs, where)

    def cache(self, backend: BaseBackend | None = None) -> None:
        """Computes the text that every run begins with, so that the first one finds it cached."""
        cache_program(self, backend_or_default(backend))

    def __call__(self, *args: Any, **kwargs: Any) -> ProgramState:
        """Runs it; within a program that is being traced, traces it."""
        trace = current_trace()
        if trace is None:
            return self.run(*args, **kwargs)
        named = dict(zip(self.arg_names, args, strict=False))
        return self.trace(backend=trace.stream_executor.backend, **named, **kwargs)


def backend_or_default(backend: BaseBackend | None) -> BaseBackend:
    """A Runtime stands for its endpoint. Raises ValueError if there is none at all."""
    chosen = backend or global_config.default_backend
    if chosen is None:
        raise ValueError("backend: give one, or name it with sgl.set_default_backend(...)")
    endpoint: BaseBackend = getattr(chosen, "endpoint", chosen)
    return endpoint
