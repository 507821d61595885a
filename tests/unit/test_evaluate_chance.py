"""The probability that a response of some score is right."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from xbai.calibration import SCORE_MARGIN, ScoreChance, log_odds
from xbai.errors import UserError
from xbai.measure.chance_fit import PRIOR_PRECISION, fit_chance, held_out_chances
from xbai.measure.separation import expected_calibration_error, reliability


def graded(
    true: ScoreChance, questions: int = 400, samples: int = 16, seed: int = 0
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Scores between 0.1 and 0.9, and grades of which `true` is the chance."""
    rng = np.random.default_rng(seed)
    scores = [rng.uniform(0.1, 0.9, samples) for _ in range(questions)]
    return scores, [(rng.random(samples) < [true(score) for score in each]).astype(float) for each in scores]


@given(st.floats(0, 1), st.floats(0, 50), st.floats(-50, 50))
@settings(deadline=None)
def test_chances_are_probabilities_that_rise_with_the_score(score: float, slope: float, intercept: float) -> None:
    chance = ScoreChance(slope, intercept)
    assert 0 <= chance(0.0) <= chance(score) <= chance(1.0) <= 1
    assert ScoreChance(1.0, 0.0)(score) == pytest.approx(score, abs=2 * SCORE_MARGIN)


@pytest.mark.parametrize("true", [ScoreChance(1.0, 0.0), ScoreChance(2.5, -1.0), ScoreChance(0.4, 0.7)])
def test_the_fit_finds_the_chances_that_made_the_grades(true: ScoreChance) -> None:
    found = fit_chance(*graded(true))
    assert (found.slope, found.intercept) == pytest.approx((true.slope, true.intercept), abs=0.15)


def test_the_fit_is_the_minimum_of_the_loss_it_describes() -> None:
    """Questions of different sizes weigh alike; what lacks a score or a grade teaches nothing."""
    scores, correct = graded(ScoreChance(1.5, -0.5), questions=12)
    scores, correct = [score[: number + 3] for number, score in enumerate(scores)], [*correct]
    correct = [grade[: number + 3] for number, grade in enumerate(correct)]
    odds = torch.tensor([log_odds(score) for each in scores for score in each], dtype=torch.float64)
    scale = odds.std(correction=0)
    found = fit_chance(
        [*(np.append(score, [-np.inf, 0.9]) for score in scores), np.array([])],
        [*(np.append(grade, [1.0, np.nan]) for grade in correct), np.array([])],
    )
    coefficients = torch.tensor(
        [found.slope * scale, found.intercept + found.slope * odds.mean()], dtype=torch.float64, requires_grad=True
    )
    values = torch.stack([(odds - odds.mean()) / scale, torch.ones_like(odds)], 1) @ coefficients
    losses = torch.nn.functional.binary_cross_entropy_with_logits(
        values, torch.from_numpy(np.concatenate(correct)), reduction="none"
    )
    of_questions = [loss.mean() for loss in losses.split([len(score) for score in scores])]
    (torch.stack(of_questions).sum() + PRIOR_PRECISION / 2 * (coefficients**2).sum()).backward()
    assert coefficients.grad.abs().max() < 1e-4


def test_perfect_scores_and_equal_scores_have_finite_chances() -> None:
    correct = [np.array([1.0, 0.0]), np.array([1.0, 0.0])]
    assert 0.5 < fit_chance([np.array([1.0, 0.0])] * 2, correct)(1.0) < 1
    equal = fit_chance([np.full(3, 0.7)] * 2, [np.array([1.0, 0.0, 0.0])] * 2)
    assert equal(0.2) == pytest.approx(equal(0.7)) == pytest.approx(1 / 3, abs=0.01)


@pytest.mark.parametrize(
    ("grades", "message"),
    [([1.0, 1.0], "all right"), ([0.0, 0.0], "all wrong"), ([math.nan] * 2, "are none"), ([0.0, 1.0], "less likely")],
)
def test_what_teaches_no_chance_is_one_line(grades: list[float], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        fit_chance([np.array([0.9, 0.1])], [np.array(grades)])
    assert "\n" not in str(caught.value)


def test_held_out_chances_are_by_the_other_folds_alone() -> None:
    scores, correct = graded(ScoreChance(3.0, -1.0))
    chances = held_out_chances(scores, correct, folds=4)
    turned = [1 - grade if number % 4 == 1 else grade for number, grade in enumerate(correct)]
    of_turned = held_out_chances(scores, turned, folds=4)
    assert all((chances[number] == of_turned[number]).all() == (number % 4 == 1) for number in range(len(scores)))
    question = np.repeat(np.arange(len(scores)), 16)
    errors = [
        expected_calibration_error(reliability(np.concatenate(values), np.concatenate(correct), question))
        for values in (scores, chances)
    ]
    assert errors[1] < 0.02 < 0.1 < errors[0]
    assert np.isnan(held_out_chances([np.array([0.5])], [np.array([1.0])], folds=4)[0]).all()
