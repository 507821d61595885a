"""The self-supervised process reward model: head, step rule, score and loss, in pure torch.

Token tensors are [batch, time] int64, right-padded; masks are bool, True where something is. *Step logits* are the
head's raw output, *step scores* their sigmoid, in (0, 1); the score of a trajectory is one number made of its step
scores. What functions take is named in `steps.py`.
"""

from xbai.aggregation import AGGREGATIONS, aggregate
from xbai.sprm.groups import best_of_n_gain, within_prompt_auc
from xbai.sprm.head import ScoreHead, SPRMConfig, Standardization, load_score_head, load_sprm_config, save_score_head
from xbai.sprm.loss import (
    StepCounts,
    auc,
    count_by_class,
    counted_steps,
    scale_gradient,
    sprm_loss,
    sprm_metrics,
)
from xbai.sprm.objective import ScoreObjective, ScoreTotals
from xbai.sprm.standardize import (
    MIN_FEATURES,
    FeatureMoments,
    observed_inputs,
    shift_head,
    standardize_head,
    start_shift,
    start_totals,
    unfolded,
)
from xbai.sprm.step_rule import StepRule, split_response
from xbai.sprm.steps import step_feature_mask, trajectory_scores
from xbai.sprm.tap import HiddenStateTap

__all__ = [
    "AGGREGATIONS",
    "MIN_FEATURES",
    "FeatureMoments",
    "HiddenStateTap",
    "SPRMConfig",
    "ScoreHead",
    "ScoreObjective",
    "ScoreTotals",
    "Standardization",
    "StepCounts",
    "StepRule",
    "aggregate",
    "auc",
    "best_of_n_gain",
    "count_by_class",
    "counted_steps",
    "load_score_head",
    "load_sprm_config",
    "observed_inputs",
    "save_score_head",
    "scale_gradient",
    "shift_head",
    "split_response",
    "sprm_loss",
    "sprm_metrics",
    "standardize_head",
    "start_shift",
    "start_totals",
    "step_feature_mask",
    "trajectory_scores",
    "unfolded",
    "within_prompt_auc",
]
