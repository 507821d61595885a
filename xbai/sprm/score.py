"""From step scores to the score of a whole trajectory (arXiv 2507.01951, section 3.2)."""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def trajectory_scores(step_logits: Tensor, feature_mask: Tensor) -> Tensor:
    """Geometric mean of each row's step scores, in float32 log space.

    Args:
        step_logits: [batch, time] raw head outputs; values off the mask are ignored.
        feature_mask: [batch, time] bool, True at the steps.

    Returns:
        [batch] float32 scores in (0, 1); 0.0 for a row without a step.
    """
    log_scores = F.logsigmoid(step_logits.float()).masked_fill(~feature_mask, 0.0)
    steps = feature_mask.sum(-1)
    return torch.where(steps > 0, torch.exp(log_scores.sum(-1) / steps.clamp(min=1)), 0.0)


def _geometric(scores: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, scores)) / len(scores)) if min(scores) > 0 else 0.0


def _soft_min(scores: Sequence[float]) -> float:
    """The soft minimum -log(mean(exp(-x))) at temperature 1 of the steps' log-odds x, as a score.

    exp(-x) is 1/score - 1, so that this is the harmonic mean of the step scores, and their soft minimum in log space
    too. It lies between the lowest step and the geometric mean, and steps of equal score give that score.
    """
    return len(scores) / sum(1 / score for score in scores) if min(scores) > 0 else 0.0


def _lowest_third(scores: Sequence[float]) -> float:
    """Mean of the lowest third of the step scores, rounded down, at least one."""
    lowest = sorted(scores)[: max(1, len(scores) // 3)]
    return sum(lowest) / len(lowest)


AGGREGATIONS: dict[str, Callable[[Sequence[float]], float]] = {
    "geometric": _geometric,
    "arithmetic": lambda scores: sum(scores) / len(scores),
    "product": math.prod,
    "lowest_third": _lowest_third,
    "soft_min": _soft_min,
    "min": min,
    "last": lambda scores: scores[-1],
}


def aggregate(step_scores: Sequence[float], how: str = "geometric") -> float:
    """Reduce one trajectory's step scores; 0.0 without steps. Ways other than `geometric` are for evaluation only."""
    return float(AGGREGATIONS[how](step_scores)) if step_scores else 0.0
