"""The estimators against enumeration of every subset."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xbai.evaluate.estimators import best_of_n_groups, expected_best_of_n, expected_oracle, expected_vote
from xbai.search import best_candidate, vote_key, vote_winners

candidates = st.lists(
    st.tuples(st.sampled_from([-np.inf, 0.1, 0.4, 0.4001, 0.9]), st.booleans(), st.sampled_from(["a", "b", "c", None])),
    min_size=1,
    max_size=7,
)


def split(items: list[tuple[float, bool, str | None]]) -> tuple[np.ndarray, np.ndarray, list[str | None]]:
    scores, correct, keys = zip(*items)
    return np.array(scores, dtype=float), np.array(correct, dtype=float), list(keys)


@given(items=candidates, data=st.data())
def test_best_of_n_is_the_mean_over_all_subsets(items: list, data) -> None:
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
def test_oracle_is_the_mean_over_all_subsets(items: list, data) -> None:
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


@given(items=candidates, weighted=st.booleans())
def test_vote_of_all_is_exact(items: list, weighted: bool) -> None:
    scores, correct, keys = split(items)
    weights = np.where(np.isfinite(scores), scores, 0.0) if weighted else np.ones(len(items))
    found = expected_vote(keys, correct, len(items), np.random.default_rng(0), weights if weighted else None)
    expected = float(correct.mean()) if len(items) == 1 else enumerated_vote(keys, correct, len(items), weights)
    assert found == pytest.approx(expected)


def test_vote_of_some_approaches_the_mean_over_all_subsets() -> None:
    keys, correct = ["a", "a", "b", "c", "b", None, "a", "d"], np.array([1, 1, 0, 0, 0, 1, 1, 0.0])
    for n in (2, 3, 5):
        found = expected_vote(keys, correct, n, np.random.default_rng(1), draws=20_000)
        assert found == pytest.approx(enumerated_vote(keys, correct, n, np.ones(8)), abs=0.01)


def test_vote_without_answers_is_a_random_pick() -> None:
    assert expected_vote([None, None], np.array([1.0, 0.0]), 2, np.random.default_rng(0)) == 0.5


@given(items=candidates, data=st.data())
def test_groups_pick_the_first_best_graded_candidate(items: list, data) -> None:
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


def test_best_candidate_takes_the_first_of_equals_and_a_missing_score_last() -> None:
    assert best_candidate([None, 0.2, 0.7, 0.7]) == 2
    assert best_candidate([None, 0.0]) == 1


def test_vote_keys_ignore_how_an_answer_is_written() -> None:
    assert vote_key("<think>\\boxed{3}</think> \\boxed{ 7 + 8 }") == vote_key("so \\boxed{7+8}")
    assert vote_key("ANSWER: B") == "B"
    assert vote_key("no answer here") is None
    assert vote_key("\\boxed{" + "1" * 5000 + "}") is None


def test_winners_share_a_tie() -> None:
    shares = vote_winners(np.array([[2.0, 2.0, 1.0], [0.0, 3.0, 1.0]]))
    assert shares.tolist() == [[0.5, 0.5, 0.0], [0.0, 1.0, 0.0]]
