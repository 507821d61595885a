"""Metrics of a batch, on hand-made values."""

import math

import numpy as np
import pytest
import torch

from verl.trainer.ppo.metrics import (
    ValidationResult,
    best_of_n,
    choice_metrics,
    explained_variance,
    is_truncated,
    log_prob_difference,
    masked_mean,
    mixed_prompts,
    validation_metrics,
)


def test_only_graded_responses_make_a_prompt_mixed():
    correct, graded = torch.tensor([1.0, 0, 1, 0, 1, 1]), torch.tensor([True, True, True, False, True, True])
    assert mixed_prompts(["a", "a", "b", "b", "c", "c"], correct, graded) == pytest.approx(1 / 3)


def test_truncated_is_without_an_end():
    responses = torch.tensor([[5, 5, 2], [5, 5, 3], [5, 5, 5], [5, 2, 0], [5, 5, 2]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 1], [1, 1, 1], [1, 1, 0], [1, 1, 0]])
    assert is_truncated(responses, mask, [2, 3]).tolist() == [False, False, True, False, True]


def test_log_prob_difference_ignores_padding():
    rollout, actor = torch.tensor([[-1.0, -2.0, 0.0]]), torch.tensor([[-1.5, -2.0, float("nan")]])
    found = log_prob_difference(rollout, actor, torch.tensor([[1, 1, 0]]))
    # The sampled token is exp(-0.5) times as likely to the actor.
    expected = {"log_prob_diff_mean": 0.25, "log_prob_diff_max": 0.5, "mismatch_kl": (math.exp(-0.5) - 1 + 0.5) / 2}
    assert found == pytest.approx({f"rollout/{name}": value for name, value in expected.items()})


def test_an_empty_mask_is_nan():
    assert math.isnan(masked_mean(torch.ones(2), torch.zeros(2)))


def test_best_of_n_takes_the_highest_score_and_leaves_out_ungraded_picks():
    scores, correct = torch.tensor([0.9, 0.1, 0.2, 0.8, 0.7, 0.6]), torch.tensor([1.0, 0, 1, 0, 0, 1])
    assert best_of_n(scores, correct, torch.ones(6, dtype=torch.bool), 2) == pytest.approx(1 / 3)
    assert best_of_n(scores, correct, torch.tensor([True, True, True, False, True, True]), 2) == pytest.approx(1 / 2)


def test_validation_over_several_batches_and_sources():
    def part(source, correct, scores):
        ones = torch.ones(2, dtype=torch.bool)
        return ValidationResult(np.array([source] * 2), torch.tensor(correct), ones, torch.tensor([4, 6]), scores)

    parts = [part("a", [1.0, 0.0], torch.tensor([0.9, 0.2])), part("b", [0.0, 0.0], torch.tensor([0.3, 0.1]))]
    found = validation_metrics(parts, n=2)
    assert found["val/pass@1"] == 0.25 and found["val/a/pass@1"] == 0.5 and found["val/b/pass@1"] == 0.0
    assert found["val/auc"] == 1.0 and found["val/best_of_2"] == 0.5 and found["val/response_length"] == 5.0
    assert found["val/within_prompt_auc"] == 1.0
    assert list(found).index("val/within_prompt_auc") < list(found).index("val/auc")
    assert "val/within_prompt_auc" not in validation_metrics(parts, n=1)


def test_choice_within_a_prompt_leaves_out_what_has_no_grade_and_counts_no_score_as_the_last_choice():
    scores = torch.tensor([0.9, 0.2, 0.8, 0.0, 0.3, 0.6, 0.7])
    correct = torch.tensor([0.0, 0.0, 1.0, 1.0, 1.0, 0.0, 1.0])
    graded = torch.tensor([False, True, True, True, True, True, True])
    found = choice_metrics(scores, correct, graded, ["a", "a", "a", "a", "b", "b", "b"])
    # a: .8 over .2; b: .7 over .6, but not .3. Chosen are .8, of three with two right, and .7, of three with two.
    assert found == pytest.approx({"within_prompt_auc": (1 + 0.5) / 2, "best_of_n_gain": 1 / 3})


def test_explained_variance():
    returns, mask = torch.tensor([[1.0, 2.0, 7.0], [3.0, 4.0, 9.0]]), torch.tensor([[1, 1, 0], [1, 1, 0]])
    assert explained_variance(returns - 5, returns, mask) == 1.0
    assert explained_variance(torch.zeros(2, 3), returns, mask) == 0.0
    assert explained_variance(-returns, returns, mask) == -3.0
    assert math.isnan(explained_variance(returns, torch.ones(2, 3), mask))
