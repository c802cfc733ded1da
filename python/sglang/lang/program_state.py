"""ProgramState: the `s` of a program. ProgramStateGroup: its forks."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from sglang.lang.chat_format import Message
from sglang.lang.errors import NotServed
from sglang.lang.executor import StreamExecutor
from sglang.lang.ir import (
    SglConcateAndAppend,
    SglExpr,
    SglExprList,
    SglRoleBegin,
    SglRoleEnd,
    SglVarScopeBegin,
    SglVarScopeEnd,
    as_expr,
)
from sglang.lang.streaming import iterate, iterate_async


class ProgramState:
    """Text that grows by `+=`, and the variables that generations set.

    Appending returns at once; reading waits. What fails is raised to whoever reads or appends next.
    ret_value: what the program returned.
    """

    def __init__(self, stream_executor: StreamExecutor) -> None:
        self.stream_executor = stream_executor
        self.ret_value: Any = None

    def __iadd__(self, other: object) -> ProgramState:
        self.stream_executor.submit(as_expr(other))
        return self

    def __getitem__(self, name: str) -> Any:
        return self.get_var(name)

    def __setitem__(self, name: str, value: Any) -> None:
        self.set_var(name, value)

    def __contains__(self, name: str) -> bool:
        return self.stream_executor.has_var(name)

    def __repr__(self) -> str:
        return f"ProgramState({self.stream_executor.text_})"

    def system(self, expr: SglExpr | str | None = None) -> AbstractContextManager[None] | None:
        """Appends a message, or, without an expression, is one: `with s.system(): ...`"""
        return self._role_common("system", expr)

    def user(self, expr: SglExpr | str | None = None) -> AbstractContextManager[None] | None:
        return self._role_common("user", expr)

    def assistant(self, expr: SglExpr | str | None = None) -> AbstractContextManager[None] | None:
        return self._role_common("assistant", expr)

    def _role_common(
        self, name: str, expr: SglExpr | str | None = None
    ) -> AbstractContextManager[None] | None:
        if expr is None:
            return self._role_scope(name)
        self.stream_executor.submit(
            SglExprList([SglRoleBegin(name), as_expr(expr), SglRoleEnd(name)])
        )
        return None

    @contextmanager
    def _role_scope(self, name: str) -> Iterator[None]:
        self.stream_executor.submit(SglRoleBegin(name))
        yield
        self.stream_executor.submit(SglRoleEnd(name))

    @contextmanager
    def var_scope(self, name: str) -> Iterator[None]:
        """What is appended inside becomes the value of a variable."""
        self.stream_executor.submit(SglVarScopeBegin(name))
        yield
        self.stream_executor.submit(SglVarScopeEnd(name))

    def fork(
        self, size: int = 1, position_ids_offset: list[int] | None = None
    ) -> ProgramStateGroup:
        """`size` states that go on from here by themselves, at the same time."""
        if position_ids_offset is not None:
            raise NotServed("position_ids_offset: no server has it any more")
        if size < 1:
            raise ValueError(f"size: a fork needs at least 1 state, got {size}")
        forks = self.stream_executor.fork(size)
        return ProgramStateGroup([type(self)(fork) for fork in forks], self)

    @contextmanager
    def copy(self, position_ids_offset: list[int] | None = None) -> Iterator[ProgramState]:
        """One fork, joined when the block ends."""
        group = self.fork(1, position_ids_offset)
        yield group[0]
        group.join()

    def text(self) -> str:
        """All of it, once everything appended is done."""
        return self.stream_executor.finished_text()

    def messages(self) -> list[Message]:
        """The finished chat messages: role and content."""
        return self.stream_executor.finished_messages()

    def sync(self) -> None:
        """Waits until everything appended is done."""
        self.stream_executor.sync()

    def error(self) -> BaseException | None:
        """What it failed with, if it did."""
        return self.stream_executor.error()

    def text_iter(self, var_name: str | None = None) -> Iterator[Any]:
        """The text, or a variable, piece by piece; at once if the program does not stream."""
        return iterate(self.stream_executor, var_name)

    async def text_async_iter(
        self, var_name: str | None = None, return_meta_data: bool = False
    ) -> AsyncIterator[Any]:
        """`text_iter` for an event loop; return_meta_data: pairs of piece and meta info."""
        async for piece in iterate_async(self.stream_executor, var_name, return_meta_data):
            yield piece

    def get_var(self, name: str) -> Any:
        return self.stream_executor.get_var(name)

    def set_var(self, name: str, value: Any) -> None:
        self.stream_executor.set_var(name, value)

    def get_meta_info(self, name: str) -> Any:
        """What the backend told of the variable's generation, such as token counts."""
        return self.stream_executor.get_meta_info(name)


class ProgramStateGroup:
    """Forks of one state. `+=` with a function of the index, one expression, or one for each."""

    def __init__(self, states: list[ProgramState], src_state: ProgramState) -> None:
        self.states = states
        self.src_state = src_state

    def join(self, mode: str = "gather_variable") -> None:
        """Waits for all. gather_variable: what the forks set become lists in the source state.
        concate_and_append: what they appended is appended to it, in order."""
        executors = [state.stream_executor for state in self.states]
        source = self.src_state.stream_executor
        if mode == "gather_variable":
            source.gather(executors)
        elif mode == "concate_and_append":
            self.src_state += SglConcateAndAppend(self.states)
            source.sync()
            source.raise_if_failed()
        else:
            raise ValueError(f"mode: a join is gather_variable or concate_and_append, not {mode!r}")
        for executor in executors:
            executor.end()
        source.forget(executors)

    def __len__(self) -> int:
        return len(self.states)

    def __iter__(self) -> Iterator[ProgramState]:
        return iter(self.states)

    def __getitem__(self, i: int) -> ProgramState:
        return self.states[i]

    def __setitem__(self, i: int, value: ProgramState) -> None:
        """Python asks for it after `group[i] += ...`; a state cannot be replaced."""
        if self.states[i] is not value:
            raise TypeError("a fork cannot be replaced by another state")

    def __iadd__(self, other: object) -> ProgramStateGroup:
        for state, part in zip(self.states, self._parts(other), strict=True):
            state += part
        return self

    def _parts(self, other: Any) -> list[Any]:
        if isinstance(other, list | tuple):
            if len(other) != len(self.states):
                raise ValueError(
                    f"{len(other)} expressions were appended to {len(self.states)} forks"
                )
            return list(other)
        if callable(other):
            of_index: Callable[[int], Any] = other
            return [of_index(i) for i in range(len(self.states))]
        return [other] * len(self.states)
