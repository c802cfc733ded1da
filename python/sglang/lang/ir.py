"""Expressions: what a program appends to its state. Executors and tracers interpret them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from sglang.lang.errors import TracingError

if TYPE_CHECKING:
    from sglang.lang.choices import ChoicesSamplingMethod
    from sglang.lang.program_state import ProgramState

REASONING_SUFFIX = "_reasoning_content"


class SglExpr:
    """Something that can be appended; `+` puts two in sequence."""

    def __add__(self, other: object) -> SglExprList:
        return SglExprList([self, as_expr(other)])

    def __radd__(self, other: object) -> SglExprList:
        return SglExprList([as_expr(other), self])

    def variables(self) -> Iterator[str]:
        """Names of the variables that it sets, one for each time."""
        return iter(())


def as_expr(value: object) -> SglExpr:
    """Text becomes a constant. TypeError for what cannot be appended."""
    if isinstance(value, SglExpr):
        return value
    if isinstance(value, str):
        return SglConstantText(value)
    if value is None:
        raise ValueError("None was appended to a program's state")
    raise TypeError(
        f"only text and sgl expressions can be appended, not {type(value).__name__}: {value!r}"
    )


class SglExprList(SglExpr):
    """Expressions one after the other; lists within it are flattened."""

    def __init__(self, exprs: Iterable[SglExpr]) -> None:
        self.expr_list: list[SglExpr] = []
        for expr in exprs:
            self.expr_list += expr.expr_list if isinstance(expr, SglExprList) else [expr]

    def variables(self) -> Iterator[str]:
        for expr in self.expr_list:
            yield from expr.variables()

    def __repr__(self) -> str:
        return f"ExprList({self.expr_list!r})"


class SglConstantText(SglExpr):
    def __init__(self, value: str) -> None:
        self.value = value

    def __repr__(self) -> str:
        return f"Constant({self.value!r})"


class SglGen(SglExpr):
    """A generation. `sampling` holds the parameters that it sets itself."""

    def __init__(self, name: str | None, sampling: dict[str, Any]) -> None:
        self.name = name
        self.sampling = sampling

    def variables(self) -> Iterator[str]:
        if self.name is not None:
            yield self.name

    def __repr__(self) -> str:
        return f"Gen({self.name!r})"


class SglSelect(SglExpr):
    """A choice between texts by their log-probabilities."""

    def __init__(
        self,
        name: str | None,
        choices: list[str],
        temperature: float,
        choices_method: ChoicesSamplingMethod,
    ) -> None:
        self.name = name
        self.choices = choices
        self.temperature = temperature
        self.choices_method = choices_method

    def variables(self) -> Iterator[str]:
        if self.name is not None:
            yield self.name

    def __repr__(self) -> str:
        return f"Select({self.name!r}, choices={self.choices!r})"


class SglRoleBegin(SglExpr):
    def __init__(self, role: str) -> None:
        self.role = role

    def __repr__(self) -> str:
        return f"RoleBegin({self.role})"


class SglRoleEnd(SglExpr):
    def __init__(self, role: str) -> None:
        self.role = role

    def __repr__(self) -> str:
        return f"RoleEnd({self.role})"


class SglVarScopeBegin(SglExpr):
    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return f"VarScopeBegin({self.name!r})"


class SglVarScopeEnd(SglExpr):
    def __init__(self, name: str) -> None:
        self.name = name

    def variables(self) -> Iterator[str]:
        yield self.name

    def __repr__(self) -> str:
        return f"VarScopeEnd({self.name!r})"


class SglConcateAndAppend(SglExpr):
    """What forks have appended since they were made, one after the other."""

    def __init__(self, states: list[ProgramState]) -> None:
        self.states = states

    def __repr__(self) -> str:
        return f"ConcatenateAndAppend({len(self.states)} forks)"


class SglCommitLazy(SglExpr):
    """The server shall compute the text so far: forks will share it."""

    def __repr__(self) -> str:
        return "CommitLazy()"


class SglSeparateReasoning(SglExpr):
    """A generation whose thoughts go to a variable of their own, not into the text."""

    def __init__(self, model_type: str, expr: SglGen) -> None:
        self.model_type = model_type
        self.expr = expr

    @property
    def reasoning_name(self) -> str:
        return f"{self.expr.name}{REASONING_SUFFIX}"

    def variables(self) -> Iterator[str]:
        yield from self.expr.variables()
        yield self.reasoning_name

    def __repr__(self) -> str:
        return f"SeparateReasoning({self.model_type!r}, {self.expr!r})"


class _Unknown(SglExpr):
    """A value that a trace does not know: it can be appended, but not looked into."""

    def _refuse(self, *_: object) -> Any:
        raise TracingError(
            f"{self!r} is not known while tracing: append it on its own, rather than format, "
            "compare or index it"
        )

    __bool__ = __len__ = __iter__ = __getitem__ = __contains__ = _refuse
    __str__ = __format__ = __int__ = __float__ = __index__ = _refuse
    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = _refuse
    __hash__ = object.__hash__


class SglArgument(_Unknown):
    """An argument of a traced program."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return f"Argument({self.name!r})"


class SglVariable(_Unknown):
    """A variable that a traced program reads. source: the id of the state that sets it."""

    def __init__(self, name: str, source: int) -> None:
        self.name = name
        self.source = source

    def __repr__(self) -> str:
        return f"Variable({self.name!r}, state={self.source})"
