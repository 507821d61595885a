"""From scores and grades to the probability that a response of some score is right."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from xbai.calibration import ScoreChance, log_odds
from xbai.errors import UserError
from xbai.measure.logistic import fit_logistic

PRIOR_PRECISION = 0.01
"""Of both coefficients, in the unit of one question: hardly anything, as chances are not to be drawn to the mean."""


def fit_chance(scores: Sequence[np.ndarray], correct: Sequence[np.ndarray]) -> ScoreChance:
    """Logistic regression of right on the log-odds of the score, each question counting as much as another.

    Log-odds are standardised; both coefficients have a normal prior there.

    Args:
        scores: per question [K] in [0, 1], not finite where there is none.
        correct: per question [K] in [0, 1], nan where not graded.

    Raises:
        UserError: all responses that have both are right, or all wrong, or there are none; or the higher the score,
            the less likely a response is right.
    """
    kept = [np.isfinite(score) & ~np.isnan(grade) for score, grade in zip(scores, correct, strict=True)]
    values = np.array([log_odds(score) for each, of in zip(scores, kept, strict=True) for score in each[of]])
    right = np.array([grade > 0.5 for each, of in zip(correct, kept, strict=True) for grade in each[of]], dtype=bool)
    weights = np.array([1 / of.sum() for of in kept for _ in range(of.sum())])
    if not right.any() or right.all():
        found = "all right" if right.any() else "all wrong" if len(right) else "none"
        raise UserError(f"responses with a grade and a score are {found}: no chance of being right can be learnt")
    scale = values.std() if np.ptp(values) else 1.0  # Where all are equal the slope stays 0.
    features = np.stack([(values - values.mean()) / scale, np.ones(len(values))], axis=1)
    coefficient, offset = fit_logistic(np.where(right[:, None], features, -features), weights, PRIOR_PRECISION)
    slope = float(coefficient / scale)
    if slope < 0:
        raise UserError(
            f"the higher a response's score, the less likely it is right (slope {slope:.3f}): a head that says so "
            "needs more training, or more graded questions"
        )
    return ScoreChance(slope, float(offset - slope * values.mean()))


def held_out_chances(scores: Sequence[np.ndarray], correct: Sequence[np.ndarray], folds: int) -> list[np.ndarray]:
    """Per question [K] the chances by a fit on the other folds; nan without a score, and where those teach nothing."""
    chances = [np.full(len(each), np.nan) for each in scores]
    for fold in range(folds):
        others = [number for number in range(len(scores)) if number % folds != fold]
        try:
            chance = fit_chance([scores[number] for number in others], [correct[number] for number in others])
        except UserError:
            continue
        for number in range(fold, len(scores), folds):
            chances[number] = np.array([chance(score) if np.isfinite(score) else np.nan for score in scores[number]])
    return chances
