"""From step scores to the score of a whole trajectory (arXiv 2507.01951, section 3.2)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Float32


def trajectory_scores(
    step_logits: Float[Tensor, "batch time"], feature_mask: Bool[Tensor, "batch time"]
) -> Float32[Tensor, "batch"]:
    """Geometric mean of each row's step scores, in float32 log space.

    Args:
        step_logits: raw head outputs; values off the mask are ignored.
        feature_mask: True at the steps.

    Returns:
        Scores in (0, 1); 0.0 for a row without a step.
    """
    log_scores = F.logsigmoid(step_logits.float()).masked_fill(~feature_mask, 0.0)
    steps = feature_mask.sum(-1)
    return torch.where(steps > 0, torch.exp(log_scores.sum(-1) / steps.clamp(min=1)), 0.0)
