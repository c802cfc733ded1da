"""ExpressionQueue: what is appended to a program state is done in order, on one thread.

The thread lives only while there is something to do, so none outlasts its work. Waiting for it is
bounded by the backend's own limits: whatever happens, an expression is done or has failed, and who
waits is woken.
"""

from __future__ import annotations

import contextvars
import threading
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from sglang.lang.errors import ProgramEnded
from sglang.lang.ir import SglExpr


class ExpressionQueue(ABC):
    """Queued expressions, the variables that they set, and what went wrong.

    The follower is the thread that started a streaming program: it reads the state while another
    thread, the runner, runs the program, so it waits for what the program has not appended yet.
    use_thread: False to do everything in `submit`.
    """

    def __init__(self, *, use_thread: bool, follower: int | None) -> None:
        self.use_thread = use_thread
        self.variables: dict[str, Any] = {}
        self.runner: int | None = None
        self._follower = follower
        self._changed = threading.Condition()
        self._listeners: list[Callable[[], None]] = []
        # Guarded by _changed.
        self._queue: deque[SglExpr] = deque()
        self._awaited: Counter[str] = Counter()  # how many queued expressions set a variable
        self._working = False
        self._ended = False
        self._error: BaseException | None = None
        self._error_raised = False

    @abstractmethod
    def _execute(self, expr: SglExpr) -> None:
        """Does one. Called on one thread at a time."""

    def submit(self, expr: SglExpr) -> None:
        """Queues it. Raises what an earlier expression failed with."""
        with self._changed:
            self._raise_if_failed()
            if self._ended:
                raise ProgramEnded(f"the program is over, {expr!r} comes too late")
            self._awaited.update(expr.variables())
            self._queue.append(expr)
            if self._working:
                return
            self._working = True
        if self.use_thread:
            self._start_worker()
        else:
            self._work()
            self.raise_if_failed()

    def _start_worker(self) -> None:
        context = contextvars.copy_context()
        worker = threading.Thread(
            target=context.run, args=(self._work,), name="sgl-state", daemon=True
        )
        try:
            worker.start()
        except RuntimeError as error:  # no more threads: nobody must wait for this one
            with self._changed:
                self._working = False
            self.fail(error)
            raise

    def sync(self) -> None:
        """Waits until everything appended is done; the follower waits for the whole program."""
        with self._changed:
            self._changed.wait_for(self._is_settled)

    def end(self) -> None:
        """Nothing more will be appended."""
        with self._changed:
            self._ended = True
        self._notify()

    def fail(self, error: BaseException) -> None:
        """What is queued is not done any more; readers shall have this error."""
        with self._changed:
            if self._error is None:
                self._error = error
        self._notify()

    def error(self) -> BaseException | None:
        """What this state failed with. Whoever asks has been told."""
        self.sync()
        self._error_raised = True
        return self._error

    def raise_if_failed(self) -> None:
        with self._changed:
            self._raise_if_failed()

    def has_var(self, name: str) -> bool:
        with self._changed:
            return name in self.variables or name in self._awaited

    def get_var(self, name: str) -> Any:
        """Waits for its value. KeyError if nothing sets it; raises what kept it from being set."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_decided(name))
            if self._awaited[name]:
                self._raise_if_failed()
                raise RuntimeError(
                    f"{name} is not known before its role ends: with num_api_spec_tokens one call "
                    "generates the whole role"
                )
            if name not in self.variables:
                self._raise_if_failed()
                raise KeyError(f"{name} (there are {', '.join(self.variables) or 'none'})")
            return self.variables[name]

    def set_var(self, name: str, value: Any) -> None:
        self.variables[name] = value
        self._notify()

    @contextmanager
    def listening(self, listener: Callable[[], None]) -> Iterator[None]:
        """Calls it, on any thread, whenever something has changed."""
        with self._changed:
            self._listeners.append(listener)
        try:
            yield
        finally:
            with self._changed:
                self._listeners.remove(listener)

    def wait_for(self, condition: Callable[[], bool]) -> None:
        with self._changed:
            self._changed.wait_for(condition)

    def is_over(self) -> bool:
        """Whether the text is complete, as far as a reader on this thread can wait for it."""
        complete = self._ended or self._follower is None or threading.get_ident() == self.runner
        return self._error is not None or (complete and not self._working)

    def is_pending(self, name: str) -> bool:
        """Whether the variable is still to be set, or growing."""
        return self._awaited[name] > 0 and self._error is None

    def is_unset(self, name: str) -> bool:
        """Whether the variable is not known, or not in full."""
        return self._awaited[name] > 0 or name not in self.variables

    def _is_settled(self) -> bool:
        follows = threading.get_ident() == self._follower
        return not self._working and (self._ended or not follows or self._error is not None)

    def _is_decided(self, name: str) -> bool:
        if self._awaited[name]:
            return not self._working
        return name in self.variables or self._is_settled()

    def _raise_if_failed(self) -> None:
        if self._error is not None:
            self._error_raised = True
            raise self._error

    def _notify(self) -> None:
        with self._changed:
            self._changed.notify_all()
            listeners = list(self._listeners)
        for listener in listeners:
            listener()

    def _work(self) -> None:
        """Does what is queued, then leaves."""
        while (expr := self._next()) is not None:
            try:
                self._execute(expr)
            except BaseException as error:  # whatever it is, those who wait must hear of it
                with self._changed:
                    self._error = error
            self._notify()

    def _next(self) -> SglExpr | None:
        with self._changed:
            if self._error is not None:
                self._queue.clear()
            if self._queue:
                return self._queue.popleft()
            self._working = False
        self._notify()
        return None

    def _set(self, name: str, value: Any) -> None:
        with self._changed:
            self.variables[name] = value
            self._awaited[name] -= 1
        self._notify()
