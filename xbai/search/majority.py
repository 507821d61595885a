"""Majority vote: candidates that give the same answer vote together, each with weight 1 or with its score."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from xbai.grading.boxed import after_thinking, last_boxed
from xbai.grading.choice import chosen_option
from xbai.grading.latex import clean, compact
from xbai.search.best_of_n import best_candidate

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


def voted_candidate(responses: Sequence[str], scores: Sequence[float | None], weighted: bool) -> int:
    """Index of the best-scored candidate among those that give the winning answer.

    Args:
        responses: the candidates.
        scores: one each; None counts nothing in a weighted vote.
        weighted: a vote weighs its score instead of 1.
    """
    ballots: dict[str, float] = defaultdict(float)
    keys = [vote_key(response) for response in responses]
    for key, score in zip(keys, scores, strict=True):
        if key is not None:
            ballots[key] += (score or 0.0) if weighted else 1.0
    winner = max(ballots, key=ballots.__getitem__, default=None)
    members = [i for i, key in enumerate(keys) if key == winner]
    return members[best_candidate([scores[i] for i in members])]
