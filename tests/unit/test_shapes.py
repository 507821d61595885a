"""The annotations of the method and of the algorithms are checked at run time in all tests; here is that they are."""

import pytest
import torch
from jaxtyping import TypeCheckError

from verl.trainer.ppo.core_algos import compute_grpo_outcome_advantage
from xbai.sprm import ScoreHead, trajectory_scores

pytest.importorskip("beartype")


def test_another_shape_is_refused():
    logits, mask = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
    assert trajectory_scores(logits, mask).shape == (2,)
    for wrong in (mask[:, :2], mask[:1], mask[0]):
        with pytest.raises(TypeCheckError, match="feature_mask"):
            trajectory_scores(logits, wrong)


def test_another_dtype_is_refused():
    with pytest.raises(TypeCheckError, match="feature_mask"):
        trajectory_scores(torch.zeros(2, 3), torch.ones(2, 3))
    with pytest.raises(TypeCheckError, match="features"):
        ScoreHead(4)(torch.ones(3, 4, dtype=torch.long))


def test_the_trainers_algorithms_are_checked_too():
    with pytest.raises(TypeCheckError, match="graded"):
        compute_grpo_outcome_advantage(torch.zeros(3), ["a", "b", "c"], torch.ones(4, dtype=torch.bool))
