"""How a fresh score head starts: on standardised features, and on neither side.

Some coordinates of a residual stream are huge in every token (massive activations, arXiv 2402.17762). Through random
weights they put the logits of all steps on one side, whatever else the features say; and an optimiser that moves every
weight by as much as the others moves all logits together by the weights of those coordinates. Mean and deviation of the
features are folded into the first layer, so that the head keeps its published form, and optimisers see that layer as it
is of standardised features.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from xbai.sprm.head import ScoreHead, Standardization
from xbai.sprm.loss import POSITIVE_CLASS_WEIGHT
from xbai.sprm.objective import ScoreObjective
from xbai.sprm.steps import Outcomes, StepLogits, StepMask

if TYPE_CHECKING:
    from jaxtyping import Float, Float64

DEVIATION_FLOOR = 0.1
"""Of the median coordinate's deviation: one that hardly moves in the first responses may move later."""
MIN_FEATURES = 2
"""What a deviation needs."""
MOST_CERTAIN = 0.95
"""How far from one half a start may lie, at most, where nearly all first answers are right, or wrong."""


class FeatureMoments:
    """Count, sums and sums of squares of feature vectors, in float64: those of micro-batches and of ranks add up.

    Attributes:
        totals: [1 + 2c]; to be summed over ranks.
    """

    def __init__(self, hidden_size: int, device: torch.device | None = None) -> None:
        self.totals = torch.zeros(1 + 2 * hidden_size, dtype=torch.float64, device=device)

    def add(self, features: Float[Tensor, "*shape c"]) -> None:
        """Count in features."""
        rows = features.detach().flatten(0, -2).to(self.totals)
        self.totals += torch.cat([rows.new_full((1,), len(rows)), rows.sum(0), rows.square().sum(0)])

    @property
    def count(self) -> int:
        """How many vectors."""
        return int(self.totals[0])

    @property
    def standardization(self) -> Standardization:
        """By these moments: no deviation is below `DEVIATION_FLOOR` of the median; 1 where nothing moves at all."""
        mean, mean_square = (self.totals[1:] / self.totals[0]).chunk(2)
        # Rounding makes a little of what is nothing.
        variance = mean_square - mean.square()
        moves = variance > 1e-12 * mean_square
        if not moves.any():
            return Standardization(mean, torch.ones_like(mean))
        deviation = torch.where(moves, variance, 0.0).sqrt()
        return Standardization(mean, deviation.clamp(min=DEVIATION_FLOOR * deviation[moves].median()))


@contextmanager
def observed_inputs(head: ScoreHead, device: torch.device | None = None) -> Iterator[FeatureMoments]:
    """Moments of all that the head's first layer is given inside: features as the head sees them."""
    moments = FeatureMoments(head.hidden_size, device)
    hook = head[0].register_forward_pre_hook(lambda _, inputs: moments.add(inputs[0]))
    try:
        yield moments
    finally:
        hook.remove()


def standardize_head(head: ScoreHead, moments: FeatureMoments) -> None:
    """Make of W x + b, in place, W (x - mean) / deviation + b, and remember mean and deviation.

    Args:
        head: as it was initialised; of one that is sharded, this rank's rows are changed.
        moments: of at least `MIN_FEATURES` inputs of its first layer.
    """
    head.standardization = moments.standardization
    _fold(head, head.standardization)


@contextmanager
def unfolded(head: ScoreHead) -> Iterator[None]:
    """Inside, the first layer and its gradient are those of standardised features, where the head was standardised.

    An optimiser's step there is the one that it would make of a head with fixed standardisation before it.
    """
    standardization = head.standardization
    if standardization is None:
        yield
        return
    parameters = head.get_parameter("0.weight"), head.get_parameter("0.bias")
    layer = weight, bias = [_shard(parameter) for parameter in parameters]
    mean, deviation = (values.to(weight.device) for values in standardization)
    stored = [values.clone() for values in layer]
    bias.add_(weight.double() @ mean)
    weight.mul_(deviation)
    begun = [values.clone() for values in layer]
    gradients = [_shard(parameter.grad) for parameter in parameters if parameter.grad is not None]
    if gradients:
        of_weight, of_bias = gradients
        of_weight.addr_(of_bias, mean.to(of_bias.dtype), alpha=-1).div_(deviation)
    try:
        yield
    finally:
        if all(map(torch.equal, layer, begun)):
            # A step that was left out changes nothing, not even by rounding.
            for values, before in zip(layer, stored, strict=True):
                values.copy_(before)
        else:
            _fold(head, standardization)


def _fold(head: ScoreHead, standardization: Standardization) -> None:
    weight, bias = map(_shard, head[0].parameters())
    mean, deviation = (values.to(weight.device) for values in standardization)
    weight.div_(deviation)
    # By the weight as it was rounded: at the mean nothing is left of it.
    bias.sub_(weight.double() @ mean)


def shift_head(head: ScoreHead, shift: float) -> None:
    """Add `shift` to every logit of the head, in place."""
    _shard(head.get_parameter("3.bias")).add_(shift)


def start_totals(
    step_logits: StepLogits, feature_mask: StepMask, labels: Outcomes, graded: Outcomes
) -> Float64[Tensor, "4"]:
    """What `start_shift` needs, to be summed over ranks, by the logits of the standardised head in evaluation mode.

    Returns:
        Sum of the logits, number of steps, of graded steps, and of steps of right answers.
    """
    steps = feature_mask.sum(-1).double()
    graded_steps = steps * graded
    logits = step_logits.double().masked_fill(~feature_mask, 0.0)
    return torch.stack([logits.sum(), steps.sum(), graded_steps.sum(), (graded_steps * (labels > 0.5)).sum()])


def start_shift(totals: Float64[Tensor, "4"], objective: ScoreObjective) -> float:
    """What to add to the logits, so that their mean is the logit of `starting_score`."""
    values: list[float] = totals.tolist()
    logits, steps, graded, right = values
    score = starting_score((right + 1) / (graded + 2), objective)
    return math.log(score / (1 - score)) - logits / max(steps, 1.0)


def starting_score(share_right: float, objective: ScoreObjective) -> float:
    """What the loss would have a head say of every step that cannot tell them apart.

    Without switches that is the share of steps that are of right answers; class balance makes right steps weigh
    1.5 times as much together as wrong ones, so 0.6, whatever the share. With agreement weighting a class counts by its
    steps on the right side of 0.5: from any other start than 0.5, all steps of one class may be left out for good. To a
    loss that only compares all starts are alike.
    """
    if objective.loss == "pairwise" or (objective.judges_steps and objective.agreement_weighting):
        return 0.5
    if objective.class_balance:
        return POSITIVE_CLASS_WEIGHT / (1 + POSITIVE_CLASS_WEIGHT)
    return min(max(share_right, 1 - MOST_CERTAIN), MOST_CERTAIN)


def _shard(tensor: Tensor) -> Tensor:
    """What of a tensor this rank holds, to be changed in place without a gradient."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
