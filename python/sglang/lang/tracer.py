"""Tracing: a program is followed without a backend, to see its graph or the text it begins with."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sglang.lang.backend.base_backend import BaseBackend
from sglang.lang.errors import TracingError
from sglang.lang.executor import StreamExecutor
from sglang.lang.ir import (
    SglArgument,
    SglConstantText,
    SglExpr,
    SglExprList,
    SglRoleBegin,
    SglRoleEnd,
    SglVariable,
)
from sglang.lang.program_state import ProgramState
from sglang.lang.sampling_params import SglSamplingParams

if TYPE_CHECKING:
    from sglang.lang.function import SglFunction


@dataclass(frozen=True)
class TraceNode:
    """One step of a program's graph. previous: the steps it comes after; several after a join."""

    node_id: int
    state_id: int
    expr: SglExpr
    previous: tuple[int, ...]

    def __str__(self) -> str:
        after = ", ".join(f"%{i}" for i in self.previous)
        return f"%{self.node_id} = {self.expr!r}  # state {self.state_id}" + (
            f", after {after}" if after else ""
        )


@dataclass(frozen=True)
class Fork(SglExpr):
    """In a graph: states begin here."""

    states: tuple[int, ...]


@dataclass(frozen=True)
class Join(SglExpr):
    """In a graph: variables of these states were gathered."""

    states: tuple[int, ...]


class _PrefixEnds(Exception):
    """The program has reached what is not the same in all its runs."""


class TraceRecorder(StreamExecutor):
    """Stands in for an executor: notes what is appended, generates nothing.

    nodes: of this state and all its forks, in the order in which the program appended them.
    """

    def __init__(
        self,
        backend: BaseBackend,
        *,
        prefix_only: bool = False,
        parent: TraceRecorder | None = None,
    ) -> None:
        super().__init__(backend, SglSamplingParams(), use_thread=False)
        self.prefix_only = prefix_only
        self.nodes: list[TraceNode] = parent.nodes if parent else []
        self._ids: Iterator[int] = parent._ids if parent else itertools.count()
        self.state_id = next(self._ids)
        self.last: tuple[int, ...] = parent.last if parent else ()
        self.set_here: set[str] = set(parent.set_here) if parent else set()

    def submit(self, expr: SglExpr) -> None:
        for part in expr.expr_list if isinstance(expr, SglExprList) else [expr]:
            if self.prefix_only:
                self._extend_prefix(part)
            else:
                self.note(part)
                self.set_here.update(part.variables())

    def _extend_prefix(self, expr: SglExpr) -> None:
        match expr:
            case SglConstantText():
                self.transcript.append(expr.value)
            case SglRoleBegin():
                self.transcript.begin_role(expr.role)
            case SglRoleEnd():
                self.transcript.end_role(expr.role)
            case _:
                raise _PrefixEnds

    def note(self, expr: SglExpr, previous: tuple[int, ...] | None = None) -> None:
        node = TraceNode(
            len(self.nodes), self.state_id, expr, self.last if previous is None else previous
        )
        self.nodes.append(node)
        self.last = (node.node_id,)

    def get_var(self, name: str) -> Any:
        if name in self.variables:
            return self.variables[name]
        if name not in self.set_here:
            raise KeyError(name)
        return SglVariable(name, self.state_id)

    def has_var(self, name: str) -> bool:
        return name in self.variables or name in self.set_here

    def get_meta_info(self, name: str) -> Any:
        raise TracingError(f"the meta info of {name} is not known while tracing")

    def finished_text(self) -> str:
        raise TracingError("the text is not known while tracing")

    def finished_messages(self) -> Any:
        raise TracingError("the messages are not known while tracing")

    def fork(self, size: int) -> list[StreamExecutor]:
        if self.prefix_only:
            raise _PrefixEnds
        self.note(Fork(()))
        forks = [TraceRecorder(self.backend, parent=self) for _ in range(size)]
        for fork in forks:
            fork.variables = dict(self.variables)
        states = tuple(fork.state_id for fork in forks)
        node = self.nodes[-1]
        self.nodes[-1] = TraceNode(node.node_id, node.state_id, Fork(states), node.previous)
        return list(forks)

    def gather(self, forks: Iterable[StreamExecutor]) -> None:
        recorders = [fork for fork in forks if isinstance(fork, TraceRecorder)]
        own = self.set_here | self.variables.keys()
        for recorder in recorders:
            for name in recorder.set_here - own:
                variable = SglVariable(name, recorder.state_id)
                self.variables.setdefault(name, []).append(variable)
        ends = tuple(i for recorder in recorders for i in recorder.last)
        self.note(Join(tuple(recorder.state_id for recorder in recorders)), self.last + ends)


class TracerProgramState(ProgramState):
    """The `s` of a traced program, and afterwards its graph."""

    stream_executor: TraceRecorder

    @property
    def nodes(self) -> list[TraceNode]:
        """The steps of this state and all its forks, in order."""
        return self.stream_executor.nodes

    @property
    def last_node(self) -> TraceNode | None:
        return self.nodes[self.stream_executor.last[-1]] if self.stream_executor.last else None

    def print_graph_dfs(self) -> None:
        """One line a step."""
        for node in self.nodes:
            print(node)

    def __repr__(self) -> str:
        return f"TracerProgramState({len(self.nodes)} nodes)"


_current: ContextVar[TracerProgramState | None] = ContextVar("sgl_trace", default=None)


def current_trace() -> TracerProgramState | None:
    """The trace within which a program called another, if there is one."""
    return _current.get()


@contextmanager
def _tracing(state: TracerProgramState) -> Iterator[None]:
    token = _current.set(state)
    try:
        yield
    finally:
        _current.reset(token)


def trace_program(
    program: SglFunction, arguments: Mapping[str, Any], backend: BaseBackend
) -> TracerProgramState:
    """The program's graph. Arguments that are not given stand for themselves."""
    state = TracerProgramState(TraceRecorder(backend))
    with _tracing(state):
        state.ret_value = program.func(state, **_with_placeholders(program, arguments))
    return state


def extract_prefix_by_tracing(program: SglFunction, backend: BaseBackend) -> str:
    """The text that every run of the program begins with.

    The program's own errors do not count: it was called with placeholders.
    """
    state = TracerProgramState(TraceRecorder(backend, prefix_only=True))
    with _tracing(state), contextlib.suppress(Exception):
        program.func(state, **_with_placeholders(program, program.bind_arguments))
    return state.stream_executor.text_


def _with_placeholders(program: SglFunction, arguments: Mapping[str, Any]) -> dict[str, Any]:
    return {name: SglArgument(name) for name in program.arg_names} | dict(arguments)
