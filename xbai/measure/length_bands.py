"""Whether a score judges long responses as well as short ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from xbai.measure.estimators import Estimate, expected_best_of_n
from xbai.measure.graded import GradedQuestion
from xbai.measure.separation import separation

BANDS = 3
CHOICE_N = 8


@dataclass(frozen=True)
class LengthBand:
    """The graded responses of the shortest, the middle, or the longest third, as far as their tokens are known.

    Attributes:
        low, high: fewest and most tokens.
        share: of all graded responses.
        accuracy: of the responses.
        chosen: share of the choices of Best-of-8 (of as many as there are, where fewer) that lie here.
        within_prompt_auc: of the score, among the responses of this length.
    """

    low: int
    high: int
    share: float
    accuracy: float
    chosen: float
    within_prompt_auc: Estimate


def length_bands(questions: Sequence[GradedQuestion]) -> list[LengthBand]:
    """Thirds by number of tokens, shortest first; none where numbers of tokens or all scores are unknown."""
    graded = [question for question in map(GradedQuestion.graded, questions) if len(question.correct)]
    tokens = np.concatenate([question.tokens for question in graded]) if graded else np.empty(0)
    known = tokens[np.isfinite(tokens)]
    if not len(known) or not any(np.isfinite(question.scores).any() for question in graded):
        return []
    edges = [*np.quantile(known, np.arange(1, BANDS) / BANDS), known.max()]
    band_of = [np.searchsorted(edges, question.tokens) for question in graded]
    return [_band(graded, [of == number for of in band_of]) for number in np.unique(np.searchsorted(edges, known))]


def _band(graded: Sequence[GradedQuestion], members: Sequence[np.ndarray]) -> LengthBand:
    here = [question.only(of) for question, of in zip(graded, members, strict=True)]
    tokens = np.concatenate([question.tokens for question in here])
    chosen = [
        expected_best_of_n(question.scores, of.astype(float), min(CHOICE_N, len(of)))
        for question, of in zip(graded, members, strict=True)
    ]
    correct = [question.correct for question in here]
    return LengthBand(
        low=int(tokens.min()),
        high=int(tokens.max()),
        share=len(tokens) / sum(map(len, members)),
        accuracy=float(np.concatenate(correct).mean()),
        chosen=float(np.mean(chosen)),
        within_prompt_auc=separation([question.scores for question in here], correct).within_prompt_auc,
    )
