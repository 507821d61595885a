"""What a value of each response is worth: how well it tells right from wrong, and how far it is a probability.

A score is one where of the responses scored 0.8, 80 % are right.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from xbai.auc import roc_auc
from xbai.measure.estimators import Estimate, clustered_mean

BINS = 10


@dataclass(frozen=True)
class Separation:
    """Areas under the ROC curve: the chance that a right response has a higher value than a wrong one.

    Attributes:
        within_prompt_auc: of responses to the same question, the mean over the questions that have right and wrong
            ones (nan where none has). It is what choosing among candidates needs.
        auc: of any two responses: also high where the value only tells easy questions from hard ones.
    """

    within_prompt_auc: Estimate
    auc: float


def separation(values: Sequence[np.ndarray], correct: Sequence[np.ndarray]) -> Separation:
    """Of the responses that have a value and a grade.

    Args:
        values: per question [K], not finite where there is none.
        correct: per question [K] in [0, 1], nan where not graded.
    """
    known = [np.isfinite(value) & ~np.isnan(grade) for value, grade in zip(values, correct, strict=True)]
    kept = [(value[of], grade[of]) for value, grade, of in zip(values, correct, known, strict=True)]
    within = np.array([roc_auc(value, grade) for value, grade in kept])
    return Separation(Estimate.over(within[~np.isnan(within)]), roc_auc(*map(np.concatenate, zip(*kept, strict=True))))


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


def reliability(scores: np.ndarray, correct: np.ndarray, questions: np.ndarray) -> list[Bin]:
    """The reliability curve: accuracy by score, in intervals of equal width; empty ones are left out.

    Args:
        scores: [responses] in [0, 1].
        correct: [responses] in [0, 1].
        questions: [responses] the question of each.
    """
    bin_of = np.minimum((scores * BINS).astype(int), BINS - 1)
    curve = []
    for number in np.unique(bin_of):
        members = bin_of == number
        accuracy, error = clustered_mean(correct[members], questions[members])
        low, high = number / BINS, (number + 1) / BINS
        mean_score = float(scores[members].mean())
        curve.append(Bin(low, high, int(members.sum()), mean_score, float(accuracy), float(error)))
    return curve


def expected_calibration_error(curve: Sequence[Bin]) -> float:
    """Mean distance of score and accuracy over the bins, weighted by their counts (arXiv 1706.04599); nan for none."""
    total = sum(bin.count for bin in curve)
    return sum(bin.count * abs(bin.score - bin.accuracy) for bin in curve) / total if total else float("nan")
