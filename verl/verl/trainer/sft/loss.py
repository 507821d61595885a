"""The loss of supervised fine-tuning: cross-entropy of the responses, and the score loss where rows have outcomes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from verl.models.joint_model import JointOutput, computed
from verl.models.packing import Batch, TokenLayout
from verl.trainer.config.sft import SFTScore
from verl.trainer.sft.metrics_window import MetricsWindow
from verl.workers.update import Loss, LossOutput
from xbai.sprm import StepCounts, count_by_class, counted_steps, sprm_loss


class SFTTotals(NamedTuple):
    """Of a global batch: response tokens, and steps that count in the score loss, or are graded at all."""

    tokens: float
    counted: StepCounts
    graded: StepCounts


class SFTLoss(Loss[JointOutput, SFTTotals]):
    """Means over the global batch; which steps count follows from `old_step_logits`, as in the joint loss of RL.

    `score` is None for a model without a head; `window` takes the scores of graded trajectories.
    """

    metric = "sft/loss"

    def __init__(self, score: SFTScore | None, window: MetricsWindow) -> None:
        self._score, self._window = score, window

    def local_totals(self, batch: Batch) -> Tensor:
        """[5] float64: tokens, then right and wrong steps, those that count and all."""
        counts = batch["response_mask"].new_zeros(2, 2, dtype=torch.double)
        if self._score is not None:
            steps = (self._steps(batch, weighting) for weighting in (self._score.agreement_weighting, False))
            counts = torch.stack([count_by_class(mask, batch["correct"]) for mask in steps])
        return torch.cat([batch["response_mask"].sum().double()[None], counts.flatten().double()])

    def totals(self, sums: Tensor) -> SFTTotals:
        """From the sum of `local_totals` over all ranks."""
        tokens, *steps = sums.tolist()
        return SFTTotals(tokens, StepCounts(*steps[:2]), StepCounts(*steps[2:]))

    def __call__(self, output: JointOutput, layout: TokenLayout, batch: Batch, totals: SFTTotals) -> LossOutput:
        """One micro-batch's share."""
        loss = lm_loss = -output.log_probs.sum() / totals.tokens
        score_loss = torch.zeros_like(lm_loss)
        if self._score is not None:
            counted = layout.steps(self._steps(batch, self._score.agreement_weighting))
            labels, logits = layout.steps(batch["correct"][:, None]), computed(output.step_logits)
            # To the loss of the head a flat step is a trajectory of one.
            score_loss = sprm_loss(logits[:, None], counted[:, None], labels, totals.counted, self._score.class_balance)
            loss = lm_loss + self._score.loss_coef * score_loss
            self._window.add_scores(layout.restore_steps(logits), batch)
        return LossOutput(loss, {self.metric: lm_loss.detach(), "score/loss": score_loss.detach()})

    def _steps(self, batch: Batch, agreement_weighting: bool) -> Tensor:
        steps = batch["step_feature_mask"], batch["correct"], batch["graded"]
        return counted_steps(batch["old_step_logits"], *steps, agreement_weighting)
