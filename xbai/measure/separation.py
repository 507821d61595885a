"""How well a value of each response tells right from wrong: among the responses to one question, and over all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from xbai.auc import roc_auc
from xbai.measure.estimate import Estimate


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
