"""The estimators against enumeration of every subset."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xbai.measure.estimators import (
    MAX_SUBSETS,
    best_of_n_groups,
    clustered_mean,
    expected_best_of_n,
    expected_oracle,
    expected_vote,
    subset_masks,
    vote_groups,
    votes_for,
)
from xbai.measure.separation import expected_calibration_error, reliability
from xbai.search.choice import best_candidate, vote_winners

# Powers of two add up without rounding, so that equal votes are equal in any order.
candidates = st.lists(
    st.tuples(st.sampled_from([-np.inf, 0.125, 0.25, 0.5, 0.875]), st.booleans(), st.sampled_from([*"abc", None])),
    min_size=1,
    max_size=7,
)
Items = list[tuple[float, bool, str | None]]


def split(items: Items) -> tuple[np.ndarray, np.ndarray, list[str | None]]:
    scores, correct, keys = zip(*items)
    return np.array(scores, dtype=float), np.array(correct, dtype=float), list(keys)


@given(items=candidates, data=st.data())
def test_best_of_n_is_the_mean_over_all_subsets(items: Items, data: st.DataObject) -> None:
    scores, correct, _ = split(items)
    n = data.draw(st.integers(1, len(items)))
    expected = np.mean(
        [
            correct[list(subset)][scores[list(subset)] == scores[list(subset)].max()].mean()
            for subset in combinations(range(len(items)), n)
        ]
    )
    assert expected_best_of_n(scores, correct, n) == pytest.approx(expected)


@given(items=candidates, data=st.data())
def test_oracle_is_the_mean_over_all_subsets(items: Items, data: st.DataObject) -> None:
    _, correct, _ = split(items)
    n = data.draw(st.integers(1, len(items)))
    expected = np.mean([correct[list(subset)].max() for subset in combinations(range(len(items)), n)])
    assert expected_oracle(correct, n) == pytest.approx(expected)


def enumerated_vote(keys: list[str | None], correct: np.ndarray, n: int, weights: np.ndarray) -> float:
    values = []
    for subset in combinations(range(len(keys)), n):
        ballots: dict[str, float] = {}
        for i in subset:
            if keys[i] is not None:
                ballots[keys[i]] = ballots.get(keys[i], 0.0) + weights[i]
        if not any(ballots.values()):
            values.append(correct[list(subset)].mean())
            continue
        winners = [key for key, votes in ballots.items() if votes >= max(ballots.values())]
        rightness = [np.mean([c for key, c in zip(keys, correct) if key == winner]) for winner in winners]
        values.append(np.mean(rightness))
    return float(np.mean(values))


@given(items=candidates, weighted=st.booleans(), data=st.data())
def test_vote_is_the_mean_over_all_subsets(items: Items, weighted: bool, data: st.DataObject) -> None:
    scores, correct, keys = split(items)
    n = data.draw(st.integers(1, len(items)))
    weights = np.where(np.isfinite(scores), scores, 0.0) if weighted else np.ones(len(items))
    subsets = subset_masks(len(items), n)
    found = expected_vote(votes_for(keys), correct, subsets, weights if weighted else None)
    assert found == pytest.approx(enumerated_vote(keys, correct, n, weights))


def test_votes_over_random_subsets_approach_the_mean_over_all() -> None:
    rng = np.random.default_rng(3)
    keys = [str(number) for number in rng.integers(0, 4, 16)]
    correct = np.array([key == "0" for key in keys], dtype=float)
    subsets = subset_masks(16, 5)
    assert len(subsets) == MAX_SUBSETS
    found = expected_vote(votes_for(keys), correct, subsets)
    assert found == pytest.approx(enumerated_vote(keys, correct, 5, np.ones(16)), abs=0.03)


def test_equal_votes_tie_in_whatever_order_they_are_added() -> None:
    weights = np.array([0.1, 0.2, 0.3, 0.3, 0.2, 0.1])
    votes = votes_for(["a", "a", "a", "b", "b", "b"])
    assert expected_vote(votes, np.array([1, 1, 1, 0, 0, 0.0]), np.ones((1, 6)), weights) == 0.5


@given(samples=st.integers(1, 40), data=st.data())
def test_subsets_have_n_members_and_are_the_same_again(samples: int, data: st.DataObject) -> None:
    n = data.draw(st.integers(1, samples))
    masks = subset_masks(samples, n)
    assert set(masks.sum(1)) == {n} and set(np.unique(masks)) <= {0.0, 1.0}
    assert len(masks) <= MAX_SUBSETS
    subset_masks.cache_clear()
    assert np.array_equal(masks, subset_masks(samples, n))
    if len(masks) < MAX_SUBSETS:
        assert len(np.unique(masks, axis=0)) == len(masks)


def test_vote_without_answers_is_a_random_pick() -> None:
    assert expected_vote(votes_for([None, None]), np.array([1.0, 0.0]), subset_masks(2, 2)) == 0.5


@given(items=candidates, data=st.data())
def test_groups_pick_the_first_best_graded_candidate(items: Items, data: st.DataObject) -> None:
    scores, correct, _ = split(items)
    correct[data.draw(st.lists(st.integers(0, len(items) - 1), max_size=3))] = np.nan
    n = data.draw(st.integers(1, len(items)))
    found = best_of_n_groups(scores, correct, n)
    assert len(found) == len(items) // n
    for group, pick in enumerate(found):
        members = [i for i in range(group * n, group * n + n) if not np.isnan(correct[i])]
        if members:
            assert pick == correct[max(members, key=lambda i: (scores[i], -i))]
        else:
            assert np.isnan(pick)


def test_groups_vote_among_their_graded_candidates() -> None:
    votes = votes_for(["a", "b", "b", "a", "a", "b", "c"])
    correct = np.array([1.0, 0.0, 0.0, 1.0, np.nan, 0.0, 1.0])
    assert vote_groups(votes, correct, 3).tolist() == [0.0, 0.5]
    weights = np.array([0.9, 0.2, 0.3, 0.1, 1.0, 0.2, 1.0])
    assert vote_groups(votes, correct, 3, weights).tolist() == [1.0, 0.0]
    assert np.isnan(vote_groups(votes[:2], np.array([np.nan, np.nan]), 2)).all()


def test_best_candidate_takes_the_first_of_equals_and_a_missing_score_last() -> None:
    assert best_candidate([None, 0.2, 0.7, 0.7]) == 2
    assert best_candidate([None, 0.0]) == 1


def test_winners_share_a_tie() -> None:
    shares = vote_winners(np.array([[2.0, 2.0, 1.0], [0.0, 3.0, 1.0]]))
    assert shares.tolist() == [[0.5, 0.5, 0.0], [0.0, 1.0, 0.0]]


def test_clustered_error_of_equal_groups_is_that_of_their_means() -> None:
    values = np.random.default_rng(0).random((6, 4, 3))
    mean, error = clustered_mean(values.reshape(24, 3), np.repeat(np.arange(6), 4))
    means = values.mean(1)
    assert mean == pytest.approx(means.mean(0))
    assert error == pytest.approx(means.std(0, ddof=1) / np.sqrt(6))
    assert np.isnan(clustered_mean(values[0], np.zeros(4, int))[1]).all()


def test_reliability_is_accuracy_by_score() -> None:
    rng = np.random.default_rng(0)
    scores = rng.random(20_000)
    questions = rng.integers(0, 200, 20_000)
    calibrated = reliability(scores, (rng.random(20_000) < scores).astype(float), questions)
    assert [bin.low for bin in calibrated] == pytest.approx(np.arange(10) / 10)
    assert sum(bin.count for bin in calibrated) == 20_000
    assert expected_calibration_error(calibrated) < 0.02
    (certain,) = reliability(np.ones(4), np.array([1.0, 0, 0, 0]), np.arange(4))
    assert (certain.low, certain.high, certain.accuracy) == (0.9, 1.0, 0.25)
    assert expected_calibration_error([certain]) == 0.75
    assert np.isnan(expected_calibration_error([]))
