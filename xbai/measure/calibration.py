"""How far a score can be read as a probability: of the responses scored 0.8, are 80 % right?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from xbai.measure.estimators import clustered_mean

BINS = 10


@dataclass(frozen=True)
class Bin:
    """The responses whose score lies in one interval.

    Attributes:
        low, high: the interval.
        count: how many.
        score: their mean score.
        accuracy, standard_error: the share of them that is right; its error is over questions (nan with one).
    """

    low: float
    high: float
    count: int
    score: float
    accuracy: float
    standard_error: float


def reliability(scores: np.ndarray, correct: np.ndarray, questions: np.ndarray, bins: int = BINS) -> list[Bin]:
    """The reliability curve: accuracy by score, in intervals of equal width; empty ones are left out.

    Args:
        scores: [responses] in [0, 1].
        correct: [responses] in [0, 1].
        questions: [responses] the question of each.
        bins: how many intervals.
    """
    bin_of = np.minimum((scores * bins).astype(int), bins - 1)
    curve = []
    for number in np.unique(bin_of):
        members = bin_of == number
        accuracy, error = clustered_mean(correct[members], questions[members])
        low, high = number / bins, (number + 1) / bins
        mean_score = float(scores[members].mean())
        curve.append(Bin(low, high, int(members.sum()), mean_score, float(accuracy), float(error)))
    return curve


def expected_calibration_error(curve: Sequence[Bin]) -> float:
    """Mean distance of score and accuracy over the bins, weighted by their counts (arXiv 1706.04599); nan for none."""
    total = sum(bin.count for bin in curve)
    return sum(bin.count * abs(bin.score - bin.accuracy) for bin in curve) / total if total else float("nan")
