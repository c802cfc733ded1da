"""Which reported tokens belong to a choice, where tokens may merge across the prompt's end.

Prompt and choice are tokenised together. Mostly the prompt keeps its tokens:

    prompt alone     [ p0 p1 .. pk ]
    with the choice  [ p0 p1 .. pk | c0 c1 ]     scored: c0 c1

but the prompt's last token and the choice's beginning may become one, a healed token, which then
belongs to what is scored:

    with the choice  [ p0 p1 .. | h c1 ]         scored: h c1
"""

from __future__ import annotations

from sglang.lang.choices import TokenLogprob
from sglang.lang.errors import BackendError

# The server reports no log-probability for the first token of its list, so the list begins one
# token before the prompt's last.
TOKENS_BEFORE_CHOICE = 2


def logprob_start(prompt_tokens: int) -> int:
    """From which position log-probabilities are asked for."""
    return max(prompt_tokens - TOKENS_BEFORE_CHOICE, 0)


def scored_tokens(
    reported: list[TokenLogprob], prompt: str, prompt_tokens: int, choice: str
) -> list[TokenLogprob]:
    """The choice's tokens among those reported from `logprob_start(prompt_tokens)` on.

    BackendError if none of them has a log-probability.
    """
    own = prompt_tokens - logprob_start(prompt_tokens)
    if 0 < own <= len(reported) and not prompt.endswith(reported[own - 1][2] or ""):
        own -= 1
    scored = [token for token in reported[own:] if token[0] is not None]
    if not scored:
        raise BackendError(
            f"select: {choice!r} has no token of its own after the prompt, so its probability is "
            "not known; end the prompt, or begin the choice, at a word's boundary"
        )
    return scored


def mean_logprob(tokens: list[TokenLogprob]) -> float:
    return float(sum(token[0] for token in tokens)) / len(tokens)
