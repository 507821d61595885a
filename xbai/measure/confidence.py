"""How sure a model was of stretches of a response, by the log-probs of its steps.

After DeepConf (arXiv 2508.15260), whose token confidence takes the most likely tokens' log-probs; here a
token's is that of the token which was sampled, and stretches begin and end where steps do. Throughout, `step_log_probs`
[K + 1] are sums of log-probs: of each of K steps, and of what follows the last one; `step_ends` [K] are the numbers of
tokens up to and including each step's last, ascending; `tokens` is the length of the response.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

WINDOW_TOKENS = 64
"""Fewest tokens of a stretch: some steps."""


def lowest_window(
    step_log_probs: Sequence[float], step_ends: Sequence[int], tokens: int, window: int = WINDOW_TOKENS
) -> float:
    """Mean log-prob of the tokens of the least sure window; -inf for a response without a token.

    A window begins with a step and goes on to the end of the first one that makes it `window` tokens or more; a
    shorter response is one window.
    """
    sums, borders = _cumulative(step_log_probs, step_ends, tokens)
    ends = np.searchsorted(borders, borders + window)
    begins = np.flatnonzero(ends < len(borders))
    if not len(begins):
        return _mean(sums[-1], tokens)
    ends = ends[begins]
    return float(((sums[ends] - sums[begins]) / (borders[ends] - borders[begins])).min())


def tail(step_log_probs: Sequence[float], step_ends: Sequence[int], tokens: int, window: int = WINDOW_TOKENS) -> float:
    """Mean log-prob of the tokens of the last steps: as few as have `window` tokens or more; of all if none have.

    -inf for a response without a token.
    """
    sums, borders = _cumulative(step_log_probs, step_ends, tokens)
    begin = max(int(np.searchsorted(borders, tokens - window, side="right")) - 1, 0)
    return _mean(sums[-1] - sums[begin], tokens - int(borders[begin]))


def running_log_probs(step_log_probs: Sequence[float], step_ends: Sequence[int]) -> list[float]:
    """[K] mean log-prob of all tokens up to each step's end."""
    means: list[float] = (np.cumsum(step_log_probs[:-1]) / np.asarray(step_ends)).tolist()
    return means


def _cumulative(
    step_log_probs: Sequence[float], step_ends: Sequence[int], tokens: int
) -> tuple[np.ndarray, np.ndarray]:
    """[K + 2] log-probs, and numbers of tokens, before each step, before what follows the last one, and in all."""
    return np.cumsum([0.0, *step_log_probs]), np.array([0, *step_ends, tokens])


def _mean(log_probs: float, tokens: int) -> float:
    return float(log_probs / tokens) if tokens else -np.inf
