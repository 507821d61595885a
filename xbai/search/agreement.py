"""Sampling until the majority will not change any more."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import comb

from xbai.search.choice import voted_candidate
from xbai.search.rule import Candidate, Stopping


@dataclass(frozen=True)
class Agreement(Stopping):
    """Goes on until the leading answer's lead is sure enough; needs no score.

    Adaptive consistency (arXiv 2305.11860, the Beta criterion): with v and w votes for the first and the second answer
    and a uniform prior, the probability that the first is the more frequent one is that of Beta(v + 1, w + 1) above a
    half.
    """

    name = "majority"
    needs_answers = True

    def certainty(self, ended: Sequence[Candidate]) -> float:
        """See `Rule`."""
        votes = Counter(candidate.answer for candidate in ended if candidate.answer is not None)
        first, second, *_ = [*sorted(votes.values(), reverse=True), 0, 0]
        return lead_is_right(first, second)

    def choose(self, ended: Sequence[Candidate]) -> int:
        """The best-scored candidate that gives the answer of the most."""
        return voted_candidate([each.answer for each in ended], [each.score for each in ended], weighted=False)


def lead_is_right(first: int, second: int) -> float:
    """P(Beta(first + 1, second + 1) > 1/2): that of `first + second + 1` fair coins at most `first` show heads."""
    coins = first + second + 1
    return sum(comb(coins, heads) for heads in range(first + 1)) / 2**coins
