"""How the step scores of a response go on from its beginning to its end, on average."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from xbai.measure.estimators import clustered_mean
from xbai.measure.graded import GradedQuestion

POINTS = 21


@dataclass(frozen=True)
class StepCurve:
    """Mean step score against the position in the response, from 0.0 (first step) to 1.0 (last step).

    Attributes:
        position, mean, standard_error: [points]; the error is over questions (nan with one).
        responses: how many were averaged.
    """

    position: np.ndarray
    mean: np.ndarray
    standard_error: np.ndarray
    responses: int


def step_curve(questions: Sequence[GradedQuestion], right: bool, points: int = POINTS) -> StepCurve | None:
    """The curve of the right, or of the wrong, responses that have steps; None where there are none.

    Each response is stretched to the same length, so that long ones weigh no more than short ones.
    """
    position = np.linspace(0.0, 1.0, points)
    chosen = [
        (resample(steps, position), number)
        for number, question in enumerate(questions)
        for steps, correct in zip(question.step_scores, question.correct, strict=True)
        if steps and not np.isnan(correct) and (correct > 0.5) == right
    ]
    if not chosen:
        return None
    rows, numbers = zip(*chosen, strict=True)
    mean, error = clustered_mean(np.stack(rows), np.array(numbers))
    return StepCurve(position, mean, error, len(rows))


def resample(steps: Sequence[float], position: np.ndarray) -> np.ndarray:
    """Scores at the positions in [0, 1], on straight lines between the steps; a single step is everywhere."""
    return np.interp(position, np.linspace(0.0, 1.0, len(steps)) if len(steps) > 1 else [0.0], steps)
