"""Which way of choosing is right on questions with short responses, and which on questions with long ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from xbai.measure.estimators import Estimate
from xbai.measure.graded import GradedQuestion
from xbai.measure.length_bands import CHOICE_N
from xbai.measure.strategies import Accuracies

QUARTERS = 4


@dataclass(frozen=True)
class LengthQuarter:
    """Questions of one quarter by length, which is the mean number of tokens of a question's candidates.

    Attributes:
        low, high: least and greatest length.
        questions: how many.
        n: among how many candidates is chosen.
        accuracies: of each strategy, over these questions.
    """

    low: float
    high: float
    questions: int
    n: int
    accuracies: dict[str, Estimate]


def length_quarters(questions: Sequence[GradedQuestion], found: Accuracies) -> list[LengthQuarter]:
    """Quarters, shortest first: fewer where many questions are of one length, none where no length is known.

    Questions are put into quarters, not responses, since a choice is among all responses to a question. Those without a
    candidate whose tokens are known are in none.

    Args:
        questions: those that count.
        found: their accuracies; Best-of-8 is taken, or that of the most candidates below.
    """
    lengths = np.array([_mean_tokens(question) for question in questions])
    known = lengths[~np.isnan(lengths)]
    if not len(known):
        return []
    edges = np.quantile(known, np.arange(1, QUARTERS) / QUARTERS)
    quarter_of = np.where(np.isnan(lengths), -1, np.searchsorted(edges, lengths))
    return [_quarter(lengths, quarter_of == number, found) for number in np.unique(quarter_of[quarter_of >= 0])]


def _quarter(lengths: np.ndarray, here: np.ndarray, found: Accuracies) -> LengthQuarter:
    n = max(count for count in found["random"] if count <= CHOICE_N)
    return LengthQuarter(
        low=float(lengths[here].min()),
        high=float(lengths[here].max()),
        questions=int(here.sum()),
        n=n,
        accuracies={name: Estimate.over(by_count[n][here]) for name, by_count in found.items()},
    )


def _mean_tokens(question: GradedQuestion) -> float:
    known = question.tokens[np.isfinite(question.tokens)]
    return float(known.mean()) if len(known) else float("nan")
