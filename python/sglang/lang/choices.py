"""How `select` decides between texts, given the log-probabilities of their tokens."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

# (log-probability, token id, token text), as /generate reports tokens.
TokenLogprob = Sequence[Any]


@dataclass
class ChoicesDecision:
    """The chosen text, and what the method based it on; `get_meta_info` shows the latter."""

    decision: str
    meta_info: dict[str, Any] | None = None


class ChoicesSamplingMethod(ABC):
    """Picks one of several texts. All lists have one entry a choice, in order.

    normalized_prompt_logprobs: mean over the choice's tokens.
    input_token_logprobs: the choice's tokens, each with a log-probability.
    output_token_logprobs: what came after the choice; usually empty.
    unconditional_token_logprobs: the choice's tokens again, without what came before them; the
    first has None for its log-probability. Only if `requires_unconditional_logprobs`.
    """

    @property
    def requires_unconditional_logprobs(self) -> bool:
        return False

    @abstractmethod
    def __call__(
        self,
        *,
        choices: list[str],
        normalized_prompt_logprobs: list[float],
        input_token_logprobs: list[list[TokenLogprob]],
        output_token_logprobs: list[list[TokenLogprob]],
        unconditional_token_logprobs: list[list[TokenLogprob]] | None = None,
    ) -> ChoicesDecision: ...


class TokenLengthNormalized(ChoicesSamplingMethod):
    """The choice whose tokens have the highest mean log-probability."""

    def __call__(
        self,
        *,
        choices: list[str],
        normalized_prompt_logprobs: list[float],
        input_token_logprobs: list[list[TokenLogprob]],
        output_token_logprobs: list[list[TokenLogprob]],
        unconditional_token_logprobs: list[list[TokenLogprob]] | None = None,
    ) -> ChoicesDecision:
        return ChoicesDecision(
            choices[_index_of_max(normalized_prompt_logprobs)],
            {
                "normalized_prompt_logprobs": normalized_prompt_logprobs,
                "input_token_logprobs": input_token_logprobs,
                "output_token_logprobs": output_token_logprobs,
            },
        )


class GreedyTokenSelection(ChoicesSamplingMethod):
    """Token by token, only the choices with the likeliest token stay.

    A choice that has run out of tokens goes on with the mean of its own, so that it can be
    compared with a longer one which begins in the same way.
    """

    def __call__(
        self,
        *,
        choices: list[str],
        normalized_prompt_logprobs: list[float],
        input_token_logprobs: list[list[TokenLogprob]],
        output_token_logprobs: list[list[TokenLogprob]],
        unconditional_token_logprobs: list[list[TokenLogprob]] | None = None,
    ) -> ChoicesDecision:
        rows = [[float(token[0]) for token in tokens] for tokens in input_token_logprobs]
        width = max(map(len, rows))
        matrix = [
            row + [mean] * (width - len(row))
            for row, mean in zip(rows, normalized_prompt_logprobs, strict=True)
        ]
        left = list(range(len(choices)))
        for column in range(width):
            best = max(matrix[i][column] for i in left)
            left = [i for i in left if matrix[i][column] == best]
        return ChoicesDecision(
            choices[left[0]],
            {
                "normalized_prompt_logprobs": normalized_prompt_logprobs,
                "input_token_logprobs": input_token_logprobs,
                "output_token_logprobs": output_token_logprobs,
                "greedy_logprob_matrix": matrix,
            },
        )


class UnconditionalLikelihoodNormalized(ChoicesSamplingMethod):
    """The choice that the context makes most likelier, in the mean over its tokens, than it is
    without any context. A first token without context counts as certain."""

    @property
    def requires_unconditional_logprobs(self) -> bool:
        return True

    def __call__(
        self,
        *,
        choices: list[str],
        normalized_prompt_logprobs: list[float],
        input_token_logprobs: list[list[TokenLogprob]],
        output_token_logprobs: list[list[TokenLogprob]],
        unconditional_token_logprobs: list[list[TokenLogprob]] | None = None,
    ) -> ChoicesDecision:
        if unconditional_token_logprobs is None:
            raise ValueError("this method needs the log-probabilities without context")
        gains = [
            sum(given[0] - (alone[0] or 0.0) for given, alone in zip(tokens, without, strict=True))
            / len(tokens)
            for tokens, without in zip(
                input_token_logprobs, unconditional_token_logprobs, strict=True
            )
        ]
        return ChoicesDecision(
            choices[_index_of_max(gains)],
            {
                "normalized_prompt_logprobs": normalized_prompt_logprobs,
                "input_token_logprobs": input_token_logprobs,
                "output_token_logprobs": output_token_logprobs,
                "unconditional_token_logprobs": unconditional_token_logprobs,
                "normalized_unconditional_prompt_logprobs": gains,
            },
        )


def _index_of_max(values: Sequence[float]) -> int:
    """The first of the largest."""
    return values.index(max(values))


token_length_normalized = TokenLengthNormalized()
greedy_token_selection = GreedyTokenSelection()
unconditional_likelihood_normalized = UnconditionalLikelihoodNormalized()
