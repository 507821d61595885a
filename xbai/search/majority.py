"""Majority vote: candidates that give the same answer vote together, each with weight 1 or with its score."""

from __future__ import annotations

import numpy as np

from xbai.grading.boxed import after_thinking, last_boxed
from xbai.grading.choice import chosen_option
from xbai.grading.latex import clean, compact

MAX_ANSWER_CHARACTERS = 1000


def vote_key(response: str) -> str | None:
    """The answer a response votes for: its last box in normal form, or its chosen option; None where it has neither."""
    answer = last_boxed(after_thinking(response))
    if answer is None:
        return chosen_option(response)
    answer = answer.strip()
    return compact(clean(answer)) if 0 < len(answer) <= MAX_ANSWER_CHARACTERS else None


def vote_winners(ballots: np.ndarray) -> np.ndarray:
    """Each answer's share of the win in each vote.

    Args:
        ballots: [votes, answers], how many (or what weight of) candidates gave each answer.

    Returns:
        [votes, answers] float64, rows summing to 1: the winners share alike; all answers where nobody voted.
    """
    winning = ballots >= ballots.max(axis=1, keepdims=True)
    return winning / winning.sum(axis=1, keepdims=True)
