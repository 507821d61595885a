"""Which of N whole responses to give: by their scores, or by the votes of those that say the same."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

import numpy as np


def sortable_scores(scores: list[float | None]) -> np.ndarray:
    """Scores [n] as float64; a candidate without a score comes last, as -inf."""
    return np.array([-math.inf if score is None else score for score in scores], dtype=np.float64)


def best_candidate(scores: list[float | None]) -> int:
    """Index of the highest score, the first of equals."""
    return int(np.argmax(sortable_scores(scores)))


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
