"""StreamExecutor: carries out what is appended to one program state."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from sglang.lang.api_speculation import ApiSpeculation, speculation_for
from sglang.lang.backend.base_backend import BaseBackend, MetaInfo
from sglang.lang.chat_format import ChatTemplate, Message
from sglang.lang.expression_queue import ExpressionQueue
from sglang.lang.ir import (
    SglCommitLazy,
    SglConcateAndAppend,
    SglConstantText,
    SglExpr,
    SglExprList,
    SglGen,
    SglRoleBegin,
    SglRoleEnd,
    SglSelect,
    SglSeparateReasoning,
    SglVarScopeBegin,
    SglVarScopeEnd,
)
from sglang.lang.reasoning import ReasoningSplitter, reasoning_format
from sglang.lang.sampling_params import SglSamplingParams
from sglang.lang.transcript import Transcript


class StreamExecutor(ExpressionQueue):
    """One state: a transcript, and variables that generations set.

    defaults: sampling parameters that a generation does not set. stream: generations grow piece by
    piece. use_thread, follower: as of the queue.
    """

    def __init__(
        self,
        backend: BaseBackend,
        defaults: SglSamplingParams,
        *,
        stream: bool = False,
        num_api_spec_tokens: int | None = None,
        use_thread: bool = True,
        follower: int | None = None,
    ) -> None:
        super().__init__(use_thread=use_thread, follower=follower)
        self.backend = backend
        self.defaults = defaults
        self.stream = stream
        self.num_api_spec_tokens = num_api_spec_tokens
        self.chat_template: ChatTemplate = backend.get_chat_template()
        self.transcript = Transcript(self.chat_template)
        self.meta_info: dict[str, MetaInfo | list[MetaInfo] | None] = {}
        self.fork_start = 0
        self._scope_starts: dict[str, int] = {}
        self._speculation: ApiSpeculation | None = speculation_for(backend, num_api_spec_tokens)
        self._forks: list[StreamExecutor] = []

    @property
    def text_(self) -> str:
        return self.transcript.text

    @property
    def messages_(self) -> list[Message]:
        """The finished messages."""
        return self.transcript.messages

    def end(self) -> None:
        """Nothing more will be appended, neither here nor to its forks."""
        for fork in self._forks:
            fork.end()
        super().end()

    def fail(self, error: BaseException) -> None:
        """The program itself raised this: nothing more is started, and readers shall have it."""
        for fork in self._forks:
            fork.fail(error)
        super().fail(error)

    def settle(self) -> None:
        """Waits until all is done, here and in its forks. Raises a failure nobody has seen yet."""
        self.sync()
        if not self._error_raised:
            self.raise_if_failed()
        for fork in self._forks:
            fork.settle()

    def finished_text(self) -> str:
        """The text once everything appended is done."""
        self.sync()
        self.raise_if_failed()
        return self.text_

    def finished_messages(self) -> list[Message]:
        self.sync()
        self.raise_if_failed()
        return self.messages_

    def get_meta_info(self, name: str) -> Any:
        self.get_var(name)
        return self.meta_info.get(name)

    def fork(self, size: int) -> list[StreamExecutor]:
        """States that go on by themselves from here. Several share the text's keys and values."""
        if size > 1:
            self.submit(SglCommitLazy())
        self.sync()
        self.raise_if_failed()
        forks = [
            StreamExecutor(
                self.backend,
                self.defaults,
                stream=self.stream,
                num_api_spec_tokens=self.num_api_spec_tokens,
                use_thread=self.use_thread,
            )
            for _ in range(size)
        ]
        for fork in forks:
            fork.transcript = self.transcript.copy()
            fork.variables = dict(self.variables)
            fork.meta_info = dict(self.meta_info)
            fork.fork_start = len(self.text_)
        self._forks += forks
        return forks

    def gather(self, forks: Iterable[StreamExecutor]) -> None:
        """Each variable that only forks have becomes a list here, of their values in order."""
        own = set(self.variables)
        for fork in forks:
            fork.sync()
            fork.raise_if_failed()
            for name, value in fork.variables.items():
                if name not in own:
                    self.variables.setdefault(name, []).append(value)

    def forget(self, forks: Iterable[StreamExecutor]) -> None:
        """These have been joined: what becomes of them is known."""
        joined = set(forks)
        self._forks = [fork for fork in self._forks if fork not in joined]

    def _execute(self, expr: SglExpr) -> None:
        match expr:
            case SglExprList():
                for part in expr.expr_list:
                    self._execute(part)
            case SglConstantText():
                self._fill(expr.value)
            case SglGen():
                self._generate(expr)
            case SglSeparateReasoning():
                self._generate_with_reasoning(expr)
            case SglSelect():
                self._select(expr)
            case SglRoleBegin():
                self.transcript.begin_role(expr.role)
            case SglRoleEnd():
                self._end_role(expr.role)
            case SglVarScopeBegin():
                self._scope_starts[expr.name] = len(self.text_)
            case SglVarScopeEnd():
                self._set(expr.name, self.text_[self._scope_starts.pop(expr.name) :])
            case SglCommitLazy():
                if self.text_:
                    self.backend.commit_lazy_operations(self)
            case SglConcateAndAppend():
                for state in expr.states:
                    fork = state.stream_executor
                    self._fill(fork.finished_text()[fork.fork_start :])
            case _:
                raise TypeError(f"{expr!r} cannot be appended to a running program")

    def _fill(self, text: str) -> None:
        if self._speculation is None or not self._speculation.fill(self, text):
            self.transcript.append(text)
        self._notify()

    def _end_role(self, role: str) -> None:
        if self._speculation is not None:
            for name, text, meta_info in self._speculation.end_role(self):
                if name is None:
                    self.transcript.append(text)
                else:
                    self._set_generated(name, text, meta_info)
        self.transcript.end_role(role)

    def _generate(self, expr: SglGen) -> None:
        params = self.params_of(expr)
        if self._speculation is not None:
            outcome = self._speculation.generate(self, expr.name, params)
            if outcome is not None:
                self._set_generated(expr.name, *outcome)
        elif self.stream:
            self._generate_in_pieces(expr.name, params)
        else:
            self._set_generated(expr.name, *self.backend.generate(self, params))

    def params_of(self, expr: SglGen) -> SglSamplingParams:
        """What it sets itself over the program's defaults, and the template's own ends."""
        params = self.defaults.overridden(expr.sampling)
        return params.also_stopping_at(self.chat_template.stop_str)

    def _generate_in_pieces(self, name: str | None, params: SglSamplingParams) -> None:
        text = ""
        for piece in self._pieces(params, name):
            text += piece
            self.transcript.append(piece)
            if name is not None:
                self.variables[name] = text
            self._notify()
        if name is not None:
            self._set(name, text)

    def _pieces(self, params: SglSamplingParams, name: str | None) -> Iterator[str]:
        if params.n > 1:
            raise ValueError(f"n: a streamed program has one answer to each gen, got n={params.n}")
        # A second generation of the same name starts anew.
        if name is not None:
            self.variables[name] = ""
        for piece, meta_info in self.backend.generate_stream(self, params):
            if name is not None:
                self.meta_info[name] = meta_info
            yield piece

    def _generate_with_reasoning(self, expr: SglSeparateReasoning) -> None:
        if self._speculation is not None:
            raise ValueError("separate_reasoning: does not go with num_api_spec_tokens")
        params, name = self.params_of(expr.expr), expr.expr.name
        splitter = ReasoningSplitter(reasoning_format(expr.model_type))
        before = self.text_
        if self.stream:
            for piece in self._pieces(params, name):
                splitter.feed(piece)
                self._show_split(expr, splitter, before)
        else:
            text, meta_info = self.backend.generate(self, params)
            if isinstance(text, list):
                raise ValueError(f"separate_reasoning: takes one answer, got n={params.n}")
            self.meta_info[str(name)] = meta_info
            splitter.feed(text)
        splitter.finish()
        self._show_split(expr, splitter, before)
        self._set(str(name), splitter.answer)
        self._set(expr.reasoning_name, splitter.reasoning)

    def _show_split(
        self, expr: SglSeparateReasoning, splitter: ReasoningSplitter, before: str
    ) -> None:
        self.transcript.text = before + splitter.answer
        self.variables[str(expr.expr.name)] = splitter.answer
        self.variables[expr.reasoning_name] = splitter.reasoning
        self._notify()

    def _select(self, expr: SglSelect) -> None:
        if self._speculation is not None:
            self._speculation.refuse_select()
        decision = self.backend.select(self, expr.choices, expr.temperature, expr.choices_method)
        self.transcript.append(decision.decision)
        if expr.name is not None:
            self.meta_info[expr.name] = decision.meta_info
            self._set(expr.name, decision.decision)

    def _set_generated(
        self,
        name: str | None,
        text: str | list[str],
        meta_info: MetaInfo | list[MetaInfo],
    ) -> None:
        """Of several answers the first one goes on in the text."""
        self.transcript.append(text if isinstance(text, str) else text[0])
        if name is not None:
            self.meta_info[name] = meta_info
            self._set(name, text)
