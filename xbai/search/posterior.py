"""Sampling until one answer is probable enough."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from xbai.search.choice import best_candidate
from xbai.search.rule import Candidate, Stopping

LEAST_CHANCE = 1e-6
"""Chances are kept so far from 0 and 1: no single candidate rules an answer out."""


@dataclass(frozen=True)
class Posterior(Stopping):
    """Goes on until the posterior of the leading answer is above the threshold.

    Candidates are taken for independent witnesses, each right with its own calibrated chance p, and one answer at most
    for right: the odds of an answer are then the product of p / (1 - p) over those that give it, against 1 for none of
    the answers (compare CGES, arXiv 2511.02603).
    """

    name = "posterior"
    needs_chance = True
    needs_answers = True

    def certainty(self, ended: Sequence[Candidate]) -> float:
        """See `Rule`."""
        return max(posterior(ended).values(), default=0.0)

    def choose(self, ended: Sequence[Candidate]) -> int:
        """The best-scored candidate that gives the leading answer."""
        beliefs = posterior(ended)
        leading = max(beliefs, key=beliefs.__getitem__, default=None)
        members = [number for number, candidate in enumerate(ended) if candidate.answer == leading]
        return members[best_candidate([ended[number].score for number in members])]


def posterior(ended: Sequence[Candidate]) -> dict[str, float]:
    """The probability of each answer; what is missing to 1 is that of none."""
    log_odds: defaultdict[str, float] = defaultdict(float)
    for candidate in ended:
        if candidate.answer is not None and candidate.chance is not None:
            chance = min(max(candidate.chance, LEAST_CHANCE), 1 - LEAST_CHANCE)
            log_odds[candidate.answer] += math.log(chance) - math.log1p(-chance)
    # That of no answer is 0.
    highest = max([0.0, *log_odds.values()])
    weights = {answer: math.exp(odds - highest) for answer, odds in log_odds.items()}
    total = sum(weights.values()) + math.exp(-highest)
    return {answer: weight / total for answer, weight in weights.items()}
