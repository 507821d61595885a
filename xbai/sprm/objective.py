"""What the score loss asks of the head: of every step, of a whole response, or of a response against its rivals.

The published loss (`xbai.sprm.loss`) gives each step the label of its response. It can be lowered by telling easy
prompts from hard ones, which is no help in choosing among the responses to one prompt. The losses here look at a whole
response, through the aggregation by which responses are chosen, so that one bad step can sink it: against its label
(multiple-instance learning: a response is right when all of its steps are), or against the responses to the same prompt
with the other label (`pairwise_loss`, Bradley and Terry's model), where the prompt cancels out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from xbai.sprm.loss import StepCounts, count_by_class, counted_steps, sprm_loss
from xbai.sprm.steps import Outcomes, StepLogits, StepMask

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Float32, Shaped

Rivals: TypeAlias = 'Float[Tensor, "batch rivals"]'
"""From `rival_scores`."""
Prompts: TypeAlias = 'Sequence[Any] | Shaped[np.ndarray, "batch"]'
"""Hashable, and the same for the responses to one prompt."""

LOSSES = ("step_bce", "outcome_bce", "pairwise", "both")
SMALLEST_LOSS = 1e-6
"""Of a response: a score nearer to 1 counts as this near, beyond which float32 has no odds."""
TRAINED_AGGREGATIONS = ("geometric", "mean_logit", "product", "soft_min")


def log_odds(
    step_logits: StepLogits, feature_mask: StepMask, aggregation: str = "geometric"
) -> Float32[Tensor, "batch"]:
    """The log-odds of each row's aggregated score, in float32 and with useful gradients at every step.

    Of the score p that is, with `geometric`, the geometric mean of the steps' scores and with `product` their product;
    with `mean_logit` they are the mean of the steps' logits, and with `soft_min` its soft minimum,
    -log(mean(exp(-logit))). 0 for a row without a step, which no loss may count.
    """
    steps = feature_mask.sum(-1)
    logits = step_logits.float().masked_fill(~feature_mask, 0.0)
    if aggregation == "soft_min":
        # A row without a step would be the logarithm of 0, whose gradient is nan wherever it is multiplied by 0.
        open_mask = feature_mask | (steps == 0)[:, None]
        odds = steps.clamp(min=1).log() - (-logits).masked_fill(~open_mask, -torch.inf).logsumexp(-1)
    elif aggregation == "mean_logit":
        odds = logits.sum(-1) / steps.clamp(min=1)
    else:
        log_score = F.logsigmoid(logits).masked_fill(~feature_mask, 0.0).sum(-1)
        if aggregation == "geometric":
            log_score = log_score / steps.clamp(min=1)
        log_score = log_score.clamp(max=-SMALLEST_LOSS)
        odds = log_score - torch.log(-torch.expm1(log_score))
    return odds.where(steps > 0, 0.0)


def rival_scores(
    scores: Float[Tensor, "batch"], labels: Outcomes, counted: Bool[Tensor, "batch"], groups: Prompts
) -> Rivals:
    """The scores of each response's rivals: the counted responses to the same prompt that have the other label.

    Args:
        scores: before the update.
        labels: of the responses.
        counted: responses that could not be graded, or have no step, are nobody's rivals.
        groups: what each response answers.

    Returns:
        As many columns as the largest group has responses; nan where there is no such rival, and all nan for rows that
        do not count.
    """
    numbers = {group: number for number, group in enumerate(dict.fromkeys(groups))}
    of_row = torch.tensor([numbers[group] for group in groups], device=scores.device)
    members = [torch.nonzero(of_row == number)[:, 0] for number in range(len(numbers))]
    right = labels > 0.5
    rivals = scores.new_full((len(scores), max(map(len, members))), torch.nan)
    for rows in members:
        others = (right[rows][:, None] != right[rows][None]) & counted[rows][:, None] & counted[rows][None]
        rivals[rows, : len(rows)] = scores[rows].expand(len(rows), -1).where(others, torch.nan)
    return rivals


def pairwise_loss(
    odds: Float[Tensor, "batch"], labels: Outcomes, counted: Bool[Tensor, "batch"], rivals: Rivals, total: float
) -> Float[Tensor, ""]:
    """This micro-batch's share of the mean, over pairs of a response and a rival, of -log P(the right one is chosen).

    A response is compared with what its rivals scored **before** the update, as PPO's ratio is with the log-probs
    before it: the loss of a response then needs no other response, whichever rank computes that one. Every pair counts
    from both sides alike, so that at the first update the gradient is that of the pairs themselves. Were it a mean over
    responses instead, the larger side would push harder, all scores would drift its way, and no rival stop them.

    Args:
        odds: from `log_odds`.
        labels: of the responses.
        counted: the responses that count.
        rivals: from `rival_scores`, of the same aggregation.
        total: pairs in the global mini-batch, each counted from both sides.
    """
    there = ~rivals.isnan() & counted[:, None]
    sign = torch.where(labels > 0.5, 1.0, -1.0)
    margins = sign[:, None] * (odds[:, None] - rivals.nan_to_num())
    return (F.softplus(-margins) * there).sum() / (total or 1.0)


@dataclass(frozen=True)
class ScoreTotals:
    """What counts in the score loss of a global mini-batch: its denominators.

    Attributes:
        steps: with w_n = 1, by class.
        responses: graded ones with steps, by class.
        pairs: of a response and a rival, each counted from both sides.
    """

    steps: StepCounts
    responses: StepCounts
    pairs: float

    SIZE = 5

    @classmethod
    def from_tensor(cls, totals: Float[Tensor, "5"]) -> ScoreTotals:
        """From the sum over ranks of `ScoreObjective.local_totals`."""
        step_right, step_wrong, right, wrong, pairs = totals.tolist()
        return cls(StepCounts(step_right, step_wrong), StepCounts(right, wrong), pairs)


@dataclass(frozen=True)
class ScoreObjective:
    """Which losses are added up, and over what; the defaults are the published form.

    Attributes:
        loss: `step_bce` (published), `outcome_bce`, `pairwise`, or `both` (`step_bce` and `pairwise`).
        aggregation: of the losses that look at whole responses.
        agreement_weighting: `step_bce` counts only the steps where the head agrees with the label.
        class_balance: `step_bce` and `outcome_bce` weigh right and wrong by their frequency.
    """

    loss: str = "step_bce"
    aggregation: str = "geometric"
    agreement_weighting: bool = True
    class_balance: bool = True

    @property
    def judges_steps(self) -> bool:
        """Some of the loss is the steps'."""
        return self.loss in ("step_bce", "both")

    @property
    def judges_responses(self) -> bool:
        """Some of the loss is that of whole responses."""
        return self.loss != "step_bce"

    @property
    def compares(self) -> bool:
        """Some of the loss compares a response with its rivals."""
        return self.loss in ("pairwise", "both")

    def counted_steps(
        self, logits_before: StepLogits, feature_mask: StepMask, labels: Outcomes, graded: Outcomes
    ) -> StepMask:
        """The steps with w_n = 1, by the logits before the update."""
        return counted_steps(logits_before, feature_mask, labels, graded, self.agreement_weighting)

    def rivals(
        self, logits_before: StepLogits, feature_mask: StepMask, labels: Outcomes, graded: Outcomes, groups: Prompts
    ) -> Rivals:
        """`rival_scores` by the log-odds before the update."""
        before = log_odds(logits_before, feature_mask, self.aggregation)
        return rival_scores(before, labels, counted_responses(feature_mask, graded), groups)

    def local_totals(
        self, counted: StepMask, feature_mask: StepMask, labels: Outcomes, graded: Outcomes, rivals: Rivals | None
    ) -> Float32[Tensor, "5"]:
        """To be summed over ranks: see `ScoreTotals`."""
        responses = counted_responses(feature_mask, graded)[:, None]
        pairs = torch.zeros(1) if rivals is None else (~rivals.isnan()).sum()[None].float()
        return torch.cat([count_by_class(counted, labels), count_by_class(responses, labels), pairs.to(labels.device)])

    def response_loss(
        self,
        step_logits: StepLogits,
        feature_mask: StepMask,
        labels: Outcomes,
        graded: Outcomes,
        rivals: Rivals | None,
        totals: ScoreTotals,
    ) -> Float[Tensor, ""]:
        """This micro-batch's share of the loss of whole responses; `rivals` where the loss `compares`."""
        odds = log_odds(step_logits, feature_mask, self.aggregation)
        counted = counted_responses(feature_mask, graded)
        if not self.compares:
            # The class-balanced mean of BCE(aggregated score, y): to the loss of steps a response is one of them.
            return sprm_loss(odds[:, None], counted[:, None], labels, totals.responses, self.class_balance)
        if rivals is None:
            raise ValueError(f"loss={self.loss} compares responses with their rivals, and none were given")
        return pairwise_loss(odds, labels, counted, rivals, totals.pairs)

    def __call__(
        self, step_logits: StepLogits, feature_mask: StepMask, labels: Outcomes, graded: Outcomes, groups: Prompts
    ) -> Float[Tensor, ""]:
        """The loss of a batch that holds its prompts' responses whole, by its own logits before the update."""
        before = step_logits.detach()
        counted = self.counted_steps(before, feature_mask, labels, graded)
        rivals = self.rivals(before, feature_mask, labels, graded, groups) if self.compares else None
        totals = ScoreTotals.from_tensor(self.local_totals(counted, feature_mask, labels, graded, rivals))
        loss = step_logits.new_zeros(())
        if self.judges_steps:
            loss = loss + sprm_loss(step_logits, counted, labels, totals.steps, self.class_balance)
        if self.judges_responses:
            loss = loss + self.response_loss(step_logits, feature_mask, labels, graded, rivals, totals)
        return loss


def counted_responses(feature_mask: StepMask, graded: Outcomes) -> Bool[Tensor, "batch"]:
    """Graded, and with a step to judge."""
    return graded.bool() & feature_mask.any(-1)
