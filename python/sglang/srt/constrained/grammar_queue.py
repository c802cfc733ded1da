"""GrammarQueue: requests whose grammar is not compiled yet. They wait for it and nothing else:
neither do they hold memory, nor do dispatchers know of them."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from sglang.srt.constrained.compiler import GrammarCompiler, Outcome
from sglang.srt.constrained.constraint import Constraint
from sglang.srt.constrained.grammar import Grammar, GrammarError
from sglang.srt.requests import Request


class GrammarQueue:
    """compiler: None refuses every grammar; then `refusal` says why."""

    def __init__(self, compiler: GrammarCompiler | None, refusal: str = "") -> None:
        self.compiler = compiler
        self._refusal = refusal
        self._waiting: dict[Grammar, list[Request]] = {}
        # Since `add`, for `take`.
        self._known: list[tuple[Request, Outcome]] = []
        self.aborted = 0

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    @property
    def bell(self) -> int | None:
        """A file descriptor that is readable when `take` has something to give."""
        return None if self.compiler is None else self.compiler.fileno()

    def state(self) -> dict[str, Any]:
        """For /server_info."""
        counts = {} if self.compiler is None else asdict(self.compiler.counts)
        return {"waiting": len(self), "aborted": self.aborted, **counts}

    def add(self, request: Request) -> None:
        """The request has a grammar, and waits until `take`, which follows at once, or a later one
        gives it back."""
        grammar = request.grammar
        assert grammar is not None, f"{request.rid} has no grammar"
        outcome: Outcome | None
        if self.compiler is None:
            outcome = GrammarError(self._refusal)
        else:
            outcome = self.compiler.ask(grammar)
        if outcome is None:
            self._waiting.setdefault(grammar, []).append(request)
        else:
            self._known.append((request, outcome))

    def take(self) -> list[tuple[Request, Constraint | GrammarError]]:
        """Who does not wait any more, and what came of it."""
        if self.compiler is not None and self.compiler.busy:
            for grammar, outcome in self.compiler.poll().items():
                waited = self._waiting.pop(grammar, [])
                self._known += [(request, outcome) for request in waited]
        known, self._known = self._known, []
        return [(request, self._constraint(request, outcome)) for request, outcome in known]

    def forget(self, request: Request) -> bool:
        """The request has ended; False if it does not wait here."""
        grammar = request.grammar
        waiting = self._waiting.get(grammar, []) if grammar is not None else []
        if request not in waiting:
            return False
        assert grammar is not None and self.compiler is not None
        waiting.remove(request)
        self.aborted += 1
        if not waiting:
            del self._waiting[grammar]
            self.compiler.forget(grammar)
        return True

    def _constraint(self, request: Request, outcome: Outcome) -> Constraint | GrammarError:
        grammar = request.grammar
        assert grammar is not None
        if isinstance(outcome, GrammarError):
            return type(outcome)(f"sampling_params.{grammar.kind}: {outcome}")
        assert self.compiler is not None
        return Constraint(grammar, outcome, self.compiler.backend, request.sampling)
