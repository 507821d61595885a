"""What a way of choosing among N candidates achieves on one question, estimated from all K sampled ones; and means.

Everything here is a pure function of matrices. Best-of-N and oracle are exact expectations over all subsets of size N;
votes are averaged over the subsets they are given, all of them where those are few (see `subset_masks`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations
from math import comb

import numpy as np

from xbai.search.choice import vote_winners

MAX_SUBSETS = 2048
VOTE_DECIMALS = 12


@dataclass(frozen=True)
class Estimate:
    """A mean over questions and its standard error (nan with one question)."""

    mean: float
    standard_error: float

    @classmethod
    def over(cls, values: Sequence[float] | np.ndarray) -> Estimate:
        """The mean of one value a question; nan of none."""
        array = np.asarray(values, dtype=np.float64)
        if not len(array):
            return cls(float("nan"), float("nan"))
        error = array.std(ddof=1) / np.sqrt(len(array)) if len(array) > 1 else np.nan
        return cls(float(array.mean()), float(error))


def expected_best_of_n(scores: np.ndarray, correct: np.ndarray, n: int) -> float:
    """Probability that the highest-scored of n candidates, drawn without replacement, is right.

    Args:
        scores: [K]; of equal scores each is picked equally often.
        correct: [K] in [0, 1].
        n: from 1 to K.
    """
    _, level_of, members = np.unique(-scores, return_inverse=True, return_counts=True)
    first_rank = np.cumsum(members) - members
    picked = np.add.reduceat(rank_shares(len(scores), n), first_rank)
    return float(picked @ (np.bincount(level_of, correct) / members))


@lru_cache(maxsize=64)
def rank_shares(samples: int, n: int) -> np.ndarray:
    """Probability [samples] that the candidate of each rank, the best first, is the best of n drawn ones."""
    shares = np.array([comb(samples - 1 - rank, n - 1) / comb(samples, n) for rank in range(samples)])
    shares.setflags(write=False)
    return shares


def expected_oracle(correct: np.ndarray, n: int) -> float:
    """Probability that at least one of n candidates, drawn without replacement, is right (pass@n, arXiv 2107.03374)."""
    wrong = int((correct < 0.5).sum())
    return 1.0 - comb(wrong, n) / comb(len(correct), n)


def expected_vote(
    votes: np.ndarray, correct: np.ndarray, subsets: np.ndarray, weights: np.ndarray | None = None
) -> float:
    """Probability that the answer with most votes is right, averaged over subsets of the candidates.

    Args:
        votes: [K, answers] bool, the answer each candidate votes for; a row of False abstains.
        correct: [K] in [0, 1].
        subsets: [subsets, K] 1.0 where the candidate is drawn.
        weights: [K] weight of each vote, 1 where not given.
    """
    if not votes.any():
        return float(correct.mean())
    rightness = (votes * correct[:, None]).sum(0) / votes.sum(0)
    # Equal sums that were added in another order differ in their last bits, and would not share the win.
    counted = np.round(subsets @ (votes if weights is None else votes * weights[:, None]), VOTE_DECIMALS)
    chosen = vote_winners(counted) @ rightness
    # A subset in which nobody votes leaves a random pick among its candidates.
    silent = ~counted.any(axis=1)
    chosen[silent] = subsets[silent] @ correct / subsets[silent].sum(axis=1)
    return float(chosen.mean())


def votes_for(keys: Sequence[str | None]) -> np.ndarray:
    """[K, answers] bool: which answer each candidate votes for; None abstains."""
    answers = sorted({key for key in keys if key is not None})
    votes = [[key == answer for answer in answers] for key in keys]
    return np.array(votes, dtype=bool).reshape(len(keys), len(answers))


@lru_cache(maxsize=16)
def subset_masks(samples: int, n: int) -> np.ndarray:
    """Subsets of n among `samples` candidates: all of them where those are at most `MAX_SUBSETS`, else random ones.

    Returns:
        [subsets, samples] 1.0 where the candidate is drawn; the same for the same arguments.
    """
    if comb(samples, n) <= MAX_SUBSETS:
        members = np.array(list(combinations(range(samples), n)))
    else:
        noise = np.random.default_rng((0, samples, n)).random((MAX_SUBSETS, samples))
        members = noise.argpartition(n, axis=1)[:, :n]
    masks = np.zeros((len(members), samples))
    np.put_along_axis(masks, members, 1.0, axis=1)
    masks.setflags(write=False)
    return masks


def best_of_n_groups(scores: np.ndarray, correct: np.ndarray, n: int) -> np.ndarray:
    """Whether the pick of each disjoint group of n candidates, in the order they were sampled, is right.

    Args:
        scores: [K].
        correct: [K], nan where not graded; the pick is made among the graded ones.
        n: group size; the K mod n last candidates are left out.

    Returns:
        [K // n], nan for a group with no graded candidate.
    """
    groups = len(scores) // n
    grouped = correct[: groups * n].reshape(groups, n)
    # -inf is a missing score, which still comes before a missing grade.
    ranks = np.where(np.isnan(grouped), -np.inf, np.nan_to_num(scores[: groups * n].reshape(groups, n), neginf=-1.0))
    return np.take_along_axis(grouped, ranks.argmax(axis=1)[:, None], axis=1)[:, 0]


def vote_groups(votes: np.ndarray, correct: np.ndarray, n: int, weights: np.ndarray | None = None) -> np.ndarray:
    """Probability that the vote of each disjoint group's graded candidates is right; as `best_of_n_groups`."""
    won = np.full(len(correct) // n, np.nan)
    for group in range(len(won)):
        members = group * n + np.flatnonzero(~np.isnan(correct[group * n : group * n + n]))
        if len(members):
            cast = votes[members][:, votes[members].any(0)]
            weight = None if weights is None else weights[members]
            won[group] = expected_vote(cast, correct[members], np.ones((1, len(members))), weight)
    return won


def clustered_mean(values: np.ndarray, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean over responses, and its standard error when responses to one question are not independent.

    Args:
        values: [responses, ...].
        groups: [responses] the question of each.

    Returns:
        mean [...] and error [...], nan with one question.
    """
    mean = values.mean(axis=0)
    _, group_of = np.unique(groups, return_inverse=True)
    count = group_of.max() + 1
    if count == 1:
        return mean, np.full_like(mean, np.nan)
    sums = np.zeros((count, *values.shape[1:]))
    np.add.at(sums, group_of, values - mean)
    return mean, np.sqrt((sums**2).sum(axis=0) * count / (count - 1)) / len(values)
