"""Majority vote: candidates that give the same answer vote together, each with weight 1 or with its score."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from xbai.search.best_of_n import best_candidate


def vote_winners(ballots: np.ndarray) -> np.ndarray:
    """Each answer's share of the win in each vote.

    Args:
        ballots: [votes, answers], how many (or what weight of) candidates gave each answer.

    Returns:
        [votes, answers] float64, rows summing to 1: the winners share alike; all answers where nobody voted.
    """
    winning = ballots >= ballots.max(axis=1, keepdims=True)
    return winning / winning.sum(axis=1, keepdims=True)


def voted_candidate(keys: Sequence[str | None], scores: Sequence[float | None], weighted: bool) -> int:
    """Index of the best-scored candidate among those that give the winning answer.

    Args:
        keys: what each candidate votes for (see `AnswerGroups`); None where it does not.
        scores: one each; None counts nothing in a weighted vote.
        weighted: a vote weighs its score instead of 1.
    """
    ballots: dict[str, float] = defaultdict(float)
    for key, score in zip(keys, scores, strict=True):
        if key is not None:
            ballots[key] += (score or 0.0) if weighted else 1.0
    winner = max(ballots, key=ballots.__getitem__, default=None)
    members = [i for i, key in enumerate(keys) if key == winner]
    return members[best_candidate([scores[i] for i in members])]
