"""The self-supervised process-reward loss (arXiv 2507.01951, section 3.3).

Every step of a trajectory carries the label of its final answer, and counts only where the head already agrees with
that label. Denominators are global (all micro-batches of all ranks), so that local sums add up to the global mean.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from xbai.auc import roc_auc
from xbai.sprm.steps import Outcomes, StepLogits, StepMask, trajectory_scores

if TYPE_CHECKING:
    from jaxtyping import Float, Float32, Shaped

POSITIVE_CLASS_WEIGHT = 1.5


@dataclass(frozen=True)
class StepCounts:
    """Counted steps of right (positive) and of wrong (negative) trajectories in the global mini-batch."""

    positive: float
    negative: float

    def class_weights(self, class_balance: bool) -> tuple[float, float]:
        """Weight of one positive and of one negative step: 1.5 Q/(P+Q) and P/(P+Q), or 1 and 1 when not balanced."""
        total = self.positive + self.negative
        if not class_balance or total == 0:
            return 1.0, 1.0
        return POSITIVE_CLASS_WEIGHT * self.negative / total, self.positive / total


def scale_gradient(x: Float[Tensor, "*shape"], scale: float) -> Float[Tensor, "*shape"]:
    """Identity whose gradient is multiplied by `scale`: how much of the score loss reaches the backbone."""
    scaled = x.view_as(x)
    if scaled.requires_grad:
        scaled.register_hook(lambda gradient: gradient * scale)
    return scaled


def counted_steps(
    step_logits: StepLogits, feature_mask: StepMask, labels: Outcomes, graded: Outcomes, agreement_weighting: bool
) -> StepMask:
    """The steps with w_n = 1, none of which is in a trajectory that could not be graded.

    With `agreement_weighting` these are only the steps where the head agrees with the label (score > 0.5 and right, or
    score < 0.5 and wrong).
    """
    counted = feature_mask & graded.bool()[:, None]
    if not agreement_weighting:
        return counted
    right = (labels > 0.5)[:, None]
    return counted & torch.where(right, step_logits > 0, step_logits < 0)


def count_by_class(counted: StepMask, labels: Outcomes) -> Float32[Tensor, "2"]:
    """Counted steps of right and of wrong trajectories (to be summed over ranks)."""
    steps = counted.sum(-1).float()
    right = (labels > 0.5).float()
    return torch.stack([(steps * right).sum(), (steps * (1 - right)).sum()])


def sprm_loss(
    step_logits: StepLogits, counted: StepMask, labels: Outcomes, counts: StepCounts, class_balance: bool = True
) -> Float32[Tensor, ""]:
    """This micro-batch's share of the class-balanced mean of w_n * BCE(score_n, y).

    Args:
        step_logits: values off `counted` are ignored.
        counted: from `counted_steps`.
        labels: of the trajectories.
        counts: counted steps of the global mini-batch.
        class_balance: weigh the classes by their frequency.

    Returns:
        The shares of all micro-batches and ranks add up to the weighted mean. 0 where nothing counts.
    """
    positive, negative = counts.class_weights(class_balance)
    right = (labels > 0.5)[:, None].expand_as(step_logits)
    # Logits off the mask may be anything, and 0 * nan would poison the sum.
    logits = step_logits.float().masked_fill(~counted, 0.0)
    per_step = F.binary_cross_entropy_with_logits(logits, right.float(), reduction="none")
    weights = torch.where(right, positive, negative) * counted
    total = positive * counts.positive + negative * counts.negative
    # Where the total is 0 so is every weight; the sum stays in the graph, so that every rank runs backward alike.
    return (per_step * weights).sum() / (total or 1.0)


def auc(scores: Float[Tensor, "n"], labels: Shaped[Tensor, "n"]) -> float:
    """`roc_auc` of `scores` against `labels` in {0, 1}."""
    return roc_auc(scores.detach().double().cpu().numpy(), labels.detach().double().cpu().numpy())


def sprm_metrics(
    step_logits: StepLogits, feature_mask: StepMask, labels: Outcomes, graded: Outcomes
) -> dict[str, float]:
    """How well the head tells right from wrong on a whole batch (see `counted_steps`).

    Returns:
        `one_sided` (share of steps on the side of 0.5 that has more of them: at 1 the head says the same of all),
        `steps_agree` (share of steps whose score falls on the label's side of 0.5), `score_right`, `score_wrong` (mean
        trajectory scores), `score_gap` (their difference), `auc`, `steps_per_response`. A value that the batch cannot
        define (no right trajectory, say) is nan.
    """
    graded = graded.bool() & feature_mask.any(-1)
    columns = step_logits, feature_mask, labels, graded
    step_logits, feature_mask, labels, graded = (column[graded] for column in columns)
    agreeing = counted_steps(step_logits, feature_mask, labels, graded, agreement_weighting=True)
    scores, right = trajectory_scores(step_logits, feature_mask), labels > 0.5
    score_right, score_wrong = float(scores[right].mean()), float(scores[~right].mean())
    positive = float((step_logits[feature_mask] > 0).float().mean())
    return {
        "one_sided": max(positive, 1 - positive),
        "steps_agree": float(agreeing.sum() / feature_mask.sum()),
        "steps_per_response": float(feature_mask.sum(-1).float().mean()),
        "score_right": score_right,
        "score_wrong": score_wrong,
        "score_gap": score_right - score_wrong,
        "auc": auc(scores, labels),
    }
