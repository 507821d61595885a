"""What a way of choosing among N candidates achieves on one question, estimated from all K sampled ones.

Best-of-N and oracle are exact expectations over all subsets of size N; votes are averaged over random subsets.
"""

from __future__ import annotations

from math import comb

import numpy as np

from xbai.search.majority import vote_winners

VOTE_DRAWS = 512


def expected_best_of_n(scores: np.ndarray, correct: np.ndarray, n: int) -> float:
    """Probability that the highest-scored of n candidates, drawn without replacement, is right.

    Args:
        scores: [K]; of equal scores each is picked equally often.
        correct: [K] in [0, 1].
        n: from 1 to K.
    """
    levels, level_of = np.unique(-scores, return_inverse=True)
    expected, better = 0.0, 0
    for level in range(len(levels)):
        members = correct[level_of == level]
        # The pick is of this level when no better candidate is drawn, but one of these is.
        ways = comb(len(scores) - better, n) - comb(len(scores) - better - len(members), n)
        expected += ways / comb(len(scores), n) * float(members.mean())
        better += len(members)
    return expected


def expected_oracle(correct: np.ndarray, n: int) -> float:
    """Probability that at least one of n candidates, drawn without replacement, is right (pass@n)."""
    wrong = int((correct < 0.5).sum())
    return 1.0 - comb(wrong, n) / comb(len(correct), n)


def expected_vote(
    keys: list[str | None],
    correct: np.ndarray,
    n: int,
    rng: np.random.Generator,
    weights: np.ndarray | None = None,
    draws: int = VOTE_DRAWS,
) -> float:
    """Probability that the answer with most votes among n candidates is right.

    Args:
        keys: [K] the answer each candidate votes for; None abstains.
        correct: [K] in [0, 1].
        n: from 1 to K; 1 and K are exact.
        rng: draws the subsets.
        weights: [K] weight of each vote, 1 where not given.
        draws: random subsets.
    """
    answers = {key: number for number, key in enumerate(sorted({key for key in keys if key is not None}))}
    if not answers or n == 1:
        return float(correct.mean())
    ballots = np.zeros((len(keys), len(answers)))
    for candidate, key in enumerate(keys):
        if key is not None:
            ballots[candidate, answers[key]] = 1.0
    rightness = (ballots * correct[:, None]).sum(0) / ballots.sum(0)
    if weights is not None:
        ballots *= weights[:, None]
    if n == len(keys):
        subsets = np.arange(n)[None]
    else:
        subsets = rng.random((draws, len(keys))).argpartition(n, axis=1)[:, :n]
    counted = ballots[subsets].sum(axis=1)
    chosen = vote_winners(counted) @ rightness
    # A subset in which nobody votes leaves a random pick among its candidates.
    silent = ~counted.any(axis=1)
    chosen[silent] = correct[subsets[silent]].mean(axis=1)
    return float(chosen.mean())


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
